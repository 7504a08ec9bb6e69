"""Convolution with block sparse weights: the implicit GEMM of :mod:`cnncomp.kernels.conv2d_int8` over the kept blocks alone.

A program has a row of blocks and a tile of pixels. It walks the steps that :func:`cnncomp.sparsity.steps.pack_steps` made: a
step's values are a tile of the right side, its places say which channels of which taps they belong to. Runs of many outputs by
one to four inputs (1xV) and rectangles differ in how many neighbouring channels a place stands for, and in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cnncomp.kernels.conv2d_int8 import MOST_TAPS, _out_size, _pixel
from cnncomp.kernels.epilogue import store_both
from cnncomp.kernels.launch import Tile, cdiv, device_guard
from cnncomp.kernels.products import operand
from cnncomp.sparsity import vectors
from cnncomp.sparsity.steps import DEPTH_BYTES, Steps

STAGES = 5
_MOST_TAPS = tl.constexpr(MOST_TAPS)


@triton.jit
def _inside_bits(row_real, h0, w0, h, w, dil_h, dil_w, R: tl.constexpr, S: tl.constexpr, M: tl.constexpr):
    """A bit per tap for each of M pixels: whether the tap is inside the image; one more stays zero."""
    BITS: tl.constexpr = tl.int32 if R * S < 32 else tl.int64
    across = tl.zeros((M,), dtype=BITS)
    for s in tl.static_range(S):
        wi = w0 + s * dil_w
        across |= ((wi >= 0) & (wi < w)).to(BITS) << s
    inside = tl.zeros((M,), dtype=BITS)
    for r in tl.static_range(R):
        hi = h0 + r * dil_h
        inside |= tl.where(row_real & (hi >= 0) & (hi < h), across << (r * S), 0)
    return inside


@triton.jit
def conv2d_steps_kernel(
    x_ptr, values_ptr, places_ptr, first_ptr, sums_ptr, constants_ptr, residual_ptr, out_ptr, residual_scale, lo, out_factor,
    n, h, w, c, k, p, q, c_group, k_group, blocks, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Images NHWC, or with UNIT > 1 (C, N / UNIT, H, W, UNIT); output NHWC. Grid: (tiles of pixels, rows of blocks)."""
    N: tl.constexpr = ROWS // 2  # columns of a half
    PIECES: tl.constexpr = BLOCK_K // COLS
    SUMS: tl.constexpr = tl.int32 if values_ptr.dtype.element_ty == tl.int8 else tl.float32
    block, group = tl.program_id(1), tl.program_id(1) // blocks
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = tl.cdiv(n, UNIT)
    exists = index // UNIT < units * p * q
    unit, h0, w0 = _pixel(index // UNIT, p, q, stride_h, stride_w, pad_h, pad_w)
    image = unit * UNIT + index % UNIT
    pixel_step = c if UNIT == 1 else UNIT
    channel_step = 1 if UNIT == 1 else units * h * w * UNIT
    x_base = x_ptr + ((unit.to(tl.int64) * h + h0) * w + w0) * pixel_step + index % UNIT
    x_base += group.to(tl.int64) * c_group * channel_step
    kk, half = tl.arange(0, BLOCK_K), tl.arange(0, N)
    BITS: tl.constexpr = R * S < _MOST_TAPS
    if BITS:
        inside = _inside_bits(exists, h0, w0, h, w, dil_h, dil_w, R, S, BLOCK_M)

    first, last = tl.load(first_ptr + block), tl.load(first_ptr + block + 1)
    acc = tl.zeros((BLOCK_M, N), dtype=SUMS)
    other = tl.zeros((BLOCK_M, N), dtype=SUMS)
    values_at = values_ptr + first.to(tl.int64) * (ROWS * BLOCK_K) + half[None, :] * BLOCK_K + kk[:, None]
    places_at = places_ptr + first * PIECES + kk // COLS
    for _ in range(first, last):
        place = tl.max_constancy(tl.load(places_at), COLS)
        r, s = place >> 4 & 15, place & 15
        channel = (place >> 8) * COLS + kk % COLS
        real = place >= 0
        if not WHOLE:
            real = real & (channel < c_group)
        if BITS:  # one that is never set stands for what is filled up
            here = (inside[:, None] >> tl.where(real, r * S + s, R * S)[None, :]) & 1 != 0
        else:
            hi, wi = h0[:, None] + (r * dil_h)[None, :], w0[:, None] + (s * dil_w)[None, :]
            here = (real[None, :] & exists[:, None]) & (hi >= 0) & (hi < h) & (wi >= 0) & (wi < w)
        offset = channel * channel_step + r * (dil_h * w * pixel_step) + s * (dil_w * pixel_step)
        a = operand(tl.load(x_base[:, None] + offset[None, :], mask=here, other=0))
        b, b_other = tl.load(values_at), tl.load(values_at + N * BLOCK_K)
        acc = tl.dot(a, b, acc=acc, out_dtype=SUMS)
        other = tl.dot(a, b_other, acc=other, out_dtype=SUMS)
        values_at += ROWS * BLOCK_K
        places_at += PIECES
    if x_ptr.dtype.element_ty == tl.uint8:
        acc += tl.load(sums_ptr + block * ROWS + half)[None, :]
        other += tl.load(sums_ptr + block * ROWS + N + half)[None, :]

    row = index if UNIT == 1 else image * (p * q) + index // UNIT % (p * q)
    column = (block % blocks) * ROWS + half
    store_both(
        acc, other, constants_ptr, residual_ptr, out_ptr, row, group * k_group + column, (exists & (image < n))[:, None],
        column < k_group, column + N < k_group, k, residual_scale, lo, out_factor, N, "",
    )  # fmt: skip


def tile_for(rows: int, itemsize: int) -> Tile:
    """The tile of blocks of so many outputs. Its stages are split between two copies of which one waits for the other, places
    and what they point at: five of them keep as many copies of activations in flight as three of the dense kernel."""
    return Tile(128 if rows >= 32 else 64, rows, DEPTH_BYTES // itemsize, 4, STAGES)


def conv2d_steps(
    x: Tensor,
    weight: Steps,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out_dtype: torch.dtype,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Convolution with block sparse weights and the fused epilogue. No synchronisation; allocates the output, and a copy of
    the input where it lies otherwise.

    Args:
        x: (N, C, H, W) uint8 or int8 beside int8 weights, or of the weights' dtype; channels_last. Where a place is one
            channel, in units (:func:`cnncomp.sparsity.vectors.to_units`), so that neighbouring images are copied at once.
        weight: From :func:`cnncomp.sparsity.steps.view_steps`.
        constants: (3, K) float32: scale, bias, hi.
        residual: Shape of the output, uint8, int8, float32, float16 or bfloat16; or None.
        residual_scale: Factor of the residual.
        lo: Lower clamp.
        kernel_size, stride, padding, dilation: (vertical, horizontal).
        groups: G.
        out_dtype: uint8, int8, float32, float16 or bfloat16.
        tile: Overrides the rule that picks one.

    Returns:
        (N, K, P, Q) of ``out_dtype``, channels_last.
    """
    (rows, depth), pieces = weight.values.shape[1:], weight.places.shape[1]
    (n, c, h, w), k, (r, s) = vectors.image_shape(x) if x.dim() == 5 else x.shape, constants.shape[1], kernel_size
    p = _out_size(h, r, stride[0], padding[0], dilation[0])
    q = _out_size(w, s, stride[1], padding[1], dilation[1])
    out = torch.empty((n, k, p, q), dtype=out_dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    unit = vectors.UNIT if pieces == depth else 1
    if x.dim() == 4:
        x = vectors.to_units(x) if pieces == depth else x.contiguous(memory_format=torch.channels_last)
    blocks = (len(weight.first) - 1) // groups
    tile = tile or tile_for(rows, weight.values.itemsize)
    grid = (cdiv(cdiv(n, unit) * unit * p * q, tile.block_m), groups * blocks)
    with device_guard(x):
        conv2d_steps_kernel[grid](
            x, weight.values, weight.places, weight.first, weight.sums, constants.contiguous(), residual, out,
            residual_scale, lo, 1.0, n, h, w, c, k, p, q, c // groups, k // groups, blocks, *stride, *padding, *dilation,
            R=r, S=s, ROWS=rows, COLS=depth // pieces, UNIT=unit, WHOLE=c // groups % (depth // pieces) == 0,
            BLOCK_M=tile.block_m, BLOCK_K=depth,
            **tile.options(),
        )  # fmt: skip
    return out
