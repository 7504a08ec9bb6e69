"""How long the emulator takes for whole layers: ``python -m bench.gpu_emulator``, single-threaded, the best of three runs.

The package's int8 kernels for an A100 on random numbers, all blocks: with nothing looked for besides bounds and alignment, and
with all checks, each with all counters.
"""

from __future__ import annotations

import argparse
import time

from bench.gpu_hardware import gpu_of
from bench.gpu_layers import planned
from bench.layers import GPU_NETWORKS, ConvShape, gpu_shapes
from tests import cuda_emulated as emulated
from tests.ptx import Checks, GlobalMemory, emulate, load

GEMM = ConvShape("gemm", "1024x1024x1024", 1, 1024, 32, 32, 1024, 1, 1, 1, 0, 1, 1)
BARE = Checks(races=False, initialised=False, blocks=False)
RUNS = 3


def seconds(shape: ConvShape, checks: Checks) -> float:
    """Of one run of a layer of one image, without compiling and parsing."""
    found = []
    for _ in range(RUNS):
        memory = GlobalMemory()
        plan, _ = planned(shape, 1, gpu_of("80").sms, memory, random=True)
        ptx = emulated.ptx_of(emulated.source_of(plan["kernel"]), "80")
        kernel, shared = load(ptx, emulated.entry_of(plan["kernel"], ptx)), emulated.shared_of(plan, "80")
        start = time.process_time()
        emulate(kernel, plan["grid"], plan["block"], [plan["params"]], shared=shared, memory=memory, checks=checks)
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=GPU_NETWORKS, default="resnet50")
    shapes = [GEMM, *gpu_shapes(parser.parse_args().network)]
    print(f"{'layer, one image':32} {'multiply-adds':>13} {'seconds':>8} {'all checks':>10}")
    slowest = [0.0, 0.0]
    for shape in shapes:
        both = [seconds(shape, checks) for checks in (BARE, Checks())]
        print(f"{shape.name:32} {shape.macs:13,} {both[0]:8.2f} {both[1]:10.2f}", flush=True)
        slowest = [max(pair) for pair in zip(slowest, both, strict=True)]
    print(f"{'slowest':46} {slowest[0]:8.2f} {slowest[1]:10.2f}")


if __name__ == "__main__":
    main()
