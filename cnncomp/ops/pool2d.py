"""``cnncomp::max_pool2d`` on float images in NCHW, ``cnncomp::mean_pool2d`` over all pixels in either layout."""

from __future__ import annotations

import torch
from torch import Tensor

from cnncomp.ops.library import Pair, check_dtype, define, num_threads, pool_out_shape

MAX_SCHEMA = (
    "(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode=False) -> Tensor"
)
MEAN_SCHEMA = "(Tensor x) -> Tensor"


def _max_fake(
    x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool = False
) -> Tensor:
    return x.new_empty(pool_out_shape(x, kernel_size, stride, padding, dilation, ceil_mode))


def _max_cpu(
    x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool = False
) -> Tensor:
    from cnncomp import _cpu

    check_dtype("x", x, torch.float32)
    out = _max_fake(x, kernel_size, stride, padding, dilation, ceil_mode)
    if out.numel() == 0:
        return out
    n, c, h, w = x.shape
    x = x.contiguous()
    window = (*kernel_size, *stride, *padding, *dilation)
    _cpu.max_pool2d(x.data_ptr(), n, c, h, w, *window, out.data_ptr(), num_threads(), ceil_mode)
    return out


def _mean_fake(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], 1, 1))


def _mean_cpu(x: Tensor) -> Tensor:
    from cnncomp import _cpu

    check_dtype("x", x, torch.float32)
    out = _mean_fake(x)
    n, c, h, w = x.shape
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    if not last:
        x = x.contiguous()
    if out.numel():
        _cpu.mean_pool2d(x.data_ptr(), n, c, h * w, last, out.data_ptr(), num_threads())
    return out


def _mean_cuda(x: Tensor) -> Tensor:
    from cnncomp.ops import cuda

    check_dtype("x", x, torch.float32)
    return cuda.mean_pool2d(x)


define("max_pool2d", MAX_SCHEMA, _max_fake, _max_cpu)
define("mean_pool2d", MEAN_SCHEMA, _mean_fake, _mean_cpu, _mean_cuda)
