"""``cnncomp::conv2d_sparse_int8`` and ``cnncomp::linear_sparse_int8``: 8-bit activations, sparse int8 weights, on a CPU.

The same numbers as :mod:`cnncomp.ops.conv2d_int8`, bit for bit, and the same references. Mean-shift weights have no zeros to
leave out: ``constants`` has three rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.ops.conv2d_int8 import (
    ACTIVATION_CODE,
    ACTIVATION_SCHEMA,
    check_activation,
    check_operands,
    check_residual_scale,
    check_unshifted,
)
from cnncomp.ops.library import (
    DTYPE_CODE,
    Pair,
    check_contiguous,
    check_dtype,
    check_same_device,
    contiguous,
    conv_out_shape,
    define,
    num_threads,
    pointer,
)
from cnncomp.ops.packing import QUAD

CONV_SCHEMA = (
    "(Tensor x, Tensor values, Tensor index, Tensor row_ptr, int block, Tensor constants, Tensor? residual, "
    "float residual_scale, float lo, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "ScalarType out_dtype) -> Tensor"
)
LINEAR_SCHEMA = (
    "(Tensor x, Tensor values, Tensor index, Tensor row_ptr, int block, Tensor constants, Tensor? residual, "
    "float residual_scale, float lo, ScalarType out_dtype) -> Tensor"
)


def _scattered(index: Tensor) -> bool:
    """Whether the weight is packed by :func:`cnncomp.ops.packing.pack_scattered_int8`, with a place for each value."""
    return index.dim() == 2


def _check(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor,
    block: int,
    constants: Tensor,
    residual: Tensor | None,
    group_c: int,
    shape: Sequence[int],
    out_dtype: torch.dtype,
) -> None:
    check_operands(x, values, constants, residual, shape, out_dtype)
    check_dtype("index", index, torch.int16)
    check_dtype("row_ptr", row_ptr, torch.int32)
    check_same_device(x, index=index, row_ptr=row_ptr)
    check_unshifted(constants)
    k = constants.shape[1]
    check_contiguous(index=index, row_ptr=row_ptr)
    if row_ptr.numel() != -(-group_c // (block if _scattered(index) else QUAD * block)) * k + 1:
        expected = f"the number of input channels that the weight was packed for (it has {row_ptr.numel() - 1} rows)"
        raise ArgumentError("x", f"shape {tuple(x.shape)}", expected)


def _conv_fake(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor,
    block: int,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    out_dtype: torch.dtype,
    activation: str = "",
    out_factor: float = 1.0,
) -> Tensor:
    shape = conv_out_shape(x, constants.shape[1], kernel_size, stride, padding, dilation)
    return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)


def _conv_cpu(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor,
    block: int,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    out_dtype: torch.dtype,
    activation: str = "",
    out_factor: float = 1.0,
) -> Tensor:
    from cnncomp import _cpu

    shape = conv_out_shape(x, constants.shape[1], kernel_size, stride, padding, dilation)
    n, c, h, w = x.shape
    _check(x, values, index, row_ptr, block, constants, residual, c // groups, shape, out_dtype)
    check_activation(activation, out_factor)
    check_residual_scale(residual, residual_scale)
    out = torch.empty(shape, dtype=out_dtype, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    x = x.contiguous(memory_format=torch.channels_last)
    residual = contiguous(residual, torch.channels_last)
    _cpu.conv2d_sparse_int8(
        x.data_ptr(), x.dtype == torch.int8, n, h, w, c,
        values.data_ptr(), index.data_ptr(), row_ptr.data_ptr(), block,
        shape[1], *kernel_size, *stride, *padding, *dilation, groups,
        constants.data_ptr(),
        pointer(residual), 0 if residual is None else DTYPE_CODE[residual.dtype], residual_scale, lo,
        out.data_ptr(), DTYPE_CODE[out_dtype], num_threads(), _scattered(index), ACTIVATION_CODE[activation], out_factor,
    )  # fmt: skip
    return out


define("conv2d_sparse_int8", CONV_SCHEMA.replace(")", ACTIVATION_SCHEMA), _conv_fake, _conv_cpu)


def _linear_fake(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor,
    block: int,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    out_dtype: torch.dtype,
    activation: str = "",
    out_factor: float = 1.0,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], constants.shape[1]), dtype=out_dtype)


def _linear_cpu(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor,
    block: int,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    out_dtype: torch.dtype,
    activation: str = "",
    out_factor: float = 1.0,
) -> Tensor:
    from cnncomp import _cpu

    c, shape = x.shape[-1], (*x.shape[:-1], constants.shape[1])
    _check(x, values, index, row_ptr, block, constants, residual, c, shape, out_dtype)
    check_activation(activation, out_factor)
    check_residual_scale(residual, residual_scale)
    out = torch.empty(shape, dtype=out_dtype)
    if out.numel() == 0:
        return out
    x = x.contiguous()
    residual = contiguous(residual)
    _cpu.conv2d_sparse_int8(
        x.data_ptr(), x.dtype == torch.int8, x.numel() // c, 1, 1, c,
        values.data_ptr(), index.data_ptr(), row_ptr.data_ptr(), block,
        shape[-1], 1, 1, 1, 1, 0, 0, 1, 1, 1,
        constants.data_ptr(),
        pointer(residual), 0 if residual is None else DTYPE_CODE[residual.dtype], residual_scale, lo,
        out.data_ptr(), DTYPE_CODE[out_dtype], num_threads(), False, ACTIVATION_CODE[activation], out_factor,
    )  # fmt: skip
    return out


define("linear_sparse_int8", LINEAR_SCHEMA.replace(")", ACTIVATION_SCHEMA), _linear_fake, _linear_cpu)
