"""``cnncomp::conv2d_sparse24_int8`` and ``cnncomp::linear_sparse24_int8``: 8-bit activations, 2:4 sparse int8 weights.

The same numbers as :mod:`cnncomp.ops.conv2d_int8`, bit for bit, and the same references. The weight is packed by
:func:`cnncomp.sparsity.pack_2to4`. On a CPU, which gains nothing by the pattern, it is unpacked and runs as a dense one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.ops.conv2d_int8 import CONV_SCHEMA, LINEAR_SCHEMA, _conv_fake, _linear_fake, check_operands
from cnncomp.ops.library import Pair, conv_out_shape, define
from cnncomp.ops.packing import pack_int8
from cnncomp.sparsity.two_four import packed_shape, unpack_2to4


def _check(
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    shape: Sequence[int],
    out_dtype: torch.dtype,
    logical: tuple[int, int, int, int],
    groups: int,
) -> None:
    """Check operands; ``shape``: the output's; ``logical``: the unpacked weight's."""
    check_operands(x, weight, constants, residual, shape, out_dtype)
    if constants.shape[0] != 3:
        raise ArgumentError("constants", f"shape {tuple(constants.shape)}", "(3, K): sparse weights have no mean shift")
    expected = packed_shape(logical, torch.int8, groups)
    if tuple(weight.shape) != expected:
        raise ArgumentError(
            "weight", f"packed shape {tuple(weight.shape)}", f"{expected} for {logical}, {groups} groups"
        )


def _conv_cpu(
    x: Tensor,
    weight: Tensor,
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
) -> Tensor:
    shape = conv_out_shape(x, constants.shape[1], kernel_size, stride, padding, dilation)
    logical = (shape[1], x.shape[1] // groups, *kernel_size)
    _check(x, weight, constants, residual, shape, out_dtype, logical, groups)
    dense = pack_int8(unpack_2to4(weight, logical, torch.int8, groups), groups)
    where = (kernel_size, stride, padding, dilation, groups)
    return torch.ops.cnncomp.conv2d_int8(x, dense, constants, residual, residual_scale, lo, *where, out_dtype)


def _conv_cuda(
    x: Tensor,
    weight: Tensor,
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
) -> Tensor:
    from cnncomp.ops import cuda_sparse

    shape = conv_out_shape(x, constants.shape[1], kernel_size, stride, padding, dilation)
    _check(x, weight, constants, residual, shape, out_dtype, (shape[1], x.shape[1] // groups, *kernel_size), groups)
    where = (kernel_size, stride, padding, dilation, groups)
    return cuda_sparse.conv2d_sparse24(x, weight, constants, residual, residual_scale, lo, *where, out_dtype)


define("conv2d_sparse24_int8", CONV_SCHEMA, _conv_fake, _conv_cpu, _conv_cuda)


def _linear_cpu(
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    out_dtype: torch.dtype,
) -> Tensor:
    k = constants.shape[1]
    logical = (k, x.shape[-1], 1, 1)
    _check(x, weight, constants, residual, (*x.shape[:-1], k), out_dtype, logical, 1)
    dense = pack_int8(unpack_2to4(weight, logical, torch.int8))
    return torch.ops.cnncomp.linear_int8(x, dense, constants, residual, residual_scale, lo, out_dtype)


def _linear_cuda(
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    out_dtype: torch.dtype,
) -> Tensor:
    from cnncomp.ops import cuda_sparse

    k = constants.shape[1]
    _check(x, weight, constants, residual, (*x.shape[:-1], k), out_dtype, (k, x.shape[-1], 1, 1), 1)
    return cuda_sparse.linear_sparse24(x, weight, constants, residual, residual_scale, lo, out_dtype)


define("linear_sparse24_int8", LINEAR_SCHEMA, _linear_fake, _linear_cpu, _linear_cuda)
