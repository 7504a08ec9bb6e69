"""What a kernel would take on a GPU that isn't here: counts from the emulator, turned into bounds on time.

*Modelled, not measured.* Fitted to half of the published times that ``python -m bench.gpu_validation`` names, and checked
against the other half.

    python -m bench.gpu_model --network resnet50 --batch 1 --batch 8

Each resource takes some time at least, on the multiprocessor with the most blocks:

- ``tensor``: tensor operations at the peak rate, with all tile waste, as the instructions compute it;
- ``issue``: warp instructions, four a clock. They are counted in PTX, of which machine code has more or less;
- ``shared``: passes over the banks, one a clock;
- ``l2``: bytes that the L1 model did not hold, over the whole chip; ``fill``: the same over the port of one multiprocessor;
- ``dram``: bytes that the L2 model did not hold either; where only a sample of the grid was run, what must be moved at least,
  and the input once more for each sweep of the blocks over it if it is larger than the L2;
- ``latency``: bytes that the blocks on a multiprocessor have under way at once, by Little's law; none for kernels without
  barriers, of which it is not known;
- ``steps``: from one barrier to the next a block needs some time, however little it does; blocks on a multiprocessor overlap.

No resource is used at its peak, and they overlap in part only: the time is the p-norm of the bounds, each divided by the
fraction of its peak that is reached, plus a launch (:class:`Calibration`). The fill of a block's pipeline is in its steps; a
term of its own for each wave of blocks was fitted to nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import files
from bench.gpu_hardware import GPUS, Gpu, blocks_per_sm
from tests.ptx import Result

OUT = Path("build/bench/gpu_model.json")
LABEL = "modelled, not measured"
L1 = 28 << 10  # bytes left beside the shared memory of kernels that use most of it, on all these architectures
FILL = 64  # bytes that a multiprocessor takes from the L2 per clock
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
        dtype: Of the tensor cores' operands, "int8" or "fp16" (with fp32 sums).
        input_bytes: What each sweep of the blocks reads.
        sweeps: How often the blocks, in the order of their numbers, go over the input from its start to its end.
        sparse: Whether the products are 2:4 sparse ones, which the tensor cores compute at twice the rate of dense ones of the
            same sizes, on all architectures that have them.
    """

    grid: int
    threads: int
    registers: int
    least_bytes: int
    dtype: str = "int8"
    input_bytes: int = 0
    sweeps: int = 1
    sparse: bool = False


@dataclass(frozen=True)
class Calibration:
    """How far kernels stay from the bounds; the same for all GPUs.

    Attributes:
        chip: Fraction of the peak that tensor cores, issue slots and shared memory reach.
        l2, dram: The same of the cache with the ports to it, and of the memory.
        norm: p of the norm that joins the bounds: infinite where all overlaps, 1 where nothing does.
        step: Seconds from one barrier of a block to the next.
    """

    chip: float
    l2: float
    dram: float
    norm: float
    step: float


#: Fitted by ``python -m bench.gpu_validation`` and frozen: whoever changes one reports every table again that was made with it.
CALIBRATION = Calibration(chip=0.98, l2=0.98, dram=0.90, norm=3.14, step=0.175e-6)
#: What fits of random halves of the published times give at most and at least, and round numbers where all agree: a ratio that
#: holds with each of these holds over the constants' uncertainty.
RANGES = {"chip": (0.9, 1.0), "l2": (0.8, 1.0), "dram": (0.72, 0.93), "norm": (2.5, 3.3), "step": (0.135e-6, 0.19e-6)}
VARIATIONS = (CALIBRATION, *(replace(CALIBRATION, **{name: end}) for name, ends in RANGES.items() for end in ends))
_PART = {"tensor": "chip", "issue": "chip", "shared": "chip", "l2": "l2", "fill": "l2", "dram": "dram"}


