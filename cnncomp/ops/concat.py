"""``cnncomp::concat_channels``: images one behind the other, of floats or of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.ops.library import check_dtype, check_same_device, define, num_threads


def _fake(tensors: Sequence[Tensor]) -> Tensor:
    shapes = [tuple(t.shape) for t in tensors]
    if not shapes or any(
        len(shape) != 4 or (shape[0], *shape[2:]) != (shapes[0][0], *shapes[0][2:]) for shape in shapes
    ):
        raise ArgumentError("tensors", f"shapes {shapes}", "images (N, C, H, W) that differ in C only")
    n, _, h, w = tensors[0].shape
    layout = torch.channels_last if _are_last(tensors) else torch.contiguous_format
    first, shape = tensors[0], (n, sum(t.shape[1] for t in tensors), h, w)
    return torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout)


def _are_last(tensors: Sequence[Tensor]) -> bool:
    """Whether all images are in channels_last, and not all contiguous."""
    last = all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
    return last and not all(t.is_contiguous() for t in tensors)


def _cpu(tensors: Sequence[Tensor]) -> Tensor:
    from cnncomp import _cpu as kernels

    out = _fake(tensors)
    first, named = tensors[0], {f"tensors[{i}]": t for i, t in enumerate(tensors)}
    check_dtype("tensors[0]", first, torch.float32, torch.uint8, torch.int8)
    for name, t in named.items():
        check_dtype(name, t, first.dtype)
    check_same_device(first, **named)
    copy = kernels.copy_rows if first.dtype == torch.float32 else kernels.copy_byte_rows
    n, channels, h, w = out.shape
    last = _are_last(tensors)
    rows, pixels, offset = (n * h * w, 1, 0) if last else (n, h * w, 0)
    for t in tensors:
        t = t if last else t.contiguous()
        length = t.shape[1] * pixels
        if t.numel():
            address = out.data_ptr() + first.itemsize * offset
            copy(t.data_ptr(), rows, length, address, channels * pixels, num_threads())
        offset += length
    return out


define("concat_channels", "(Tensor[] tensors) -> Tensor", _fake, _cpu)
