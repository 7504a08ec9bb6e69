"""What a kernel would take on a GPU that isn't here: counts from the emulator, turned into bounds on time.

*Modelled, not measured.* The numbers are for comparing kernels that went through the same emulator and model. They have not
been fitted to or checked against measurements, so a ratio between two of them says more than either.

    python -m bench.gpu_model --network resnet50 --batch 1 --batch 8

The time is the largest of the bounds below, for the multiprocessor with the most blocks, plus the fill of its pipeline for each
wave of blocks, plus a launch:

- ``tensor``: tensor operations at the peak rate, with all tile waste, as the instructions compute it;
- ``issue``: warp instructions, four a clock. They are counted in PTX, of which machine code has more or less;
- ``shared``: passes over the banks, one a clock;
- ``l2``: bytes that the L1 model did not hold; ``dram``: bytes that the L2 model did not hold either, or what must be moved at
  least where only a sample of the grid was run;
- ``latency``: bytes that the blocks on a multiprocessor have under way at once, by Little's law; none for kernels without
  barriers, of which it is not known.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.gpu_hardware import GPUS, Gpu, blocks_per_sm
from tests.ptx import Result

OUT = Path("build/bench/gpu_model.json")
LABEL = "modelled, not measured"
ISSUE_SLOTS = 4  # warp instructions of a multiprocessor per clock: one of each of its four parts
#: Assumptions, the same for all GPUs: round trips to DRAM and to L2, and from one kernel's end to the next one's start.
DRAM_LATENCY = 500e-9
L2_LATENCY = 200e-9
LAUNCH = 2e-6


@dataclass(frozen=True)
class Launch:
    """What the model needs of a launch, besides the counts of its blocks.

    Attributes:
        grid: Blocks in all.
        threads: Of a block.
        registers: Of a thread.
        least_bytes: Inputs, weights and outputs, each moved once.
    """

    grid: int
    threads: int
    registers: int
    least_bytes: int


def bounds(result: Result, launch: Launch, gpu: Gpu) -> dict[str, float]:
    """Seconds that each resource takes at least; of a sample of blocks, scaled to the grid."""
    totals = result.summary()
    each = 1 / result.blocks
    load = math.ceil(launch.grid / gpu.sms)  # blocks of the busiest multiprocessor
    clock = gpu.clock * 1e9
    scale = launch.grid / result.blocks
    sampled = result.blocks < launch.grid
    l2 = totals["l2_bytes"] * scale
    dram = launch.least_bytes if sampled else totals["dram_bytes"]
    found = {
        "tensor": totals["tensor_ops"] * each * load / gpu.int8_ops / clock,
        "issue": totals["instructions"] * each * load / ISSUE_SLOTS / clock,
        "shared": totals["wavefronts"] * each * load / clock,
        "l2": l2 / (gpu.l2_bytes_per_clock * clock),
        "dram": dram / gpu.dram,
    }
    together = min(resident(launch, gpu, result.shared_bytes), load)
    in_flight = totals["bytes_in_flight"] * together
    if in_flight:
        missed = min(1.0, dram / l2) if l2 else 0.0
        trip = L2_LATENCY + missed * (DRAM_LATENCY - L2_LATENCY)
        found["latency"] = totals["l2_bytes"] * each * load / in_flight * trip
    return found


def resident(launch: Launch, gpu: Gpu, shared: int) -> int:
    """Blocks of a launch that an SM holds at once."""
    return blocks_per_sm(gpu, launch.threads, launch.registers, shared)


def model(result: Result, launch: Launch, gpu: Gpu) -> dict[str, Any]:
    """Time in microseconds, the resource that binds, all bounds, blocks on an SM and waves. Modelled, not measured."""
    limits = bounds(result, launch, gpu)
    binding = max(limits, key=lambda name: limits[name])
    together = resident(launch, gpu, result.shared_bytes)
    waves = math.ceil(launch.grid / (gpu.sms * together)) if together else 0
    seconds = limits[binding] + waves * DRAM_LATENCY + LAUNCH
    return {
        "us": seconds * 1e6,
        "bound": binding,
        "bounds_us": {name: value * 1e6 for name, value in limits.items()},
        "blocks_per_sm": together,
        "waves": waves,
    }


def sample_of(grid: int, most: int = 48) -> list[int] | None:
    """Blocks to run of a large grid: runs of neighbours, which share what lies in the caches; None for all of a small one."""
    if grid <= 2 * most:
        return None
    starts = [int(i * (grid - 8) / (most // 8 - 1)) for i in range(most // 8)]
    return sorted({start + i for start in starts for i in range(8)})


def records(network: str, batch: int) -> list[dict[str, Any]]:
    """One record per layer of a network and GPU, for the CUDA kernels of the package."""
    from bench.gpu_layers import run_layer
    from bench.layers import conv_shapes

    found = []
    for shape in conv_shapes(network):
        for arch, gpus in (("75", GPUS[:1]), ("80", GPUS[1:])):
            for gpu in gpus:
                result, launch, kernel = run_layer(shape, batch, arch, gpu)
                answer = model(result, launch, gpu)
                found.append(
                    {
                        "network": network,
                        "layer": shape.name,
                        "count": shape.count,
                        "shape": asdict(shape),
                        "batch": batch,
                        "macs": batch * shape.macs,
                        "arch": gpu.arch,
                        "gpu": gpu.name,
                        "kernel": kernel,
                        "peer": None,
                        "dtype": "int8",
                        "pattern": "dense",
                        "sparsity": 0.0,
                        **answer,
                        "counters": result.summary(),
                        "label": LABEL,
                    }  # fmt: skip
                )
    return found


def report(rows: list[dict[str, Any]]) -> str:
    """A table: time per network, batch and GPU, and how often each resource binds."""
    lines = [f"{'network':14} {'batch':>5} {'GPU':10} {'ms':>8} {'of int8 peak':>12}  bound by  ({LABEL})"]
    keys = sorted({(r["network"], r["batch"], r["gpu"]) for r in rows})
    for network, batch, name in keys:
        mine = [r for r in rows if (r["network"], r["batch"], r["gpu"]) == (network, batch, name)]
        gpu = next(g for g in GPUS if g.name == name)
        seconds = sum(r["us"] * r["count"] for r in mine) * 1e-6
        useful = sum(2 * r["macs"] * r["count"] for r in mine)
        binding: dict[str, int] = {}
        for r in mine:
            binding[r["bound"]] = binding.get(r["bound"], 0) + 1
        share = useful / seconds / gpu.int8_peak
        lines.append(f"{network:14} {batch:5d} {name:10} {seconds * 1e3:8.3f} {share:11.1%}   {binding}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", action="append", help="resnet50, mobilenet_v2; all by default")
    parser.add_argument("--batch", action="append", type=int, help="1, 8 by default")
    arguments = parser.parse_args()
    from bench.layers import NETWORKS

    rows = [
        r
        for network in arguments.network or NETWORKS
        for batch in arguments.batch or (1, 8)
        for r in records(network, batch)
    ]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1))
    print(report(rows))
    print(f"{OUT}: {len(rows)} records")


if __name__ == "__main__":
    main()
