"""``cnncomp::conv2d_depthwise``: fp32, one filter for each channel, images in NCHW."""

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
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float lo, float hi, int[2] stride, int[2] padding, "
    "int[2] dilation) -> Tensor"
)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    lo: float,
    hi: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    return x.new_empty(conv_out_shape(x, weight.shape[0], tuple(weight.shape[2:]), stride, padding, dilation))


def _conv_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    lo: float,
    hi: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    from cnncomp import _cpu

    check_float32(x, weight=weight, bias=bias, residual=residual)
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ArgumentError("weight", f"shape {tuple(weight.shape)}", "(C, 1, R, S)")
    kernel_size = (weight.shape[2], weight.shape[3])
    shape = conv_out_shape(x, weight.shape[0], kernel_size, stride, padding, dilation)
    n, c, h, w = x.shape
    if c != weight.shape[0]:
        raise ArgumentError("x", f"shape {tuple(x.shape)}", f"{weight.shape[0]} channels, as the weight has")
    check_residual(residual, shape)
    check_vector("bias", bias, c)
    out = x.new_empty(shape)
    if out.numel() == 0:
        return out
    x, weight = x.contiguous(), weight.contiguous()
    residual = contiguous(residual)
    _cpu.conv2d_depthwise(
        x.data_ptr(), n, c, h, w, weight.data_ptr(), *kernel_size, *stride, *padding, *dilation,
        pointer(bias), pointer(residual), lo, hi, out.data_ptr(), num_threads(),
    )  # fmt: skip
    return out


define("conv2d_depthwise", SCHEMA, _fake, _conv_cpu)
