"""``cnncomp::conv2d_sparse`` and ``cnncomp::linear_sparse``: fp32 with unstructured sparse weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.ops.library import (
    Pair,
    check_contiguous,
    check_dtype,
    check_residual,
    check_same_device,
    check_vector,
    contiguous,
    conv_out_shape,
    define,
    num_threads,
    pointer,
)
from cnncomp.ops.packing import PackedSparse

CONV_SCHEMA = (
    "(Tensor x, Tensor values, Tensor index, Tensor row_ptr, int block, Tensor? bias, Tensor? residual, float lo, float hi, "
    "int out_channels, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor"
)
LINEAR_SCHEMA = (
    "(Tensor x, Tensor values, Tensor index, Tensor row_ptr, int block, Tensor? bias, Tensor? residual, float lo, float hi, "
    "int out_channels) -> Tensor"
)


def _check(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: int,
    out_channels: int,
    shape: Sequence[int],
    index_dtype: torch.dtype = torch.int16,
) -> None:
    check_dtype("x", x, torch.float32)
    check_dtype("values", values, torch.float32)
    check_dtype("index", index, index_dtype)
    check_dtype("row_ptr", row_ptr, torch.int32)
    for name, t in (("bias", bias), ("residual", residual)):
        if t is not None:
            check_dtype(name, t, torch.float32)
    check_same_device(x, values=values, index=index, row_ptr=row_ptr, bias=bias, residual=residual)
    check_residual(residual, shape)
    check_vector("bias", bias, out_channels)
    check_contiguous(values=values, index=index, row_ptr=row_ptr)
    if row_ptr.numel() != rows + 1:
        raise ArgumentError(
            "x", f"shape {tuple(x.shape)}", "the number of input channels that the weight was packed for"
        )


def _conv_fake(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor,
    block: int,
    bias: Tensor | None,
    residual: Tensor | None,
    lo: float,
    hi: float,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    return x.new_empty(conv_out_shape(x, out_channels, kernel_size, stride, padding, dilation))


def _conv_cpu(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor,
    block: int,
    bias: Tensor | None,
    residual: Tensor | None,
    lo: float,
    hi: float,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    from cnncomp import _cpu

    shape = conv_out_shape(x, out_channels, kernel_size, stride, padding, dilation)
    n, c, h, w = x.shape
    rows = -(-(c // groups) // block) * out_channels
    _check(x, values, index, row_ptr, bias, residual, rows, out_channels, shape)
    out = x.new_empty(shape)
    if out.numel() == 0:
        return out
    x = x.contiguous()
    residual = contiguous(residual)
    _cpu.conv2d_sparse(
        x.data_ptr(), n, c, h, w,
        values.data_ptr(), index.data_ptr(), row_ptr.data_ptr(), block,
        out_channels, *kernel_size, *stride, *padding, *dilation, groups,
        pointer(bias), pointer(residual), lo, hi, out.data_ptr(), num_threads(),
    )  # fmt: skip
    return out


def _conv_cuda(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor,
    block: int,
    bias: Tensor | None,
    residual: Tensor | None,
    lo: float,
    hi: float,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    from cnncomp.ops import cuda

    shape = conv_out_shape(x, out_channels, kernel_size, stride, padding, dilation)
    rows = groups * -(-(out_channels // groups) // block)
    _check(x, values, index, row_ptr, bias, residual, rows, out_channels, shape, torch.int32)
    packed = PackedSparse(values, index, row_ptr, block)
    where = (stride, padding, dilation, groups)
    return cuda.conv2d_sparse(x, packed, out_channels, kernel_size, bias, residual, lo, hi, *where)


define("conv2d_sparse", CONV_SCHEMA, _conv_fake, _conv_cpu, _conv_cuda)


def _linear_fake(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor,
    block: int,
    bias: Tensor | None,
    residual: Tensor | None,
    lo: float,
    hi: float,
    out_channels: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_channels))


def _linear_cpu(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor,
    block: int,
    bias: Tensor | None,
    residual: Tensor | None,
    lo: float,
    hi: float,
    out_channels: int,
) -> Tensor:
    from cnncomp import _cpu

    c, shape = x.shape[-1], (*x.shape[:-1], out_channels)
    _check(x, values, index, row_ptr, bias, residual, -(-c // block) * out_channels, out_channels, shape)
    out = x.new_empty(shape)
    if out.numel() == 0:
        return out
    x = x.contiguous()
    residual = contiguous(residual)
    _cpu.linear_sparse(
        x.data_ptr(), x.numel() // c, c,
        values.data_ptr(), index.data_ptr(), row_ptr.data_ptr(), block, out_channels,
        pointer(bias), pointer(residual), lo, hi, out.data_ptr(), num_threads(),
    )  # fmt: skip
    return out


def _linear_cuda(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor,
    block: int,
    bias: Tensor | None,
    residual: Tensor | None,
    lo: float,
    hi: float,
    out_channels: int,
) -> Tensor:
    shape = (*x.shape[:-1], out_channels)
    image = None if residual is None else residual.reshape(-1, out_channels, 1, 1)
    one = (1, 1)
    args = (values, index, row_ptr, block, bias, image, lo, hi, out_channels, one, one, (0, 0), one, 1)
    return _conv_cuda(x.reshape(-1, x.shape[-1], 1, 1), *args).reshape(shape)


define("linear_sparse", LINEAR_SCHEMA, _linear_fake, _linear_cpu, _linear_cuda)
