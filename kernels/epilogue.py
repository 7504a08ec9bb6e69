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
def store_epilogue(acc, constants_ptr, residual_ptr, out_ptr, offset, mask, channel, k, residual_scale, lo):
    """Scale, bias, residual, clamp, round, store.

    Args:
        acc: (BLOCK_M, BLOCK_N) int32.
        constants_ptr: (3, k) float32: scale, bias, hi.
        residual_ptr: Like the output in layout, uint8, int8 or float; or None.
        out_ptr: uint8, int8 or float.
        offset: (BLOCK_M, BLOCK_N) int64 element offset into output and residual.
        mask: (BLOCK_M, BLOCK_N) elements that exist.
        channel: (BLOCK_N,) output channel.
        k: Output channels.
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
    t = clamp(t, lo, hi[None, :])
    if out_ptr.dtype.element_ty.is_int():
        t = ((t + _ROUND) - _ROUND).to(tl.int32)
    tl.store(out_ptr + offset, t.to(out_ptr.dtype.element_ty), mask=mask)
