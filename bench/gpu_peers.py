"""What stands beside this project's kernels in the model: CUTLASS's tiles, Triton, and a bound where wgmma would be.

CUTLASS's convolution fuses bias and ReLU but one scale only; what scales each channel is a pass of its own
(:func:`requantize_pass`), which records keep apart. Channels are rounded up to what its vectors take, and the rounding costs it
nothing. It has no int8 kernel for depthwise convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from bench.cutlass_kernels import Tile, Variant, _digest
from bench.gpu_counts import Counted, counted
from bench.gpu_hardware import Gpu
from bench.gpu_layers import BLOCKS, out_size
from bench.gpu_model import CALIBRATION, L1, LAUNCH, Launch, touched
from bench.layers import ConvShape
from bench.peers_cutlass import run_conv, run_gemm
from tests.ptx import Result

#: m, n, stages, warp m, warp n. The only list of CUTLASS's tiles: the best is taken for each layer, GPU and batch.
TILES = ((128, 128, 4, 64, 64), (256, 64, 4, 64, 64), (128, 64, 5, 64, 32), (64, 128, 5, 32, 64), (64, 64, 5, 32, 32))
SPARSE_TILES = ((128, 128, 3, 64, 64), (128, 64, 3, 64, 32))  # of the 2:4 GEMM
STEP = {"int8": 64, "fp16": 32}  # elements of the reduction per stage
VECTOR = {"int8": 16, "fp16": 8}
SUMS = {"int8": "int32", "fp16": "fp32"}
FEW = 4  # channels that the iterators for few channels read: the stem's three and a zero
WGMMA_SHARE = 0.75  # of Hopper's peak, where no kernel is counted that uses its instructions


class Candidate(NamedTuple):
    """A peer's kernel on a layer."""

    kernel: str
    peer: str
    dtype: str
    pattern: str
    counted: Counted


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _variant(dtype: str, tile: tuple[int, ...], arch: str, c: int) -> Variant:
    m, n, stages, warp_m, warp_n = tile
    few = c < 8
    return Variant(
        "conv", dtype, Tile(m, n, STEP[dtype], 2 if arch == "75" else stages, warp_m, warp_n), dtype, SUMS[dtype],
        iterator="kFixedChannels" if few else "kOptimized", alignment=FEW if few else VECTOR[dtype], arch=arch,
    )  # fmt: skip


def conv_variants(shape: ConvShape, batch: int, arch: str, dtype: str) -> Iterator[tuple[Variant, tuple[int, ...]]]:
    """CUTLASS's kernel with each tile, and its sizes: n, h, w, c, k, r, s, padding, stride, dilation."""
    c = FEW if shape.c < 8 else _up(shape.c, VECTOR[dtype])
    for tile in TILES:
        variant = _variant(dtype, tile, arch, c)
        k = _up(shape.k, variant.vector)
        yield variant, (batch, shape.h, shape.w, c, k, shape.r, shape.s, shape.padding, shape.stride, shape.dilation)


def conv_candidates(shape: ConvShape, batch: int, arch: str, dtype: str) -> Iterator[Candidate]:
    """CUTLASS's convolution with each tile; none for a depthwise or grouped layer."""
    if shape.groups > 1:
        return
    for variant, (_, h, w, c, k, r, s, padding, stride, _) in conv_variants(shape, batch, arch, dtype):
        sizes = (batch, (h, w), c, k, (r, s), padding, stride)
        key = (_digest(), variant, sizes, BLOCKS, "of those with a tile", L1)
        found = counted(key, lambda v=variant, s=sizes: run_conv(v, *s, most=BLOCKS))  # type: ignore[misc]
        yield Candidate(variant.name, "cutlass", dtype, "dense", found)


def triton_candidates(shape: ConvShape, batch: int, dtype: str) -> Iterator[Candidate]:
    """The plain Triton convolution with each of its tiles (code for sm_80); none for a depthwise or grouped layer."""
    from bench import peers_triton

    if shape.groups > 1:
        return
    kind = torch.int8 if dtype == "int8" else torch.float16

    def run(tile: tuple[int, ...]) -> tuple[Result, Launch]:
        x = torch.zeros(batch, shape.h, shape.w, shape.c, dtype=kind)
        weight, ones = torch.zeros(shape.k, shape.r, shape.s, shape.c, dtype=kind), torch.ones(shape.k)
        where = shape.stride, shape.padding
        _, result, launch = peers_triton.run_conv(dtype, tile, x, weight, ones, ones, *where, most=BLOCKS)
        return result, launch

    source = Path(peers_triton.__file__).read_text()
    for tile in peers_triton.TILES:
        key = (source, triton.__version__, dtype, tile, shape, batch, BLOCKS, L1)
        found = counted(key, lambda tile=tile: run(tile))  # type: ignore[misc]
        name = "triton_conv_{}_{}x{}_{}".format(dtype, *tile)
        yield Candidate(name, "triton", dtype, "dense", found)


