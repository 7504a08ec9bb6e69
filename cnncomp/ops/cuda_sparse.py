"""Launch of the CUDA kernels with packed sparse weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError, DeviceError
from cnncomp.ops import cuda
from cnncomp.ops.library import check_elements, conv_out_size
from cnncomp.ops.packed import Format
from cnncomp.sparsity import vectors, vnm
from cnncomp.sparsity.steps import view_steps
from cnncomp.sparsity.weights import CHUNK_BYTES, too_many_taps, why_not

#: Formats whose kernels gather activations that lie channel by channel in units of images.
GATHERED = {"vectors": vectors, "vnm": vnm}
#: Kernel size, stride and padding of a convolution that looks at each pixel alone.
POINTWISE = ((1, 1), (1, 1), (0, 0))


def check_device(device: torch.device) -> None:
    """Raise :class:`DeviceError` where no kernel of this build multiplies packed sparse weights."""
    if device.type != "cuda":
        raise DeviceError("x", device, "an NVIDIA GPU")
    if torch.cuda.get_device_capability(device) < (8, 0) or cuda.backend(device) != "cuda":
        raise DeviceError("x", device, "a GPU of sm_80 or later that this build's CUDA kernels are for")


def check_triton(device: torch.device) -> None:
    """Raise :class:`DeviceError` where Triton's kernels can't multiply packed sparse weights."""
    if not cuda.has_triton(device):
        raise DeviceError("x", device, "an NVIDIA GPU of sm_80 or later, with Triton 3 installed")


@functools.cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


def _launch_arguments(x: Tensor) -> tuple[int, int, int, int]:
    """Device index, stream handle, number of multiprocessors, bytes of shared memory of one."""
    return (*cuda._launch_arguments(x), _shared(x.device))


def conv2d(
    name: str,
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out_dtype: torch.dtype,
    out_units: bool = False,
) -> Tensor:
    """Convolution with packed sparse weights. No synchronisation.

    Args:
        name: Of the format: "sparse24", "blocks", "vectors" or "vnm".
        x: (N, C, H, W) uint8, int8, float16 or bfloat16; channels_last, or it is copied; for "vectors" and "vnm" in units of
            images, or it is copied into them.
        weight: From :func:`cnncomp.sparsity.pack_2to4`, :func:`cnncomp.sparsity.pack_gathered`,
            :func:`cnncomp.sparsity.pack_vectors` or :func:`cnncomp.sparsity.pack_vnm`, int8 or of x's dtype.
        constants: (3, K) float32: scale, bias, hi.
        residual: Shape of the output; float32, or 8-bit beside an 8-bit x, or of x's dtype; in units or not, copied where the
            output is the other; None for none.
        residual_scale: Factor of the residual.
        lo: Lower clamp.
        kernel_size, stride, padding, dilation: (vertical, horizontal).
        groups: G.
        out_dtype: As the residual's.
        out_units: Give the output in units of images, of "vectors" and "vnm" alone: as :func:`units_fit` says; out_dtype and
            the residual have elements of x's size.

    Returns:
        (N, K, P, Q) of ``out_dtype``, channels_last; with ``out_units`` in units.

    Raises:
        DeviceError: a device before sm_80.
        ArgumentError: input channels of a group that are no multiple of 16 bytes (but for "vectors" and "vnm"), more than 15
            rows or columns of taps, 2^31 bytes of input, types that do not belong together, an output that does not fit into
            units.
    """
    gathered, in_units = name in GATHERED, x.dim() > 4
    n, c, h, w = vectors.image_shape(x) if in_units else x.shape
    if reason := too_many_taps(kernel_size) if gathered else why_not(c, kernel_size, groups, x.itemsize):
        raise ArgumentError("weight", f"{c} channels, {tuple(kernel_size)} taps, {groups} groups", reason)
    p, q = (conv_out_size((h, w)[i], kernel_size[i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    shape = (n, constants.shape[1], p, q)
    if out_units:
        check_units_fit(name, x.dtype, shape, groups)
        out = x.new_empty(GATHERED[name].units_shape(shape, out_dtype), dtype=out_dtype)
    else:
        out = torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    check_device(x.device)
    weight, constants = _aligned(weight.contiguous()), constants.contiguous()
    if residual is not None:
        residual = to_units(name, residual) if out_units else from_units(residual)
    given, more = tuple(x.shape), (out_units,) if gathered else ()
    launch = getattr(cuda._module(), f"conv2d_{name}_{'int8' if x.itemsize == 1 else 'f16'}")
    try:
        if gathered:
            if not (in_units or out_units) and (tuple(kernel_size), tuple(stride), tuple(padding)) == POINTWISE:
                # Pixels are looked at alone, so they are images: whatever the batch, units are full.
                x, (n, h, w) = x.permute(0, 2, 3, 1).reshape(-1, c, 1, 1), (n * h * w, 1, 1)
            x = to_units(name, x, groups)
            c = len(x) * GATHERED[name].columns(x.dtype)
        else:
            x = _aligned(x.contiguous(memory_format=torch.channels_last))
        launch(
            *_launch_arguments(x), x.data_ptr(), cuda._DTYPE_CODE[x.dtype], n, h, w, c, weight.data_ptr(), shape[1],
            *kernel_size, *stride, *padding, *dilation, groups,
            *cuda._epilogue_arguments(constants, residual, residual_scale, lo, out), *more,
        )  # fmt: skip
    except ValueError as error:  # the plan refuses sizes and types before anything is launched
        raise ArgumentError("x", f"shape {given}", str(error)) from None
    return out


def units_fit(name: str, dtype: torch.dtype, images: int, channels: int, groups: int) -> bool:
    """Whether images of so many channels, the output of a convolution in ``groups``, can lie in a format's units: units are
    full, and threads have whole vectors of channels."""
    fmt = GATHERED[name]
    return images % fmt.unit(dtype, images) == 0 and channels // groups % fmt.VECTOR == 0


def check_units_fit(name: str, dtype: torch.dtype, shape: Sequence[int], groups: int) -> None:
    """Refuse ``out_units`` for an output (N, K, P, Q) that does not fit into any."""
    if name not in GATHERED or not units_fit(name, dtype, shape[0], shape[1], groups):
        raise ArgumentError(
            "out_units", f"{name}, an output {tuple(shape)}", "whole units of images, vectors of channels"
        )


def to_units(name: str, x: Tensor, groups: int = 1) -> Tensor:
    """Images (N, C, H, W) in a format's units, where they don't lie in them already. torch copies channels that are no whole
    pieces of 16 bytes."""
    if x.dim() > 4:
        return x
    n, c, h, w = x.shape
    fmt = GATHERED[name]
    columns, images = fmt.columns(x.dtype), fmt.unit(x.dtype, n)
    if c * x.itemsize % CHUNK_BYTES or c // groups % columns:
        return fmt.to_units(x, groups)
    x = _aligned(x.contiguous(memory_format=torch.channels_last))
    units = x.new_empty((c // columns, -(-n // images), h, w, images, *[columns] * (columns > 1)))
    arguments = (x.data_ptr(), cuda._DTYPE_CODE[x.dtype], n, h, w, c, units.data_ptr())
    copy = cuda._module().to_byte_units if name == "vnm" and x.itemsize == 1 else cuda._module().to_units
    copy(*cuda._launch_arguments(x)[:2], *arguments)
    return units


def from_units(x: Tensor) -> Tensor:
    """Images (N, C, H, W), channels_last, where they don't lie so already."""
    return vectors.from_units(x) if x.dim() > 4 else x.contiguous(memory_format=torch.channels_last)


