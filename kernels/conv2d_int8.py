"""int8 convolution as an implicit GEMM over NHWC images, and a direct kernel where a group has one input channel.

GEMM view of one group: m = n*p*q output pixels, K/G output channels, R*S*C/G products. The image matrix is never built: each
row knows its pixel, each column its tap and channel, and taps outside the image read as zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cnncomp.kernels.epilogue import store_both, store_epilogue
from cnncomp.kernels.launch import Tile, cdiv, choose_tile, device_guard, in_words
from cnncomp.kernels.products import flip_correction, operand

#: Groups with fewer channels walk taps and channels as one index: whole tiles of channels would be mostly padding.
FLAT_BELOW = 32
#: And kernels with more taps, which have no bit each.
MOST_TAPS = 64
#: Its tile: every element has a tap of its own to check, which takes registers, so more warps share them.
FLAT_TILE = Tile(64, 64, 32, 8, 2)


@triton.jit
def _pixel(row, p, q, stride_h, stride_w, pad_h, pad_w):
    """Image, and input position of tap (0, 0), of an output pixel given by its flat index."""
    image = row // (p * q)
    rest = row % (p * q)
    return image, (rest // q) * stride_h - pad_h, (rest % q) * stride_w - pad_w


@triton.jit
def _walk_taps(
    x_base, weight_base, other_base, row_real, real, other_real, h0, w0, h, w, c, c_group, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of two times N columns, a tap at a time: pointers move on by scalars, and a bit per tap says what is inside."""
    kk = tl.arange(0, BLOCK_K)
    BITS: tl.constexpr = tl.int32 if R * S <= 32 else tl.int64
    inside = tl.zeros((M,), dtype=BITS)
    for tap in tl.static_range(R * S):
        hi = h0 + (tap // S) * dil_h
        wi = w0 + (tap % S) * dil_w
        bit = (row_real & (hi >= 0) & (hi < h) & (wi >= 0) & (wi < w)).to(BITS)
        inside |= bit << tap
    acc = tl.zeros((M, N), dtype=tl.int32)
    other = tl.zeros((M, N), dtype=tl.int32)
    x_at = x_base[:, None] + kk[None, :]
    weight_at = weight_base[None, :] + kk[:, None]
    other_at = other_base[None, :] + kk[:, None]
    left = c_group
    column = 0
    for _ in range(R * S * tl.cdiv(c_group, BLOCK_K)):
        cc = kk < left
        a = tl.load(x_at, mask=((inside & 1) != 0)[:, None] & cc[None, :], other=0)
        b = tl.load(weight_at, mask=real[None, :] & cc[:, None], other=0)
        b_other = tl.load(other_at, mask=other_real[None, :] & cc[:, None], other=0)
        a = operand(a)
        acc = tl.dot(a, b, acc=acc, out_dtype=tl.int32)
        other = tl.dot(a, b_other, acc=other, out_dtype=tl.int32)
        step = tl.minimum(left, BLOCK_K)
        left -= step
        weight_at += step
        other_at += step
        tap_done = left == 0
        row_done = tap_done & (column == S - 1)
        x_at += (
            tl.where(row_done, (dil_h * w - (S - 1) * dil_w) * c, tl.where(tap_done, dil_w * c, c_group))
            - c_group
            + step
        )
        inside = inside >> tap_done.to(BITS)
        column = tl.where(row_done, 0, column + tap_done.to(tl.int32))
        left = tl.where(tap_done, c_group, left)
    return acc, other


@triton.jit
def _walk_products(
    x_base, weight_base, other_base, row_real, real, other_real, h0, w0, h, w, c, c_group, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same where taps have few channels: a step takes products of several taps, each element with its own."""
    kk = tl.arange(0, BLOCK_K)
    acc = tl.zeros((M, N), dtype=tl.int32)
    other = tl.zeros((M, N), dtype=tl.int32)
    for step in range(tl.cdiv(R * S * c_group, BLOCK_K)):
        index = step * BLOCK_K + kk
        down, right = (index // c_group // S) * dil_h, (index // c_group % S) * dil_w
        hi = h0[:, None] + down[None, :]
        wi = w0[:, None] + right[None, :]
        exists = index < R * S * c_group
        inside = row_real[:, None] & (hi >= 0) & (hi < h) & (wi >= 0) & (wi < w) & exists[None, :]
        offset = (down * w + right) * c + index % c_group
        a = operand(tl.load(x_base[:, None] + offset[None, :], mask=inside, other=0))
        b = tl.load(weight_base[None, :] + index[:, None], mask=real[None, :] & exists[:, None], other=0)
        b_other = tl.load(other_base[None, :] + index[:, None], mask=other_real[None, :] & exists[:, None], other=0)
        acc = tl.dot(a, b, acc=acc, out_dtype=tl.int32)
        other = tl.dot(a, b_other, acc=other, out_dtype=tl.int32)
    return acc, other


@triton.jit
def conv2d_int8_kernel(
    x_ptr, weight_ptr, constants_ptr, residual_ptr, out_ptr, residual_scale, lo, out_factor,
    m, h, w, c, k, p, q, c_group, k_group,
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr, FLAT: tl.constexpr, WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Images NHWC, weight (k, R, S, c_group). Grid: (tiles of pixels x tiles of a group's channels, groups)."""
    UNSIGNED: tl.constexpr = x_ptr.dtype.element_ty == tl.uint8
    N: tl.constexpr = BLOCK_N // 2  # columns of a half
    tiles_m = tl.cdiv(m, BLOCK_M)
    group = tl.program_id(1)
    row = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, N)
    channel, real, other_real = group * k_group + column, column < k_group, column + N < k_group
    image, h0, w0 = _pixel(row, p, q, stride_h, stride_w, pad_h, pad_w)
    x_base = x_ptr + ((image.to(tl.int64) * h + h0) * w + w0) * c + group * c_group
    products = R * S * c_group
    weight_base = weight_ptr + channel.to(tl.int64) * products
    other_base = weight_ptr + (channel + N).to(tl.int64) * products

    walk: tl.constexpr = _walk_products if FLAT else _walk_taps
    acc, other = walk(
        x_base, weight_base, other_base, row < m, real, other_real, h0, w0, h, w, c, c_group, dil_h, dil_w,
        R, S, BLOCK_M, N, BLOCK_K,
    )  # fmt: skip
    acc += flip_correction(weight_ptr, channel, real, products, UNSIGNED, WORDS, N)[None, :]
    other += flip_correction(weight_ptr, channel + N, other_real, products, UNSIGNED, WORDS, N)[None, :]

    store_both(
        acc, other, constants_ptr, residual_ptr, out_ptr, row, channel, (row < m)[:, None], real, other_real, k,
        residual_scale, lo, out_factor, N, ACTIVATION,
    )  # fmt: skip


@triton.jit
def depthwise_int8_kernel(
    x_ptr,
    weight_ptr,
    constants_ptr,
    residual_ptr,
    out_ptr,
    residual_scale,
    lo,
    out_factor,
    m,
    h,
    w,
    c,
    k,
    p,
    q,
    k_group,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    R: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """One input channel a group, weight (k, R, S, 1): no products to share, so plain multiply-adds in int32."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    image, h0, w0 = _pixel(row, p, q, stride_h, stride_w, pad_h, pad_w)
    x_base = x_ptr + (((image.to(tl.int64) * h + h0) * w + w0) * c)[:, None] + (channel // k_group)[None, :]
    mask = (row < m)[:, None] & (channel < k)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for tap in range(R * S):
        hi = h0 + (tap // S) * dil_h
        wi = w0 + (tap % S) * dil_w
        inside = (hi >= 0) & (hi < h) & (wi >= 0) & (wi < w)
        x_offset = ((tap // S) * dil_h * w + (tap % S) * dil_w) * c
        a = tl.load(x_base + x_offset, mask=mask & inside[:, None], other=0)
        b = tl.load(weight_ptr + channel.to(tl.int64) * (R * S) + tap, mask=channel < k, other=0)
        acc += a.to(tl.int32) * b.to(tl.int32)[None, :]
    offset = row.to(tl.int64)[:, None] * k + channel[None, :]
    store_epilogue(
        acc, constants_ptr, residual_ptr, out_ptr, offset, mask, channel, k, residual_scale, lo, out_factor, ACTIVATION
    )


#: Tile of the direct kernel: pixels x channels; a warp reads 32 neighbouring channels of an NHWC pixel.
DEPTHWISE_TILE = Tile(32, 64, 0, 4, 2)


def _out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv2d_int8(
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out_dtype: torch.dtype,
    activation: str = "",
    out_factor: float = 1.0,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """int8 convolution with the fused epilogue. No synchronisation; allocates only the output.

    Args:
        x: (N, C, H, W) uint8 or int8; channels_last, or it is copied.
        weight: (K, R, S, C/G) int8.
        constants: (3, K) float32: scale, bias, hi.
        residual: Shape of the output, uint8, int8, float32, float16 or bfloat16; or None.
        residual_scale: Factor of the residual.
        lo: Lower clamp.
        stride, padding, dilation: (vertical, horizontal).
        groups: G.
        out_dtype: uint8, int8, float32, float16 or bfloat16.
        activation: "silu", "hardswish" or "".
        out_factor: Behind the activation, before the clamp.
        tile: Overrides the rule that picks one.

    Returns:
        (N, K, P, Q) of ``out_dtype``, channels_last.
    """
    n, c, h, w = x.shape
    k, r, s, c_group = weight.shape
    p = _out_size(h, r, stride[0], padding[0], dilation[0])
    q = _out_size(w, s, stride[1], padding[1], dilation[1])
    out = torch.empty((n, k, p, q), dtype=out_dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    x, weight = x.contiguous(memory_format=torch.channels_last), weight.contiguous()
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    m, k_group = n * p * q, k // groups
    tensors = (x, weight, constants.contiguous(), residual, out, residual_scale, lo, out_factor)
    geometry = (*stride, *padding, *dilation)
    with device_guard(x):
        if c_group == 1 and groups > 1:
            tile = tile or DEPTHWISE_TILE
            depthwise_int8_kernel[(cdiv(m, tile.block_m), cdiv(k, tile.block_n))](
                *tensors, m, h, w, c, k, p, q, k_group, *geometry, R=r, S=s, ACTIVATION=activation,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.options(),
            )  # fmt: skip
        else:
            flat = c_group < FLAT_BELOW or r * s > MOST_TAPS
            tile = tile or (FLAT_TILE if flat else choose_tile(m, k_group))
            conv2d_int8_kernel[(cdiv(m, tile.block_m) * cdiv(k_group, tile.block_n), groups)](
                *tensors, m, h, w, c, k, p, q, c_group, k_group, *geometry, R=r, S=s, ACTIVATION=activation,
                FLAT=flat, WORDS=in_words(weight), **tile.meta(), **tile.options(),
            )  # fmt: skip
    return out
