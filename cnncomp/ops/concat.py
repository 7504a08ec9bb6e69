"""``cnncomp::concat_channels``: float images one behind the other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.ops.library import check_float32, define, num_threads


def _fake(tensors: Sequence[Tensor]) -> Tensor:
    shapes = [tuple(t.shape) for t in tensors]
    if not shapes or any(
        len(shape) != 4 or (shape[0], *shape[2:]) != (shapes[0][0], *shapes[0][2:]) for shape in shapes
    ):
        raise ArgumentError("tensors", f"shapes {shapes}", "images (N, C, H, W) that differ in C only")
    n, _, h, w = tensors[0].shape
    return tensors[0].new_empty((n, sum(t.shape[1] for t in tensors), h, w))


def _cpu(tensors: Sequence[Tensor]) -> Tensor:
    from cnncomp import _cpu as kernels

    out = _fake(tensors)
    check_float32(tensors[0], **{f"tensors[{i}]": t for i, t in enumerate(tensors)})
    pitch, offset = out[:1].numel(), 0
    for t in tensors:
        t, length = t.contiguous(), t[:1].numel()
        if t.numel():
            kernels.copy_rows(t.data_ptr(), t.shape[0], length, out.data_ptr() + 4 * offset, pitch, num_threads())
        offset += length
    return out


define("concat_channels", "(Tensor[] tensors) -> Tensor", _fake, _cpu)
