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


def silu(t: Tensor) -> Tensor:
    """``t / (1 + exp(-t))`` of float32 by additions and multiplications, each rounded on its own: the same bits on every
    device, within 2e-7 of the exact value, relative to the larger of it and 1. csrc/cuda/activation.cuh says how."""
    y = (t.abs() * -1.44269504).clamp(min=-126.0)
    shifted = y + 12582912.0  # 1.5 * 2**23: leaves no bits for a fraction
    f = y - (shifted - 12582912.0)
    z = torch.full_like(t, 1.32647273e-3)
    for coefficient in (9.67151299e-3, 5.55073358e-2, 2.40222424e-1, 6.93147004e-1, 1.0):
        z = z * f + coefficient
    z = (z.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)
    d = 1.0 + z
    inverse = 1.41176471 + d * -4.70588235e-1
    for _ in range(3):
        inverse = inverse + inverse * (1.0 - d * inverse)
    return t * torch.where(t < 0, z * inverse, inverse)


def hardswish(t: Tensor) -> Tensor:
    """``t * clamp(t + 3, 0, 6) / 6`` of float32, each step rounded on its own."""
    return t * ((t + 3.0).clamp(0.0, 6.0) * 1.66666672e-1)


#: The epilogue's activations besides a clamp.
ACTIVATIONS = {"silu": silu, "hardswish": hardswish}


def epilogue(
    acc: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    out_dtype: torch.dtype,
    window: Tensor | None = None,
    activation: str = "",
    out_factor: float = 1.0,
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
    return finish(t, lo, hi, out_dtype, activation, out_factor)


def finish(
    t: Tensor, lo: float, hi: Tensor, out_dtype: torch.dtype, activation: str = "", out_factor: float = 1.0
) -> Tensor:
    """The epilogue's last steps, on float32 ``t``: activation, clamp to [lo, hi], rounding. ``hi`` broadcasts."""
    if activation:
        t = ACTIVATIONS[activation](t) * torch.tensor(out_factor, dtype=torch.float32)
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
    activation: str = "",
    out_factor: float = 1.0,
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
    out = epilogue(acc, constants, residual, residual_scale, lo, out_dtype, window, activation, out_factor)
    return out.contiguous(memory_format=torch.channels_last)


def linear_int8(
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    out_dtype: torch.dtype,
    activation: str = "",
    out_factor: float = 1.0,
) -> Tensor:
    """int8 linear of ``x`` (..., C) with the unpacked ``weight`` (K, C) int8."""
    acc = F.linear(x.double(), weight.double()).to(torch.int32)
    k = acc.shape[-1]
    flat = None if residual is None else residual.reshape(-1, k)
    window = x.to(torch.int32).sum(-1, dtype=torch.int32).reshape(-1, 1)
    out = epilogue(acc.reshape(-1, k), constants, flat, residual_scale, lo, out_dtype, window, activation, out_factor)
    return out.reshape(acc.shape)


def max_pool2d_int8(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> Tensor:
    """Max-pool of 8-bit ``x`` (N, C, H, W)."""
    pooled = F.max_pool2d(x.float(), list(kernel_size), list(stride), list(padding), list(dilation), ceil_mode)
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