def _aligned(x: Tensor) -> Tensor:
    """``x``, copied where it does not begin at a multiple of 16 bytes; the copy has its strides."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def conv2d_triton(
    fmt: Format,
    shape: Sequence[int],
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out_dtype: torch.dtype,
    out_units: bool = False,
) -> Tensor:
    """As :func:`conv2d`, on Triton's kernel: any number of channels, input and residual in units or not.

    Args:
        fmt: With a ``block``.
        shape: (K, C/G, R, S) of the unpacked weight.
        weight: From :func:`cnncomp.sparsity.steps.pack_steps`.

    Raises:
        DeviceError: no Triton, a device before sm_80.
        ArgumentError: more elements than the kernel counts.
    """
    assert fmt.block
    check_triton(x.device)
    dtype = torch.int8 if x.itemsize == 1 else x.dtype
    rows, cols = fmt.block(dtype)
    check_elements(x=x.shape, weight=weight.shape, out=(x.numel() // shape[1] // groups, shape[0]))
    from cnncomp.kernels.conv2d_steps import conv2d_steps

    steps = view_steps(_aligned(weight.contiguous()), shape, dtype, rows, cols, groups)
    x = x if cols == 1 else from_units(x)
    residual = None if residual is None else from_units(residual)
    out = conv2d_steps(
        x, steps, constants, residual, residual_scale, lo, kernel_size, stride, padding, dilation, groups, out_dtype
    )
    return fmt.units.to_units(out) if out_units and fmt.units else out


def linear(name: str, *operands: Any) -> Tensor:
    """:func:`as_images` of :func:`conv2d` with weights of the format ``name``."""
    return as_images(functools.partial(conv2d, name), *operands)


def as_images(
    conv: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Linear with packed sparse weights: ``x`` (..., C), output (..., K); otherwise as ``conv``, the convolution."""
    c, k = x.shape[-1], constants.shape[1]
    image = x.reshape(-1, c, 1, 1)
    res = None if residual is None else residual.reshape(-1, k, 1, 1)
    one = (1, 1)
    where = (one, one, (0, 0), one, 1)
    out = conv(image, weight, constants, res, residual_scale, lo, *where, out_dtype)
    return out.reshape(*x.shape[:-1], k)
