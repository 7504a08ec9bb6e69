"""``cnncomp::conv2d_int8`` and ``cnncomp::linear_int8``: 8-bit activations, int8 weights, the one fused epilogue.

``constants`` has the rows scale, bias and hi, and a fourth, shift, for mean-shift weights.
``activation`` is "silu", "hardswish" or "" for none but the clamp; with one, scale, bias and residual give its input in real
units, and ``out_factor``, 1 / the step of the output, comes behind it, before the clamp. float16 and bfloat16, as output and
residual, are the GPU kernels'; on a CPU they are steps before and behind the float32 kernel, with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.ops.library import (
    DTYPE_CODE,
    Pair,
    check_contiguous,
    check_dtype,
    check_elements,
    check_factor,
    check_residual,
    check_same_device,
    contiguous,
    conv_out_shape,
    define,
    num_threads,
    pointer,
)
from cnncomp.ops.packing import depthwise_columns, is_depthwise
from cnncomp.ops.reference import ACTIVATIONS

CONV_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor constants, Tensor? residual, float residual_scale, float lo, int[2] kernel_size, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, ScalarType out_dtype) -> Tensor"
)
LINEAR_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor constants, Tensor? residual, float residual_scale, float lo, "
    "ScalarType out_dtype) -> Tensor"
)


HALVES = (torch.float16, torch.bfloat16)
#: Trailing arguments of operators whose kernels have the activations.
ACTIVATION_SCHEMA = ', str activation="", float out_factor=1.0)'
#: The kernels' codes of the activations; none but the clamp.
ACTIVATION_CODE = {"": 0, "silu": 1, "hardswish": 2}


def check_operands(
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    shape: Sequence[int],
    out_dtype: torch.dtype,
    halves: Sequence[torch.dtype] = (),
) -> None:
    """Check the operands that the dense and the sparse int8 operators share; ``shape``: the output's; ``halves``: types besides
    the 8-bit ones and float32 that output and residual may have."""
    check_dtype("x", x, torch.uint8, torch.int8)
    check_dtype("weight", weight, torch.int8)
    check_dtype("constants", constants, torch.float32)
    if constants.dim() != 2 or constants.shape[0] not in (3, 4):
        raise ArgumentError("constants", f"shape {tuple(constants.shape)}", "(3, K), or (4, K) for mean-shift weights")
    types = (*DTYPE_CODE, *halves)
    if out_dtype not in types:
        raise ArgumentError("out_dtype", out_dtype, " or ".join(map(str, types)))
    if residual is not None:
        check_dtype("residual", residual, *types)
    check_same_device(x, weight=weight, constants=constants, residual=residual)
    check_residual(residual, shape)
    check_contiguous(weight=weight, constants=constants)


def check_activation(activation: str, out_factor: float) -> None:
    """Raise :class:`ArgumentError` for an activation that there is not, or a factor behind it that no step of an output has."""
    if activation not in ("", *ACTIVATIONS):
        raise ArgumentError("activation", repr(activation), " or ".join(map(repr, ("", *ACTIVATIONS))))
    check_factor("out_factor", out_factor)


def check_residual_scale(residual: Tensor | None, residual_scale: float) -> None:
    """Raise :class:`ArgumentError` for a step that no residual has, if there is one."""
    if residual is not None:
        check_factor("residual_scale", residual_scale)


def check_unshifted(constants: Tensor) -> None:
    """Raise :class:`ArgumentError` unless the constants are those of weights without a mean shift: of others, none is zero."""
    if constants.dim() != 2 or constants.shape[0] != 3:
        raise ArgumentError("constants", f"shape {tuple(constants.shape)}", "(3, K): sparse weights have no mean shift")


def _conv_fake(
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
    activation: str = "",
    out_factor: float = 1.0,
) -> Tensor:
    shape = conv_out_shape(x, constants.shape[1], kernel_size, stride, padding, dilation)
    return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)


def _check_channels(c: int, k: int, groups: int) -> None:
    if c < 1 or groups < 1 or c % groups or k % groups:
        raise ArgumentError("x", f"{c} input and {k} output channels", f"multiples of groups={groups}")


def _check_shape(weight: Tensor, expected: tuple[int, ...]) -> None:
    """Of a GPU's weight, whose kernel takes its sizes from the others."""
    if tuple(weight.shape) != expected:
        raise ArgumentError(
            "weight", f"shape {tuple(weight.shape)}", f"{expected}, as the input and the constants have channels"
        )


