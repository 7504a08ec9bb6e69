"""Operators on weights in the GPU kernels' sparse formats: what 2:4 and gathered blocks share.

8-bit ones give the same numbers as :mod:`cnncomp.ops.conv2d_int8`, bit for bit; those of float16 and bfloat16 sum in float32,
and the result is float32 or of x's dtype, rounded once. On a CPU, which gains nothing by these formats, the weight is unpacked
and runs as a dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.ops.conv2d_int8 import (
    CONV_SCHEMA,
    LINEAR_SCHEMA,
    _conv_fake,
    _linear_fake,
    check_operands,
    check_unshifted,
)
from cnncomp.ops.library import check_dtype, check_residual, check_same_device, conv_out_shape, define
from cnncomp.ops.packing import pack_int8
from cnncomp.ops.reference import epilogue
from cnncomp.sparsity.steps import check_steps, unpack_steps
from cnncomp.sparsity.vectors import from_units, image_shape

Shape = tuple[int, int, int, int]


class Format(NamedTuple):
    """A sparse format.

    Attributes:
        name: As in the kernels' names.
        check: Raises unless a packed weight belongs to a logical shape (K, C/G, R, S), a dtype and a number of groups.
        unpack: The logical weight of a packed one, from the same arguments.
        units: Where the format's kernels gather activations, the module that lays them out in units of images.
        block: Of a format of Triton's kernels (:mod:`cnncomp.sparsity.steps`), outputs and inputs of a block of a dtype.
    """

    name: str
    check: Callable[[Tensor, Shape, torch.dtype, int], None]
    unpack: Callable[[Tensor, Shape, torch.dtype, int], Tensor]
    units: ModuleType | None = None
    block: Callable[[torch.dtype], tuple[int, int]] | None = None

    @property
    def suffix(self) -> str:
        """Of the operators' names."""
        return "_triton" if self.block else ""


def triton_format(
    name: str, block: Callable[[torch.dtype], tuple[int, int]], units: ModuleType | None = None
) -> Format:
    """The format of Triton's kernels for the same blocks as those of the format ``name``."""

    def check(packed: Tensor, shape: Shape, dtype: torch.dtype, groups: int) -> None:
        check_steps(packed, shape, dtype, *block(dtype), groups)

    def unpack(packed: Tensor, shape: Shape, dtype: torch.dtype, groups: int) -> Tensor:
        return unpack_steps(packed, shape, dtype, *block(dtype), groups)

    return Format(name, check, unpack, units, block)


def _check_halves(
    x: Tensor, weight: Tensor, constants: Tensor, residual: Tensor | None, shape: Sequence[int], out_dtype: torch.dtype
) -> None:
    check_dtype("x", x, torch.float16, torch.bfloat16)
    check_dtype("weight", weight, torch.int8)
    check_dtype("constants", constants, torch.float32)
    if out_dtype not in (x.dtype, torch.float32):
        raise ArgumentError("out_dtype", out_dtype, f"{x.dtype} or torch.float32")
    if residual is not None:
        check_dtype("residual", residual, x.dtype, torch.float32)
    check_same_device(x, weight=weight, constants=constants, residual=residual)
    check_residual(residual, shape)


def _images(t: Tensor) -> Tensor:
    """``t``, or of what lies in units one element in the shape of its images: to check operands by."""
    return t if t.dim() <= 4 else t.flatten()[:1].expand(image_shape(t))


def _nhwc(t: Tensor) -> Tensor:
    """``t`` as images (N, C, H, W)."""
    return t if t.dim() <= 4 else from_units(t)


