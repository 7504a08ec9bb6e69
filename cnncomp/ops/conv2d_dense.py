"""``cnncomp::conv2d_dense``: fp32 with dense weights, packed, images in NCHW."""

from __future__ import annotations

from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.ops.library import (
    Pair,
    check_float32,
    check_residual,
    check_vector,
    contiguous,
    conv_out_shape,
    define,
    num_threads,
    pointer,
)

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float lo, float hi, int out_channels, int[2] stride, "
    "int[2] padding, int[2] dilation) -> Tensor"
)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    lo: float,
    hi: float,
    out_channels: int,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    return x.new_empty(conv_out_shape(x, out_channels, weight.shape[4:6], stride, padding, dilation))


def _conv_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    lo: float,
    hi: float,
    out_channels: int,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """``weight``: as :func:`cnncomp.ops.packing.pack_dense` gives it."""
    from cnncomp import _cpu

    check_float32(x, weight=weight, bias=bias, residual=residual)
    if weight.dim() != 7 or not weight.is_contiguous():
        raise ArgumentError("weight", f"shape {tuple(weight.shape)}", "(G, NB, KB, block, R, S, 8), contiguous")
    groups, blocks, rows, block, r, s, width = weight.shape
    shape = conv_out_shape(x, out_channels, (r, s), stride, padding, dilation)
    n, c, h, w = x.shape
    if c % groups or -(-(c // groups) // block) != blocks:
        raise ArgumentError("x", f"shape {tuple(x.shape)}", "the input channels that the weight was packed for")
    if out_channels % groups or -(-(out_channels // groups) // width) != rows:
        raise ArgumentError("out_channels", out_channels, "the output channels that the weight was packed for")
    check_residual(residual, shape)
    check_vector("bias", bias, out_channels)
    out = x.new_empty(shape)
    if out.numel() == 0:
        return out
    x = x.contiguous()
    residual = contiguous(residual)
    _cpu.conv2d_dense(
        x.data_ptr(), n, c, h, w, weight.data_ptr(), block, out_channels, r, s, *stride, *padding, *dilation, groups,
        pointer(bias), pointer(residual), lo, hi, out.data_ptr(), num_threads(),
    )  # fmt: skip
    return out


define("conv2d_dense", SCHEMA, _fake, _conv_cpu)