def _check_packed(weight: Tensor, c: int, k: int, kernel_size: Pair, groups: int) -> bool:
    """Check that the packed weight belongs to these sizes; whether it is depthwise."""
    _check_channels(c, k, groups)
    depthwise = is_depthwise(c, k, groups)
    expected: tuple[int, ...]
    if depthwise:
        columns, length = depthwise_columns((kernel_size[0], kernel_size[1]))
        expected = (-(-c // 16), columns * -(-length // 4), 16, 4)
    else:
        taps = kernel_size[0] * kernel_size[1]
        expected = (groups, -(-(k // groups) // 16), taps, -(-(c // groups) // 4), 16, 4)
    if tuple(weight.shape) != expected:
        raise ArgumentError("weight", f"packed shape {tuple(weight.shape)}", f"{expected} for {c} input channels")
    return depthwise


def kernel_dtype(out_dtype: torch.dtype) -> torch.dtype:
    """What the CPU kernels give for an output of ``out_dtype``."""
    return out_dtype if out_dtype in DTYPE_CODE else torch.float32


def _widened(t: Tensor | None) -> Tensor | None:
    """A residual as the CPU kernels take it."""
    return t.float() if t is not None and t.dtype in HALVES else t


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
    activation: str = "",
    out_factor: float = 1.0,
) -> Tensor:
    from cnncomp import _cpu

    shape = conv_out_shape(x, constants.shape[1], kernel_size, stride, padding, dilation)
    check_operands(x, weight, constants, residual, shape, out_dtype, HALVES)
    check_activation(activation, out_factor)
    check_residual_scale(residual, residual_scale)
    n, c, h, w = x.shape
    k = shape[1]
    depthwise = _check_packed(weight, c, k, kernel_size, groups)
    out = torch.empty(shape, dtype=kernel_dtype(out_dtype), memory_format=torch.channels_last)
    if out.numel() == 0:
        return out.to(out_dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    residual = contiguous(_widened(residual), torch.channels_last)
    _cpu.conv2d_int8(
        x.data_ptr(), x.dtype == torch.int8, n, h, w, c,
        weight.data_ptr(), k, *kernel_size, *stride, *padding, *dilation, groups, depthwise,
        constants.data_ptr(),
        pointer(residual), 0 if residual is None else DTYPE_CODE[residual.dtype], residual_scale, lo,
        out.data_ptr(), DTYPE_CODE[out.dtype], num_threads(), constants.shape[0] == 4,
        ACTIVATION_CODE[activation], out_factor,
    )  # fmt: skip
    return out.to(out_dtype)


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
    activation: str = "",
    out_factor: float = 1.0,
    triton: bool = False,
) -> Tensor:
    from cnncomp.ops import cuda

    shape = conv_out_shape(x, constants.shape[1], kernel_size, stride, padding, dilation)
    check_operands(x, weight, constants, residual, shape, out_dtype, HALVES)
    check_activation(activation, out_factor)
    check_residual_scale(residual, residual_scale)
    _check_channels(x.shape[1], shape[1], groups)
    _check_shape(weight, (shape[1], *kernel_size, x.shape[1] // groups))
    check_elements(x=x.shape, weight=weight.shape, out=shape)
    return cuda.conv2d_int8(
        x, weight, constants, residual, residual_scale, lo, stride, padding, dilation, groups, out_dtype, activation,
        out_factor, triton,
    )  # fmt: skip


#: The operators, and the same that on a GPU run Triton's kernels where others could.
TWINS = {"": False, "_triton": True}
for _twin, _triton in TWINS.items():
    _cuda = partial(_conv_cuda, triton=_triton)
    define(f"conv2d_int8{_twin}", CONV_SCHEMA.replace(")", ACTIVATION_SCHEMA), _conv_fake, _conv_cpu, _cuda)


def _linear_fake(
    x: Tensor,
    weight: Tensor,
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
    weight: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    out_dtype: torch.dtype,
    activation: str = "",
    out_factor: float = 1.0,
) -> Tensor:
    from cnncomp import _cpu

    shape = (*x.shape[:-1], constants.shape[1])
    check_operands(x, weight, constants, residual, shape, out_dtype, HALVES)
    check_activation(activation, out_factor)
    check_residual_scale(residual, residual_scale)
    c, k = x.shape[-1], shape[-1]
    _check_packed(weight, c, k, (1, 1), 1)
    out = torch.empty(shape, dtype=kernel_dtype(out_dtype))
    if out.numel() == 0:
        return out.to(out_dtype)
    x = x.contiguous()
    residual = contiguous(_widened(residual))
    _cpu.conv2d_int8(
        x.data_ptr(), x.dtype == torch.int8, x.numel() // c, 1, 1, c,
        weight.data_ptr(), k, 1, 1, 1, 1, 0, 0, 1, 1, 1, False,
        constants.data_ptr(),
        pointer(residual), 0 if residual is None else DTYPE_CODE[residual.dtype], residual_scale, lo,
        out.data_ptr(), DTYPE_CODE[out.dtype], num_threads(), constants.shape[0] == 4,
        ACTIVATION_CODE[activation], out_factor,
    )  # fmt: skip
    return out.to(out_dtype)


def _linear_cuda(
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    out_dtype: torch.dtype,
    activation: str = "",
    out_factor: float = 1.0,
    triton: bool = False,
) -> Tensor:
    from cnncomp.ops import cuda

    check_operands(x, weight, constants, residual, (*x.shape[:-1], constants.shape[1]), out_dtype, HALVES)
    check_activation(activation, out_factor)
    check_residual_scale(residual, residual_scale)
    _check_shape(weight, (constants.shape[1], x.shape[-1]))
    check_elements(x=x.shape, weight=weight.shape, out=(*x.shape[:-1], constants.shape[1]))
    rest = (residual_scale, lo, out_dtype, activation, out_factor, triton)
    return cuda.linear_int8(x, weight, constants, residual, *rest)


for _twin, _triton in TWINS.items():
    _cuda = partial(_linear_cuda, triton=_triton)
    define(f"linear_int8{_twin}", LINEAR_SCHEMA.replace(")", ACTIVATION_SCHEMA), _linear_fake, _linear_cpu, _cuda)
