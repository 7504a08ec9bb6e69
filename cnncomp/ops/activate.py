"""``cnncomp::activate``, activations that are no clamp, ``cnncomp::scale_channels`` and ``cnncomp::affine_channels``, on float
images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.ops.library import check_float32, check_vector, define, num_threads

INF = math.inf
#: The kernel's numbers.
ACTIVATIONS = {"sigmoid": 0, "silu": 1, "hardsigmoid": 2, "hardswish": 3}


def is_dense(x: Tensor) -> bool:
    """Whether the elements lie without gaps, in an order that ``empty_like`` keeps."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _rows(x: Tensor) -> tuple[int, int]:
    """Channels of images, so that there may be gaps between them in a recorded network, and their length."""
    rows = x.shape[0] * x.shape[1] if x.dim() == 4 and x.is_contiguous() else 1
    return rows, x.numel() // max(1, rows)


def _activate_fake(x: Tensor, activation: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.preserve_format if is_dense(x) else torch.contiguous_format)


def _activate_cpu(x: Tensor, activation: str) -> Tensor:
    from cnncomp import _cpu

    check_float32(x)
    if activation not in ACTIVATIONS:
        raise ArgumentError("activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
    if not is_dense(x):
        x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        _cpu.activate(x.data_ptr(), *_rows(x), ACTIVATIONS[activation], out.data_ptr(), num_threads())
    return out


def _scale_fake(x: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _scale_cpu(x: Tensor, scale: Tensor) -> Tensor:
    from cnncomp import _cpu

    check_float32(x, scale=scale)
    if x.dim() != 4 or tuple(scale.shape) != (*x.shape[:2], 1, 1):
        expected = f"(N, C, 1, 1) for x (N, C, H, W), whose shape is {tuple(x.shape)}"
        raise ArgumentError("scale", f"shape {tuple(scale.shape)}", expected)
    x, scale = x.contiguous(), scale.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        rows, length = _rows(x)
        _cpu.affine_rows(
            x.data_ptr(), rows, length, scale.data_ptr(), 0, rows, -INF, INF, out.data_ptr(), num_threads()
        )
    return out


def _affine_fake(x: Tensor, scale: Tensor, shift: Tensor, lo: float, hi: float) -> Tensor:
    return x.new_empty(x.shape)


def _affine_cpu(x: Tensor, scale: Tensor, shift: Tensor, lo: float, hi: float) -> Tensor:
    from cnncomp import _cpu

    check_float32(x, scale=scale, shift=shift)
    if x.dim() != 4:
        raise ArgumentError("x", f"shape {tuple(x.shape)}", "4 dimensions (N, C, H, W)")
    for name, t in (("scale", scale), ("shift", shift)):
        check_vector(name, t, x.shape[1])
    x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        rows, length = _rows(x)
        maps = (scale.data_ptr(), shift.data_ptr())
        _cpu.affine_rows(x.data_ptr(), rows, length, *maps, x.shape[1], lo, hi, out.data_ptr(), num_threads())
    return out


define("activate", "(Tensor x, str activation) -> Tensor", _activate_fake, _activate_cpu)
define("scale_channels", "(Tensor x, Tensor scale) -> Tensor", _scale_fake, _scale_cpu)
define(
    "affine_channels", "(Tensor x, Tensor scale, Tensor shift, float lo, float hi) -> Tensor", _affine_fake, _affine_cpu
)