def bounds(counts: Mapping[str, Any], launch: Launch, gpu: Gpu, step: float = CALIBRATION.step) -> dict[str, float]:
    """Seconds that each resource takes at least; of a sample of blocks, scaled to the grid.

    Args:
        counts: A :meth:`Result.summary`.
        launch: What was launched.
        gpu: On which.
        step: Seconds from one barrier of a block to the next.
    """
    each = 1 / counts["blocks"]
    load = math.ceil(launch.grid / gpu.sms)  # blocks of the busiest multiprocessor
    clock = gpu.clock * 1e9
    scale = launch.grid / counts["blocks"]
    sampled = counts["blocks"] < launch.grid
    l2 = counts["l2_bytes"] * scale
    together = max(1, min(resident(launch, gpu, counts["shared_bytes"]), load))
    dram = counts["dram_bytes"]
    if sampled:
        again = min(launch.sweeps, math.ceil(load / together)) - 1 if launch.input_bytes > gpu.l2 else 0
        dram = min(launch.least_bytes + again * launch.input_bytes, max(l2, launch.least_bytes))
    # Fences are counted in the same class, but no warp waits there for others.
    barriers = (counts["classes"].get("barrier", 0) - counts.get("fences", 0)) * each / counts["warps"]
    rate = (gpu.int8_ops if launch.dtype == "int8" else gpu.fp16_ops) * (1 + launch.sparse)
    found = {
        "tensor": counts["tensor_ops"] * each * load / rate / clock,
        "issue": counts["instructions"] * each * load / ISSUE_SLOTS / clock,
        "shared": counts["wavefronts"] * each * load / clock,
        "l2": l2 / (gpu.l2_bytes_per_clock * clock),
        "fill": counts["l2_bytes"] * each * load / FILL / clock,
        "dram": dram / gpu.dram,
        "steps": barriers * math.ceil(load / together) * step,
    }
    in_flight = counts["bytes_in_flight"] * together
    if in_flight:
        missed = min(1.0, dram / l2) if l2 else 0.0
        trip = L2_LATENCY + missed * (DRAM_LATENCY - L2_LATENCY)
        found["latency"] = counts["l2_bytes"] * each * load / in_flight * trip
    return found


def resident(launch: Launch, gpu: Gpu, shared: int) -> int:
    """Blocks of a launch that an SM holds at once."""
    return blocks_per_sm(gpu, launch.threads, launch.registers, shared)


def model(
    result: Result | Mapping[str, Any], launch: Launch, gpu: Gpu, calibration: Calibration = CALIBRATION
) -> dict[str, Any]:
    """Time in microseconds, the resource that binds, all bounds, blocks on an SM and waves. Modelled, not measured."""
    counts = result.summary() if isinstance(result, Result) else result
    limits = {
        name: value / getattr(calibration, _PART[name]) if name in _PART else value
        for name, value in bounds(counts, launch, gpu, calibration.step).items()
    }
    binding = max(limits, key=lambda name: limits[name])
    together = resident(launch, gpu, counts["shared_bytes"])
    waves = math.ceil(launch.grid / (gpu.sms * together)) if together else 0
    largest = limits[binding]
    joined = largest * sum((value / largest) ** calibration.norm for value in limits.values()) ** (1 / calibration.norm)
    seconds = joined + LAUNCH
    return {
        "us": seconds * 1e6,
        "bound": binding,
        "bounds_us": {name: value * 1e6 for name, value in limits.items()},
        "blocks_per_sm": together,
        "waves": waves,
    }


def varied(counts: Mapping[str, Any], launch: Launch, gpu: Gpu) -> list[float]:
    """Microseconds with each of VARIATIONS."""
    return [model(counts, launch, gpu, calibration)["us"] for calibration in VARIATIONS]


def touched(size: int, kernel: int, stride: int) -> float:
    """Fraction of an input's rows (or columns) that a convolution reads: a stride may step over some."""
    return min(1.0, kernel / stride) if size > 1 else 1.0


