"""What every kernel must give, in plain torch. int8 kernels answer to these functions bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

QRANGE = {torch.uint8: (0.0, 255.0), torch.int8: (-128.0, 127.0)}


def quantize(x: Tensor, inv_scale: float, dtype: torch.dtype) -> Tensor:
    """Round ``x * inv_scale`` half to even into ``dtype`` (uint8 or int8), saturating; NaN gives the lowest value."""
    lo, hi = QRANGE[dtype]
    t = x.float() * torch.tensor(inv_scale, dtype=torch.float32)
    t = torch.nan_to_num(t, nan=lo, posinf=hi, neginf=lo).clamp(lo, hi)
    return torch.round(t).to(dtype)


def epilogue(
    acc: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    out_dtype: torch.dtype,
    window: Tensor | None = None,
) -> Tensor:
    """The one epilogue (docs/design.md, "Numbers"): ``acc`` is int32 ``(N, K, ...)``, ``constants`` ``(3, K)`` float32.

    For mean-shift weights ``constants`` is ``(4, K)``, and ``window`` holds the sums of the inputs under each output's
    window, int32 like ``acc``.
    """
    scale, bias, hi, *shift = (row.reshape(1, -1, *[1] * (acc.dim() - 2)) for row in constants)
    t = acc.float() * scale
    t = t + bias
    if shift:
        assert window is not None
        t = t + shift[0] * window.float()
    if residual is not None:
        t = t + residual.float() * torch.tensor(residual_scale, dtype=torch.float32)
    t = torch.minimum(torch.maximum(t, torch.tensor(lo, dtype=torch.float32)), hi)
    return torch.round(t).to(out_dtype) if out_dtype in QRANGE else t.to(out_dtype)


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
) -> Tensor:
    """int8 convolution of ``x`` (N, C, H, W) uint8 or int8 with the unpacked ``weight`` (K, C/G, R, S) int8.

    ``constants`` (4, K): the weights are mean-shifted, α·q + μ, and conv(x, αq + μ) = α·conv(x, q) + μ·Σx over the window.

    The products are summed in float64, which is exact here: every partial sum is an integer below 2**53.
    """
    where = (None, list(stride), list(padding), list(dilation), groups)
    acc = F.conv2d(x.double(), weight.double(), *where).to(torch.int32)
    window = None
    if constants.shape[0] == 4:
        window = F.conv2d(x.double(), torch.ones_like(weight, dtype=torch.float64), *where).to(torch.int32)
    out = epilogue(acc, constants, residual, residual_scale, lo, out_dtype, window)
    return out.contiguous(memory_format=torch.channels_last)


def linear_int8(
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """int8 linear of ``x`` (..., C) with the unpacked ``weight`` (K, C) int8."""
    acc = F.linear(x.double(), weight.double()).to(torch.int32)
    k = acc.shape[-1]
    flat = None if residual is None else residual.reshape(-1, k)
    window = x.to(torch.int32).sum(-1, dtype=torch.int32).reshape(-1, 1)
    return epilogue(acc.reshape(-1, k), constants, flat, residual_scale, lo, out_dtype, window).reshape(acc.shape)


def max_pool2d_int8(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Max-pool of 8-bit ``x`` (N, C, H, W)."""
    pooled = F.max_pool2d(x.float(), list(kernel_size), list(stride), list(padding), list(dilation))
    return pooled.to(x.dtype).contiguous(memory_format=torch.channels_last)


def clamp_add(t: Tensor, residual: Tensor | None, lo: float, hi: float) -> Tensor:
    """``clamp(t + residual, lo, hi)``: the epilogue of the float layers."""
    if residual is not None:
        t = t + residual
    return t if lo == -float("inf") and hi == float("inf") else t.clamp(lo, hi)


def conv2d_sparse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    lo: float,
    hi: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Dense convolution with the unpacked masked ``weight`` (K, C/G, R, S) float32."""
    t = F.conv2d(x, weight, bias, list(stride), list(padding), list(dilation), groups)
    return clamp_add(t, residual, lo, hi)


def linear_sparse(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, lo: float, hi: float
) -> Tensor:
    """Dense linear with the unpacked masked ``weight`` (K, C) float32."""
    return clamp_add(F.linear(x, weight, bias), residual, lo, hi)