def inductor_candidates(shape: ConvShape, batch: int, dtype: str) -> Iterator[Candidate]:
    """Inductor's template with each tile that may be the fastest (code for sm_80): in int8 it has products alone."""
    from bench import peers_inductor as inductor

    problem = inductor.Problem.of(shape, batch, dtype)
    if shape.groups > 1 or shape.dilation > 1 or (dtype == "int8" and not problem.product):
        return

    def run(tile: inductor.Tile) -> tuple[Result, Launch]:
        kind = torch.int8 if dtype == "int8" else torch.float16
        x = torch.zeros(batch, shape.h, shape.w, shape.c, dtype=kind)
        weight, ones = torch.zeros(shape.k, shape.r, shape.s, shape.c, dtype=kind), torch.ones(shape.k)
        bias = ones if dtype == "int8" else ones.half()
        return inductor.run(problem, tile, x, weight, ones, bias, most=BLOCKS)[1:]

    for tile in inductor.tiles(problem):
        key = (inductor.rendered(problem, tile), triton.__version__, problem, tile, BLOCKS, L1)
        found = counted(key, lambda tile=tile: run(tile))  # type: ignore[misc]
        yield Candidate(inductor.name_of(problem, tile), "inductor", dtype, "dense", found)


def sparse_candidates(shape: ConvShape, batch: int) -> Iterator[Candidate]:
    """CUTLASS's 2:4 GEMM (int8, sm_80) where a layer is a matrix product: the filters are its sparse left side.

    In whole tiles of rows, since rows past the end have no metadata, which the emulator refuses to multiply by.
    """
    if (shape.r, shape.s, shape.stride, shape.groups) != (1, 1, 1, 1):
        return
    for m, n, stages, warp_m, warp_n in SPARSE_TILES:
        variant = Variant("gemm", "int8", Tile(m, n, 128, stages, warp_m, warp_n), "int8", "int32", sparse=True)
        sizes = (_up(shape.k, m), _up(batch * shape.h * shape.w, 16), _up(shape.c, 128))
        key = (_digest(), variant, sizes, BLOCKS, "of those with a tile", L1)
        found = counted(key, lambda v=variant, s=sizes: run_gemm(v, *s, most=BLOCKS))  # type: ignore[misc]
        yield Candidate(variant.name, "cutlass", "int8", "2:4", found)


def wgmma_bound(shape: ConvShape, batch: int, gpu: Gpu, dtype: str) -> dict[str, Any]:
    """A time that no kernel has been counted for: so much of Hopper's peak, or of its memory; nothing of tiles is wasted."""
    size = 1 if dtype == "int8" else 2
    rate = gpu.int8_ops if dtype == "int8" else gpu.fp16_ops
    tensor = 2 * batch * shape.macs / (WGMMA_SHARE * rate * gpu.sms * gpu.clock * 1e9)
    share = math.prod(touched(v, r, shape.stride) for v, r in ((shape.h, shape.r), (shape.w, shape.s)))
    moved = share * batch * shape.h * shape.w * shape.c + shape.k * shape.geometry.reduction
    dram = size * (moved + batch * math.prod(out_size(shape)) * shape.k) / gpu.dram
    limits = {"tensor": tensor, "dram": dram}
    binding = max(limits, key=lambda name: limits[name])
    return {
        "us": (limits[binding] + LAUNCH) * 1e6,
        "bound": binding,
        "bounds_us": {k: v * 1e6 for k, v in limits.items()},
    }


def requantize_pass(shape: ConvShape, batch: int, gpu: Gpu) -> float:
    """Microseconds of a kernel that reads a layer's 32-bit sums and writes 8 bit, scaled per channel.

    At the memory's speed, the L2's where both fit. That the convolution before it writes four times as much is not charged.
    """
    elements = batch * math.prod(out_size(shape)) * shape.k
    fits = 5 * elements <= gpu.l2
    speed = CALIBRATION.l2 * gpu.l2_bytes_per_clock * gpu.clock * 1e9 if fits else CALIBRATION.dram * gpu.dram
    return (5 * elements / speed + LAUNCH) * 1e6
