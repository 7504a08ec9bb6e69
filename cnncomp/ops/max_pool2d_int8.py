"""``cnncomp::max_pool2d_int8``: max-pool that keeps a chain in 8 bit (torch's own refuses larger 8-bit images)."""

from __future__ import annotations

import torch
from torch import Tensor

from cnncomp.ops.library import Pair, check_dtype, check_elements, define, num_threads, pool_out_shape

SCHEMA = (
    "(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode=False) -> Tensor"
)


def _fake(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool = False) -> Tensor:
    shape = pool_out_shape(x, kernel_size, stride, padding, dilation, ceil_mode)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _cpu(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool = False) -> Tensor:
    from cnncomp import _cpu as kernels

    check_dtype("x", x, torch.uint8, torch.int8)
    out = _fake(x, kernel_size, stride, padding, dilation, ceil_mode)
    if out.numel() == 0:
        return out
    n, c, h, w = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    kernels.max_pool2d_int8(
        x.data_ptr(), x.dtype == torch.int8, n, h, w, c, *kernel_size, *stride, *padding, *dilation, out.data_ptr(),
        num_threads(), ceil_mode,
    )  # fmt: skip
    return out


def _cuda(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool = False) -> Tensor:
    from cnncomp.ops import cuda

    check_dtype("x", x, torch.uint8, torch.int8)
    check_elements(x=x.shape)
    return cuda.max_pool2d_int8(x, kernel_size, stride, padding, dilation, ceil_mode)


define("max_pool2d_int8", SCHEMA, _fake, _cpu, _cuda)
