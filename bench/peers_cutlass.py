"""CUTLASS's convolutions and GEMMs on given shapes in the emulator, for the model: counts, not results."""

from __future__ import annotations

import math

import torch

from bench.cutlass_kernels import Variant, build, launch, plan
from bench.gpu_model import L1, Launch, sample_of, touched
from tests.ptx import Caches, Checks, GlobalMemory, Result

TORCH = {"int8": torch.int8, "int32": torch.int32, "fp16": torch.float16, "fp32": torch.float32}
NO_CHECKS = Checks(races=False, initialised=False, blocks=False)


def working(grid: tuple[int, int, int], rows: int, columns: int) -> list[int]:
    """Numbers of the blocks that have a tile: CUTLASS rounds the columns of a grid up, and the blocks past the last return.

    Args:
        grid: Blocks; ``x`` counts tiles of rows, and of columns so many as are taken together.
        rows, columns: Tiles.
    """
    together, rest = divmod(grid[0], rows)
    assert not rest and together * grid[1] >= columns, (grid, rows, columns)
    return [y * grid[0] + x for y in range(grid[1]) for x in range(grid[0]) if y * together + x % together < columns]


def _run(
    variant: Variant, sizes: list[int], tensors: list[torch.Tensor], size: tuple[int, int], read: float, most: int
) -> tuple[Result, Launch]:  # fmt: skip
    """``size`` is the output's, ``read`` what must be read of the first tensor."""
    memory = GlobalMemory()
    planned = plan(
        variant, sizes, [memory.pointer(t) for t in tensors] + [0] * (variant.source == "gemm" and not variant.sparse)
    )
    blocks = working(planned.grid, *(-(-v // t) for v, t in zip(size, (variant.tile.m, variant.tile.n), strict=True)))
    chosen = [blocks[i] for i in sample_of(len(blocks), most) or range(len(blocks))]
    result = launch(variant, planned, memory, chosen, checks=NO_CHECKS, caches=Caches(l1=L1))
    least = int(read) + sum(t.nbytes for t in tensors[1:])
    sweeps = planned.grid[1]  # CUTLASS's order of blocks goes over all rows for some columns at a time
    registers = build(variant).registers
    return result, Launch(
        len(blocks), planned.threads, registers, least, variant.dtype, int(read), sweeps, variant.sparse
    )  # fmt: skip


def run_conv(
    variant: Variant, batch: int, size: tuple[int, int], c: int, k: int, kernel: tuple[int, int], padding: int, stride: int,
    dilation: int = 1, most: int = 48,
) -> tuple[Result, Launch]:  # fmt: skip
    """Counts of a convolution of zeros (the values change nothing) by a sample of ``most`` blocks.

    Args:
        variant: A kernel with source "conv".
        batch, size, c: Of the input, NHWC.
        k, kernel, padding, stride, dilation: Of the convolution.
        most: Blocks that run of a large grid.
    """
    p, q = ((v + 2 * padding - dilation * (r - 1) - 1) // stride + 1 for v, r in zip(size, kernel, strict=True))
    read, written = TORCH[variant.dtype], TORCH[variant.output]
    x = torch.zeros(batch * size[0] * size[1] * c, dtype=read)
    weight = torch.zeros(k * kernel[0] * kernel[1] * c, dtype=read)
    bias, out = torch.zeros(k, dtype=written), torch.zeros(batch * p * q * k, dtype=written)
    share = math.prod(touched(v, r, stride) for v, r in zip(size, kernel, strict=True))
    sizes = [batch, *size, c, k, *kernel, padding, stride, dilation]
    return _run(variant, sizes, [x, weight, bias, out], (batch * p * q, k), share * x.nbytes, most)


def run_gemm(variant: Variant, m: int, n: int, k: int, most: int = 48) -> tuple[Result, Launch]:
    """Counts of (m, k) times (n, k) transposed, by a sample of ``most`` blocks; of a sparse one (m, k) is the sparse matrix."""
    read, written = TORCH[variant.dtype], TORCH[variant.output]
    a, b = torch.zeros(m * k // (1 + variant.sparse), dtype=read), torch.zeros(n * k, dtype=read)
    bias, out = torch.zeros(n, dtype=written), torch.zeros(m * n, dtype=written)
    tensors = [a, b, bias, out]
    if variant.sparse:  # 2 bits for each kept element
        size = a.nbytes // (8 if variant.dtype == "fp16" else 4)
        tensors.append(torch.full((size,), 0x44, dtype=torch.uint8))  # the first and the second of each four
    return _run(variant, [m, n, k], tensors, (m, n), a.nbytes, most)
