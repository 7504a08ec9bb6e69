"""What binds the int8 CUDA kernels, by the model of bench/gpu_model.py: modelled, not measured.

    python -m bench.gpu_limits                # a large product, and the mean over all pixels behind a network
    python -m bench.gpu_limits --bytes        # bytes from L2 and DRAM beside peers, of the records of bench.gpu_model

The first says which share of the tensor cores' peak a product of 4096 x 4096 x 4096 reaches, what each resource takes, and what
the product would take if one of them took no time: the most that can be gained there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu_hardware import GPUS, Gpu
from bench.gpu_layers import registers_of, run_layer, text_of
from bench.gpu_model import CALIBRATION, L1, LAUNCH, OUT, Launch, model
from bench.layers import ConvShape
from cnncomp import _cuda
from tests import cuda_emulated as emulated
from tests.ptx import Caches, GlobalMemory, emulate, load

SIZE = 4096
PRODUCT = ConvShape("product", "product", 1, SIZE, 64, SIZE // 64, SIZE, 1, 1, 1, 0, 1, 1)
Peer = tuple[str, str]
#: Peers of bench.gpu_model that bytes are compared with; of the package's own, the dense int8 kernels.
PEERS: tuple[Peer, ...] = (("cutlass", "int8"), ("cutlass", "fp16"), ("inductor", "fp16"))


def without(found: dict[str, Any], resource: str) -> float:
    """Microseconds of a modelled kernel if a resource took no time."""
    norm, limits = CALIBRATION.norm, found["bounds_us"]
    joined: float = sum(us**norm for name, us in limits.items() if name != resource) ** (1 / norm)
    return joined + LAUNCH * 1e6


def product(gpu: Gpu) -> str:
    """One line on the large product on a GPU, and one for each resource."""
    counted, kernel = run_layer(PRODUCT, 1, gpu.code, gpu)
    found = model(*counted, gpu)
    ideal = 2 * PRODUCT.macs / gpu.int8_peak * 1e6
    lines = [
        f"{gpu.name}, {SIZE}^3, {kernel}: {found['us']:.1f} us, {ideal / found['us']:.1%} of the peak; bounds in us, and"
    ]
    lines += [
        f"  {name:8} {us:6.1f}   without it {without(found, name):6.1f} us, {ideal / without(found, name):.1%}"
        for name, us in sorted(found["bounds_us"].items(), key=lambda item: -item[1])
    ]
    return "\n".join(lines)


def mean_pool(gpu: Gpu, batch: int, channels: int = 2048, size: int = 7) -> float:
    """Microseconds of the kernel that takes the mean of each channel of float32 images."""
    x, out = torch.zeros(batch * channels * size * size), torch.zeros(batch * channels)
    memory = GlobalMemory()
    plan = _cuda.plan_mean_pool2d(
        memory.pointer(x), emulated.DTYPE_CODE[x.dtype], batch, size, size, channels, memory.pointer(out)
    )
    kernel = load(text_of(plan["kernel"], gpu.code))
    result = emulate(
        kernel, plan["grid"], plan["block"], [plan["params"]], shared=0, memory=memory, caches=Caches(l1=L1)
    )
    registers = registers_of(plan["kernel"], gpu.code)
    return float(
        model(result, Launch(math.prod(plan["grid"]), plan["block"], registers, x.nbytes + out.nbytes), gpu)["us"]
    )


def read(path: Path) -> list[dict[str, Any]]:
    """Records of ``python -m bench.gpu_model``, of dense kernels whose bytes were counted."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return [row for row in rows if row["pattern"] == "dense" and "l2" in row["bounds_us"]]


def moved(row: dict[str, Any]) -> dict[str, float]:
    """Bytes from the L2 and from DRAM that a record's bounds stand for."""
    gpu = next(gpu for gpu in GPUS if gpu.name == row["gpu"])
    l2 = CALIBRATION.l2 * gpu.l2_bytes_per_clock * gpu.clock * 1e9
    return {
        "l2": row["bounds_us"]["l2"] * 1e-6 * l2,
        "dram": row["bounds_us"]["dram"] * 1e-6 * CALIBRATION.dram * gpu.dram,
    }


def ratios(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each network, GPU, batch and peer: bytes of the package's kernels, with 8-bit inputs and outputs, over the peer's, of
    all layers that the peer has, as often as the network has them; and what these take in microseconds."""
    groups: dict[tuple[str, str, int], dict[str, dict[Any, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        groups[row["network"], row["gpu"], row["batch"]][row["layer"]][row["peer"], row["dtype"]] = row
    lines = [
        f"{'network':14} {'GPU':10} {'batch':>5} {'beside':14} {'layers':>6} "
        f"{'L2':>5} {'DRAM':>5} {'both':>5} {'<= 0.55':>7} {'us':>6}"
    ]
    for (network, gpu, batch), layers in groups.items():
        for peer in PEERS:
            pairs = [
                (found[None, "int8"], found[peer])
                for found in layers.values()
                if {(None, "int8"), peer} <= found.keys()
            ]
            if not pairs:
                continue
            sums = {
                part: [sum(pair[i]["count"] * moved(pair[i])[part] for pair in pairs) for i in (0, 1)]
                for part in ("l2", "dram")
            }
            sums["both"] = [a + b for a, b in zip(*sums.values(), strict=True)]
            few = sum(sum(moved(own).values()) <= 0.55 * sum(moved(other).values()) for own, other in pairs)
            us = sum(own["count"] * own["us"] for own, _ in pairs)
            text = " ".join(f"{own / other:5.2f}" for own, other in sums.values())
            lines.append(f"{network:14} {gpu:10} {batch:5} {' '.join(peer):14} {len(pairs):6} {text} {few:7} {us:6.0f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bytes", action="store_true", help="compare bytes of the records instead")
    parser.add_argument("--records", type=Path, default=OUT)
    parser.add_argument("--gpu", action="append", choices=[gpu.name for gpu in GPUS], help="A100 and H100 by default")
    arguments = parser.parse_args()
    if arguments.bytes:
        print("\n".join(ratios(read(arguments.records))))
        return
    for gpu in (gpu for gpu in GPUS if gpu.name in (arguments.gpu or ["A100", "H100"])):
        print(product(gpu), flush=True)
        for batch in (1, 8, 64):
            print(
                f"  mean of 2048 x 7 x 7, batch {batch}: {mean_pool(gpu, batch):.1f} us with the launch's {LAUNCH * 1e6:.0f}"
            )


if __name__ == "__main__":
    main()
