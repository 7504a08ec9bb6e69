"""``cnncomp::conv2d_sparse24_f16``: float16 or bfloat16 activations and 2:4 sparse weights of their dtype, float32 sums.

The epilogue is that of :mod:`cnncomp.ops.conv2d_int8`: ``constants`` (3, K) are scale, bias and the upper clamp. The result is
float32 or of x's dtype, rounded once. On a CPU, which gains nothing by the pattern, the weight is unpacked and runs dense.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.ops.conv2d_int8 import CONV_SCHEMA, _conv_fake
from cnncomp.ops.library import Pair, check_dtype, check_residual, check_same_device, conv_out_shape, define
from cnncomp.ops.reference import epilogue
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
    check_dtype("x", x, torch.float16, torch.bfloat16)
    check_dtype("weight", weight, torch.int8)
    check_dtype("constants", constants, torch.float32)
    if constants.shape[0] != 3:
        raise ArgumentError("constants", f"shape {tuple(constants.shape)}", "(3, K)")
    if out_dtype not in (x.dtype, torch.float32):
        raise ArgumentError("out_dtype", out_dtype, f"{x.dtype} or torch.float32")
    if residual is not None:
        check_dtype("residual", residual, x.dtype, torch.float32)
    check_same_device(x, weight=weight, constants=constants, residual=residual)
    check_residual(residual, shape)
    expected = packed_shape(logical, x.dtype, groups)
    if tuple(weight.shape) != expected:
        wanted = f"{expected} for {logical}, {groups} groups"
        raise ArgumentError("weight", f"packed shape {tuple(weight.shape)}", wanted)


def _cpu(
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
    dense = unpack_2to4(weight, logical, x.dtype, groups).float()
    acc = F.conv2d(x.float(), dense, None, stride, padding, dilation, groups)
    out = epilogue(acc, constants, residual, residual_scale, lo, out_dtype)
    return out.contiguous(memory_format=torch.channels_last)


def _cuda(
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


define("conv2d_sparse24_f16", CONV_SCHEMA, _conv_fake, _cpu, _cuda)