def define_conv(fmt: Format, kind: str) -> None:
    """Register ``cnncomp::conv2d_<format>_<kind>``, ``_triton`` behind it for a format of Triton's; ``kind``: "int8" or "f16".
    Those that gather take activations in units of
    images too, and with a last argument ``out_units`` give them."""
    check_types = check_operands if kind == "int8" else _check_halves

    # rest: kernel size, stride, padding, dilation, groups, the output's dtype, and whether it is in units.
    def checked(x: Tensor, weight: Tensor, constants: Tensor, residual: Tensor | None, rest: tuple[Any, ...]) -> Shape:
        """The unpacked weight's shape, operands checked."""
        kernel_size, *geometry, groups, out_dtype = rest[:6]
        x, residual = _images(x), None if residual is None else _images(residual)
        shape = conv_out_shape(x, constants.shape[-1], kernel_size, *geometry)
        check_types(x, weight, constants, residual, shape, out_dtype)
        check_unshifted(constants)
        logical = (shape[1], x.shape[1] // groups, *kernel_size)
        fmt.check(weight, logical, torch.int8 if kind == "int8" else x.dtype, groups)
        return logical

    def laid_out(out: Tensor, dtype: torch.dtype, groups: int, out_units: bool = False) -> Tensor:
        """As the CUDA kernels give it for inputs of ``dtype``."""
        from cnncomp.ops.cuda_sparse import check_units_fit

        if not out_units or fmt.units is None:
            return out
        check_units_fit(fmt.name, dtype, out.shape, groups)
        return fmt.units.to_units(out)

    def fake(x: Tensor, weight: Tensor, constants: Tensor, *rest: Any) -> Tensor:
        out = _conv_fake(_images(x), weight, constants, *rest[:9])
        return out.new_empty(fmt.units.units_shape(out.shape, out.dtype)) if rest[9:] == (True,) and fmt.units else out

    def cpu(
        x: Tensor,
        weight: Tensor,
        constants: Tensor,
        residual: Tensor | None,
        residual_scale: float,
        lo: float,
        *rest: Any,
    ) -> Tensor:
        logical = checked(x, weight, constants, residual, rest)
        x, residual = _nhwc(x), None if residual is None else _nhwc(residual)
        _, stride, padding, dilation, groups, out_dtype = rest[:6]
        if kind == "int8":
            dense = pack_int8(fmt.unpack(weight, logical, torch.int8, groups), groups)
            out = torch.ops.cnncomp.conv2d_int8(x, dense, constants, residual, residual_scale, lo, *rest[:6])
            return laid_out(out, x.dtype, groups, *rest[6:])
        acc = F.conv2d(
            x.float(), fmt.unpack(weight, logical, x.dtype, groups).float(), None, stride, padding, dilation, groups
        )
        out = epilogue(acc, constants, residual, residual_scale, lo, out_dtype)
        return laid_out(out.contiguous(memory_format=torch.channels_last), x.dtype, groups, *rest[6:])

    def cuda(
        x: Tensor,
        weight: Tensor,
        constants: Tensor,
        residual: Tensor | None,
        residual_scale: float,
        lo: float,
        *rest: Any,
    ) -> Tensor:
        from cnncomp.ops import cuda_sparse

        logical = checked(x, weight, constants, residual, rest)
        launch = (
            partial(cuda_sparse.conv2d_triton, fmt, logical) if fmt.block else partial(cuda_sparse.conv2d, fmt.name)
        )
        return launch(x, weight, constants, residual, residual_scale, lo, *rest)

    schema = CONV_SCHEMA.replace(")", ", bool out_units=False)") if fmt.units else CONV_SCHEMA
    define(f"conv2d_{fmt.name}_{kind}{fmt.suffix}", schema, fake, cpu, cuda)


def define_linear_int8(fmt: Format) -> None:
    """Register ``cnncomp::linear_<format>_int8``, ``_triton`` behind it for a format of Triton's."""

    def checked(x: Tensor, weight: Tensor, constants: Tensor, residual: Tensor | None, out_dtype: torch.dtype) -> Shape:
        k = constants.shape[-1]
        check_operands(x, weight, constants, residual, (*x.shape[:-1], k), out_dtype)
        check_unshifted(constants)
        logical = (k, x.shape[-1], 1, 1)
        fmt.check(weight, logical, torch.int8, 1)
        return logical

    def cpu(
        x: Tensor,
        weight: Tensor,
        constants: Tensor,
        residual: Tensor | None,
        residual_scale: float,
        lo: float,
        out_dtype: torch.dtype,
    ) -> Tensor:
        logical = checked(x, weight, constants, residual, out_dtype)
        dense = pack_int8(fmt.unpack(weight, logical, torch.int8, 1))
        return torch.ops.cnncomp.linear_int8(x, dense, constants, residual, residual_scale, lo, out_dtype)

    def cuda(
        x: Tensor,
        weight: Tensor,
        constants: Tensor,
        residual: Tensor | None,
        residual_scale: float,
        lo: float,
        out_dtype: torch.dtype,
    ) -> Tensor:
        from cnncomp.ops import cuda_sparse

        logical = checked(x, weight, constants, residual, out_dtype)
        conv = partial(cuda_sparse.conv2d_triton, fmt, logical) if fmt.block else partial(cuda_sparse.conv2d, fmt.name)
        return cuda_sparse.as_images(conv, x, weight, constants, residual, residual_scale, lo, out_dtype)

    define(f"linear_{fmt.name}_int8{fmt.suffix}", LINEAR_SCHEMA, _linear_fake, cpu, cuda)
