"""The one int8 epilogue (docs/design.md, "Numbers") as Triton device functions."""

from __future__ import annotations

import triton
import triton.language as tl

#: 1.5 * 2**23: adding and subtracting it rounds |t| <= 2**22 half to even, as fp32 has no bits left for a fraction there.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def clamp(t, lo, hi):
    """``min(max(t, lo), hi)``; NaN stays NaN, as in torch."""
    t = tl.where(t < lo, lo, t)
    return tl.where(t > hi, hi, t)


@triton.jit
def silu(t):
    """:func:`cnncomp.ops.reference.silu`, step by step."""
    y = tl.abs(t) * -1.44269504
    y = tl.where(y < -126.0, -126.0, y)
    shifted = y + _ROUND
    f = y - (shifted - _ROUND)
    z = f * 1.32647273e-3 + 9.67151299e-3
    z = z * f + 5.55073358e-2
    z = z * f + 2.40222424e-1
    z = z * f + 6.93147004e-1
    z = z * f + 1.0
    z = (z.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)
    d = 1.0 + z
    inverse = 1.41176471 + d * -4.70588235e-1
    for _ in tl.static_range(3):
        inverse = inverse + inverse * (1.0 - d * inverse)
    return t * tl.where(t < 0, z * inverse, inverse)


@triton.jit
def hardswish(t):
    """:func:`cnncomp.ops.reference.hardswish`, step by step."""
    return t * (clamp(t + 3.0, 0.0, 6.0) * 1.66666672e-1)


@triton.jit
def store_both(
    acc, other, constants_ptr, residual_ptr, out_ptr, row, channel, exists, real, other_real, k, residual_scale, lo, out_factor,
    N: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """:func:`store_epilogue` of a tile's two halves, the second N channels on: rows ``row``, of which some ``exists``."""
    offset = row.to(tl.int64)[:, None] * k + channel[None, :]
    store_epilogue(
        acc, constants_ptr, residual_ptr, out_ptr, offset, exists & real[None, :], channel, k, residual_scale, lo, out_factor,
        ACTIVATION,
    )  # fmt: skip
    store_epilogue(
        other, constants_ptr, residual_ptr, out_ptr, offset + N, exists & other_real[None, :], channel + N, k, residual_scale,
        lo, out_factor, ACTIVATION,
    )  # fmt: skip


@triton.jit
def store_epilogue(
    acc, constants_ptr, residual_ptr, out_ptr, offset, mask, channel, k, residual_scale, lo, out_factor,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Scale, bias, residual, activation, clamp, round, store.

    Args:
        acc: (BLOCK_M, BLOCK_N) int32.
        constants_ptr: (3, k) float32: scale, bias, hi.
        residual_ptr: Like the output in layout, uint8, int8 or float; or None.
        out_ptr: uint8, int8 or float.
        offset: (BLOCK_M, BLOCK_N) int64 element offset into output and residual.
        mask: (BLOCK_M, BLOCK_N) elements that exist.
        channel: (BLOCK_N,) output channel.
        k: Output channels.
        out_factor: Behind the activation.
        ACTIVATION: "silu", "hardswish" or "".
    """
    real = channel < k
    scale = tl.load(constants_ptr + channel, mask=real, other=0.0)
    bias = tl.load(constants_ptr + k + channel, mask=real, other=0.0)
    hi = tl.load(constants_ptr + 2 * k + channel, mask=real, other=0.0)
    t = acc.to(tl.float32) * scale[None, :]
    t = t + bias[None, :]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offset, mask=mask, other=0)
        t = t + residual.to(tl.float32) * residual_scale
    if ACTIVATION == "silu":
        t = silu(t) * out_factor
    if ACTIVATION == "hardswish":
        t = hardswish(t) * out_factor
    t = clamp(t, lo, hi[None, :])
    if out_ptr.dtype.element_ty.is_int():
        t = ((t + _ROUND) - _ROUND).to(tl.int32)
    tl.store(out_ptr + offset, t.to(out_ptr.dtype.element_ty), mask=mask)
