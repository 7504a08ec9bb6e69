"""``cnncomp::max_pool2d_int8``: max-pool that keeps a chain in 8 bit (torch's own refuses larger 8-bit images)."""

from __future__ import annotations

import torch
from torch import Tensor

from cnncomp.ops.library import Pair, check_dtype, conv_out_shape, define, num_threads

SCHEMA = "(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation) -> Tensor"


def _fake(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    shape = conv_out_shape(x, x.shape[1], kernel_size, stride, padding, dilation)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _cpu(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    from cnncomp import _cpu as kernels

    check_dtype("x", x, torch.uint8, torch.int8)
    out = _fake(x, kernel_size, stride, padding, dilation)
    if out.numel() == 0:
        return out
    n, c, h, w = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    kernels.max_pool2d_int8(
        x.data_ptr(), x.dtype == torch.int8, n, h, w, c, *kernel_size, *stride, *padding, *dilation, out.data_ptr(),
        num_threads(),
    )  # fmt: skip
    return out


def _cuda(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    from cnncomp.ops import cuda

    check_dtype("x", x, torch.uint8, torch.int8)
    return cuda.max_pool2d_int8(x, kernel_size, stride, padding, dilation)


define("max_pool2d_int8", SCHEMA, _fake, _cpu, _cuda)
