"""``cnncomp::quantize``: floats to 8 bit with zero point 0."""

from __future__ import annotations

import torch
from torch import Tensor

from cnncomp.ops.library import check_dtype, check_elements, check_factor, define, num_threads

SCHEMA = "(Tensor x, float inv_scale, ScalarType dtype) -> Tensor"


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=layout)


def _fake(x: Tensor, inv_scale: float, dtype: torch.dtype) -> Tensor:
    return _empty(x, dtype)


def _check(x: Tensor, inv_scale: float, dtype: torch.dtype) -> None:
    check_factor("inv_scale", inv_scale)
    check_dtype("x", x, torch.float32, torch.float16, torch.bfloat16)
    check_dtype("dtype", torch.empty(0, dtype=dtype), torch.uint8, torch.int8)


def _cpu(x: Tensor, inv_scale: float, dtype: torch.dtype) -> Tensor:
    from cnncomp import _cpu as kernels

    _check(x, inv_scale, dtype)
    x = x.float()
    out = _empty(x, dtype)
    if x.numel() == 0:
        return out
    if x.dim() == 4:
        n, c, h, w = x.shape
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        if not channels_last:
            x = x.contiguous()
    else:
        x = x.contiguous()
        n, c, h, w, channels_last = 1, x.numel(), 1, 1, True
    kernels.quantize(
        x.data_ptr(), n, c, h, w, channels_last, out.data_ptr(), dtype == torch.int8, inv_scale, num_threads()
    )
    return out


def _cuda(x: Tensor, inv_scale: float, dtype: torch.dtype) -> Tensor:
    from cnncomp.ops import cuda

    _check(x, inv_scale, dtype)
    check_elements(x=x.shape)
    return cuda.quantize(x, inv_scale, dtype)


define("quantize", SCHEMA, _fake, _cpu, _cuda)
