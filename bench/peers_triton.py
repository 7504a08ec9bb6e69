"""A plain implicit-GEMM convolution in Triton, as one writes it first: a peer for the model.

Beside inductor's template (bench/peers_inductor.py) it is what has int8 for all convolutions.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from bench.gpu_model import L1, Launch, sample_of, touched
from tests.ptx import Caches, Checks, GlobalMemory, Result, emulate, load
from tests.triton_aot import compile_kernel, registers_and_stack

#: block m, n, k in bytes, warps, stages.
TILES = ((128, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (128, 128, 64, 8, 3))


@triton.jit
def conv_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, m, h, w, c, k, p, q, stride, pad,
    R: tl.constexpr, S: tl.constexpr, INT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Images NHWC times weights (k, R, S, c); scale, bias and ReLU. Grid: tiles of pixels, tiles of channels."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    kk = tl.arange(0, BLOCK_K)
    top, left = (row // q % p) * stride - pad, (row % q) * stride - pad
    base = row // (p * q) * h
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INT8 else tl.float32)
    for tap in range(R * S):
        y, x = top + tap // S, left + tap % S
        inside = (row < m) & (y >= 0) & (y < h) & (x >= 0) & (x < w)
        at = ((base + y) * w + x) * c
        for start in range(0, c, BLOCK_K):
            channel = start + kk
            a = tl.load(x_ptr + at[:, None] + channel[None, :], mask=inside[:, None] & (channel < c)[None, :], other=0)
            b_at = column[None, :] * (R * S * c) + (tap * c + channel)[:, None]
            b = tl.load(weight_ptr + b_at, mask=(column < k)[None, :] & (channel < c)[:, None], other=0)
            acc = tl.dot(a, b, acc=acc, out_dtype=tl.int32 if INT8 else tl.float32)
    value = acc.to(tl.float32) * tl.load(scale_ptr + column, mask=column < k)[None, :]
    value = tl.maximum(value + tl.load(bias_ptr + column, mask=column < k)[None, :], 0.0)
    if INT8:
        value = (tl.minimum(value, 127.0) + 12582912.0) - 12582912.0  # to the nearest integer: 1.5 * 2 ** 23
    out_at = row[:, None] * k + column[None, :]
    tl.store(out_ptr + out_at, value.to(out_ptr.dtype.element_ty), mask=(row < m)[:, None] & (column < k)[None, :])


class Built(NamedTuple):
    ptx: str
    shared: int
    registers: int


@cache
def build(dtype: str, kernel: tuple[int, int], tile: tuple[int, ...], aligned: bool) -> Built:
    """Compile for sm_80.

    Args:
        dtype: "int8" or "fp16".
        kernel: Rows and columns of the taps.
        tile: One of TILES.
        aligned: Channels are multiples of 16.
    """
    element = {"int8": "i8", "fp16": "fp16"}[dtype]
    pointers: dict[str, str | None] = {"x_ptr": element, "weight_ptr": element, "out_ptr": element}
    pointers |= {"scale_ptr": "fp32", "bias_ptr": "fp32"}
    integers = {name: aligned and name in "ck" for name in ("m", "h", "w", "c", "k", "p", "q", "stride", "pad")}
    m, n, k, warps, stages = tile
    meta = {"R": kernel[0], "S": kernel[1], "INT8": dtype == "int8", "BLOCK_M": m, "BLOCK_N": n}
    meta["BLOCK_K"] = k if dtype == "int8" else k // 2
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = compile_kernel(conv_kernel, pointers, integers, (), meta, 80, options)
    return Built(compiled.asm["ptx"], compiled.metadata.shared, registers_and_stack(compiled)[0])


def run_conv(
    dtype: str, tile: tuple[int, ...], x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor,
    stride: int, padding: int, most: int | None = None,
) -> tuple[torch.Tensor, Result, Launch]:  # fmt: skip
    """Run in the emulator.

    Args:
        dtype: "int8" or "fp16".
        tile: One of TILES.
        x: (n, h, w, c).
        weight: (k, r, s, c).
        scale, bias: (k,) in fp32.
        stride, padding: Of both axes.
        most: Blocks that run of a large grid, without checks; None runs all with all checks.

    Returns:
        The output (n, p, q, k), counts, and the launch.
    """
    n, h, w, c = x.shape
    k, r, s, _ = weight.shape
    p, q = (h + 2 * padding - r) // stride + 1, (w + 2 * padding - s) // stride + 1
    out = torch.zeros(n, p, q, k, dtype=x.dtype)
    built = build(dtype, (r, s), tile, c % 16 == 0 and k % 16 == 0)
    m = n * p * q
    grid = (-(-m // tile[0]), -(-k // tile[1]))
    options: dict[str, Any] = {}
    if most is not None:
        checks = Checks(races=False, initialised=False, blocks=False)
        options = {"blocks": sample_of(math.prod(grid), most), "checks": checks, "caches": Caches(l1=L1)}
    arguments = [x, weight, scale, bias, out, m, h, w, c, k, p, q, stride, padding]
    result = emulate(
        load(built.ptx), grid, 32 * tile[3], arguments, shared=built.shared, memory=GlobalMemory(), **options
    )
    read = int(touched(h, r, stride) * touched(w, s, stride) * x.nbytes)
    least = read + weight.nbytes + out.nbytes
    return out, result, Launch(math.prod(grid), 32 * tile[3], built.registers, least, dtype, read, grid[1])