def sample_of(grid: int, most: int = 48, row: int = 1) -> list[int] | None:
    """Blocks to run of a large grid: runs of neighbours, which share what lies in the caches; None for all of a small one.

    Args:
        grid: Blocks in all.
        most: How many to run, a multiple of 8.
        row: So many blocks at the grid's end may have less to do than others: their share of the sample is that of the grid.
    """
    if grid <= 2 * most:
        return None
    end = grid if row >= grid else grid - row + max(1, round(most * row / grid))
    starts = [int(i * (end - 8) / (most // 8 - 1)) for i in range(most // 8)]
    return sorted({start + i for start in starts for i in range(8)})


def _record(shape: Any, batch: int, gpu: Gpu, **rest: Any) -> dict[str, Any]:
    return {
        "network": shape.network, "layer": shape.name, "count": shape.count, "shape": asdict(shape), "batch": batch,
        "macs": batch * shape.macs, "arch": gpu.arch, "gpu": gpu.name, "label": LABEL, **rest,
    }  # fmt: skip


PEERS = ("cutlass", "triton", "inductor")


def peer_records(
    shape: Any, batch: int, arch: str, gpu: Gpu, dtypes: Sequence[str], peers: Sequence[str] = PEERS
) -> list[dict[str, Any]]:
    """The best of each peer's kernels on a layer, by the model: CUTLASS's int8, fp16 and 2:4, Triton's int8, inductor's."""
    from bench import gpu_peers

    groups = []
    if "cutlass" in peers:
        groups += [list(gpu_peers.conv_candidates(shape, batch, arch, dtype)) for dtype in dtypes]
        groups += [list(gpu_peers.sparse_candidates(shape, batch))] if "int8" in dtypes and arch != "75" else []
    if "triton" in peers and "int8" in dtypes and arch != "75":  # whose tensor cores Triton does not feed with int8
        groups += [list(gpu_peers.triton_candidates(shape, batch, "int8"))]
    if "inductor" in peers and arch != "75":
        groups += [list(gpu_peers.inductor_candidates(shape, batch, dtype)) for dtype in dtypes]
    found = []
    for candidates in filter(None, groups):
        _, peer, dtype, pattern, _ = candidates[0]
        fitting = [c for c in candidates if resident(c.counted[1], gpu, c.counted[0]["shared_bytes"])]
        timed = [(model(*c.counted, gpu), c.kernel, c.counted[0], varied(*c.counted, gpu)) for c in fitting]
        if gpu.arch == "sm_90" and (peer, pattern) == ("cutlass", "dense"):
            bound = gpu_peers.wgmma_bound(shape, batch, gpu, dtype)
            timed.append((bound, "bound: 75 % of the wgmma peak", {}, [bound["us"]] * len(VARIATIONS)))
        answer, kernel, counts, _ = min(timed, key=lambda t: float(t[0]["us"]))
        about = {"kernel": kernel, "peer": peer, "dtype": dtype, "pattern": pattern}
        about |= {
            "sparsity": 0.5 if pattern == "2:4" else 0.0,
            "us_varied": [min(v) for v in zip(*(t[3] for t in timed), strict=True)],
            "pass_us": gpu_peers.requantize_pass(shape, batch, gpu)
            if counts and (peer, dtype) == ("cutlass", "int8")
            else 0.0,
        }
        found.append(_record(shape, batch, gpu, **about, **answer, counters=counts))
    return found


def records(
    network: str, batch: int, dtypes: Sequence[str] = (), gpus: Sequence[Gpu] = GPUS, peers: Sequence[str] = PEERS
) -> list[dict[str, Any]]:
    """One record per layer of a network, GPU and kernel: the package's CUDA kernels, dense and 2:4, and peers of these dtypes.
    Other patterns of zeros are added by ``python -m bench.gpu_sparse``."""
    from bench import gpu_sparse
    from bench.gpu_layers import run_layer
    from bench.layers import gpu_shapes

    shapes = gpu_shapes(network)
    found = gpu_sparse.records(shapes, batch, [g for g in gpus if g.arch != "sm_75"], masks=gpu_sparse.MASKS[:1])
    for number, shape in enumerate(shapes, 1):
        print(f"{network}, batch {batch}: layer {number} of {len(shapes)}, {shape.name}", file=sys.stderr, flush=True)
        for gpu in gpus:
            (counts, launch), kernel = run_layer(shape, batch, gpu.code, gpu)
            about = {"kernel": kernel, "peer": None, "dtype": "int8", "pattern": "dense", "sparsity": 0.0}
            about |= {"us_varied": varied(counts, launch, gpu), "pass_us": 0.0}
            found.append(_record(shape, batch, gpu, **about, **model(counts, launch, gpu), counters=counts))
            found += peer_records(shape, batch, "75" if gpu.code == "75" else "80", gpu, dtypes, peers)
    return found


#: What tells records apart. Not the kernel: a record is of the best that a peer has, and another one's takes its place.
KEY = ("network", "layer", "shape", "batch", "gpu", "peer", "dtype", "pattern", "sparsity")


def merge(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of both, of equal places (KEY) the new ones."""
    place = lambda row: json.dumps([row.get(name) for name in KEY], sort_keys=True)  # noqa: E731
    made = {place(row) for row in new}
    return [*(row for row in old if place(row) not in made), *new]


def save(rows: Sequence[dict[str, Any]], keep: bool) -> list[dict[str, Any]]:
    """Write records to OUT, which is never there by half; with ``keep`` beside what it holds of other places. All of them."""
    every = merge(json.loads(OUT.read_text()) if keep and OUT.exists() else [], rows)
    files.write(OUT, json.dumps(every, indent=1))
    return every


def images(text: str) -> int:
    """A batch as an argument: one image or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of images, 1 or more")
    return int(text)


def main() -> None:
    from bench import gpu_report
    from bench.layers import GPU_NETWORKS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", action="append", choices=GPU_NETWORKS, help="all by default")
    parser.add_argument("--batch", action="append", type=images, help="1, 8, 64 by default")
    parser.add_argument("--gpu", action="append", choices=[gpu.name for gpu in GPUS], help="all by default")
    parser.add_argument(
        "--peers", nargs="*", choices=("int8", "fp16"), help="dtypes of CUTLASS's kernels; all where it is installed"
    )
    parser.add_argument("--without", action="append", choices=PEERS, default=[], help="a peer that is not counted")
    parser.add_argument(
        "--add", action="store_true", help="keep the file's records of other networks, batches, GPUs, peers, dtypes"
    )
    parser.add_argument("--docs", type=Path, help="a Markdown file to put the tables into")
    arguments = parser.parse_args()
    dtypes = arguments.peers
    if dtypes is None:
        from tests.ptx.cute import headers

        dtypes = ["int8", "fp16"] if headers() else []
    gpus = [gpu for gpu in GPUS if not arguments.gpu or gpu.name in arguments.gpu]
    peers = [peer for peer in PEERS if peer not in arguments.without]
    gc.disable()  # parsed kernels are kept: going through them again and again takes a third of the time
    runs = list(itertools.product(arguments.network or GPU_NETWORKS, arguments.batch or (1, 8, 64)))
    rows: list[dict[str, Any]] = []
    every = rows
    for number, (network, batch) in enumerate(runs, 1):
        rows += records(network, batch, dtypes, gpus, peers)
        every = save(rows, arguments.add)
        minutes = sum(os.times()[:4]) / 60
        done = f"{number} of {len(runs)}: {network}, batch {batch}: {len(rows)} records, {len(every)} in the file"
        print(f"{done}, {minutes:.1f} minutes of CPU so far", flush=True)
    gpu_report.write(every, arguments.docs)


if __name__ == "__main__":
    main()
