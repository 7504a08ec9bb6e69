"""The operator library ``torch.ops.cnncomp``: how an operator is defined, and the checks that all of them share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError, DeviceError, DtypeError, InferenceOnlyError, OverflowRiskError

LIBRARY = torch.library.Library("cnncomp", "DEF")

#: Longest sum of u8 x s8 products that always fits int32: floor((2**31 - 1) / (255 * 127)).
MAX_REDUCTION = 66_311

#: Of a tensor that a GPU's int8 kernels take or give.
MAX_ELEMENTS = 2**31 - 1

#: (vertical, horizontal); torch passes lists.
Pair = tuple[int, int]

DTYPE_CODE = {torch.uint8: 0, torch.int8: 1, torch.float32: 2}

_NO_BACKWARD = (
    "cnncomp::{name} is for inference and has no gradient. Train the model before cnncomp.convert (pruned and quantised "
    "models train as they are), or call the converted one under torch.no_grad() with inputs that need no gradient."
)


def define(
    name: str,
    schema: str,
    fake: Callable[..., Tensor],
    cpu: Callable[..., Tensor],
    cuda: Callable[..., Tensor] | None = None,
) -> None:
    """Register ``cnncomp::name`` with its fake function and implementations.

    No operator has a gradient. One that returns floats raises in its backward; one that returns 8 bit could only lose the
    gradient in silence, so its forward raises when an input needs one.
    """
    LIBRARY.define(name + schema)
    torch.library.register_fake(f"cnncomp::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None:
        LIBRARY.impl(name, cuda, "CUDA")
    message = _NO_BACKWARD.format(name=name)

    def backward(ctx: object, *grads: Tensor) -> None:
        raise InferenceOnlyError(message)

    def setup_context(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
        if not output.dtype.is_floating_point:
            raise InferenceOnlyError(message)

    torch.library.register_autograd(f"cnncomp::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def num_threads() -> int:
    """Threads for a kernel: torch's own setting."""
    return torch.get_num_threads()


def check_dtype(name: str, x: Tensor, *expected: torch.dtype) -> None:
    """Raise :class:`DtypeError` unless ``x.dtype`` is one of ``expected``."""
    if x.dtype not in expected:
        raise DtypeError(name, x.dtype, " or ".join(str(d) for d in expected))


def check_same_device(x: Tensor, **others: Tensor | None) -> None:
    """Raise :class:`DeviceError` unless all tensors lie where ``x`` does."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise DeviceError(name, other.device, f"the input's device, {x.device}")


def check_float32(x: Tensor, **others: Tensor | None) -> None:
    """Raise unless all tensors are float32 and lie where ``x`` does."""
    for name, t in (("x", x), *others.items()):
        if t is not None:
            check_dtype(name, t, torch.float32)
    check_same_device(x, **others)


def check_reduction(length: int) -> None:
    """Raise unless a sum of ``length`` products of u8 and s8 always fits int32."""
    if length > MAX_REDUCTION:
        raise OverflowRiskError("weight", f"a reduction over {length} products", f"at most {MAX_REDUCTION} (int32)")


def check_residual(residual: Tensor | None, shape: Sequence[int]) -> None:
    """Raise :class:`ArgumentError` unless ``residual`` has the output's ``shape``."""
    if residual is not None and tuple(residual.shape) != tuple(shape):
        raise ArgumentError("residual", f"shape {tuple(residual.shape)}", f"the output's shape {tuple(shape)}")


def check_factor(name: str, value: float) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is a finite number above 0, as steps and their inverses are."""
    if not (math.isfinite(value) and value > 0):
        raise ArgumentError(name, value, "a finite number above 0")


def check_elements(**shapes: Sequence[int]) -> None:
    """Raise :class:`ArgumentError` for a tensor on a GPU of more elements than its kernels count."""
    for name, shape in shapes.items():
        if math.prod(shape) > MAX_ELEMENTS:
            raise ArgumentError(name, f"shape {tuple(shape)}", f"at most {MAX_ELEMENTS:,} elements")


def check_vector(name: str, x: Tensor | None, length: int) -> None:
    """Raise :class:`ArgumentError` unless ``x``, if it is there, is a vector of ``length`` values in one piece."""
    if x is not None and (tuple(x.shape) != (length,) or not x.is_contiguous()):
        raise ArgumentError(name, f"shape {tuple(x.shape)}, strides {x.stride()}", f"({length},), contiguous")


def check_contiguous(**tensors: Tensor) -> None:
    """Raise :class:`ArgumentError` unless each tensor's elements lie in one piece, as packed weights do."""
    for name, t in tensors.items():
        if not t.is_contiguous():
            raise ArgumentError(name, f"strides {t.stride()} of shape {tuple(t.shape)}", "a contiguous tensor")


def check_window(
    kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> None:
    """Raise :class:`ArgumentError` for a window that no convolution or pooling has."""
    for name, values, least in (
        ("kernel_size", kernel_size, 1), ("stride", stride, 1), ("dilation", dilation, 1), ("padding", padding, 0),
    ):  # fmt: skip
        if min(values) < least:
            raise ArgumentError(name, tuple(values), f"at least {least}")


def conv_out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output pixels along one axis of a convolution or pooling (floor mode)."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv_out_shape(
    x: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """Output shape (N, K, P, Q).

    Raises:
        ArgumentError: the input is not 4-D or smaller than the kernel; sizes of a window that are none.
    """
    check_window(kernel_size, stride, padding, dilation)
    if x.dim() != 4:
        raise ArgumentError("x", f"shape {tuple(x.shape)}", "4 dimensions (N, C, H, W)")
    p, q = (conv_out_size(x.shape[2 + i], kernel_size[i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    if p < 1 or q < 1:
        raise ArgumentError("x", f"shape {tuple(x.shape)}", f"an image no smaller than the kernel {tuple(kernel_size)}")
    return x.shape[0], out_channels, p, q


def pool_out_shape(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[int, int, int, int]:
    """Output shape (N, C, P, Q) of a pooling. With ``ceil_mode`` one more window where the last ones leave pixels and it begins
    before the padding behind the image; errors as :func:`conv_out_shape`."""
    n, c, *pixels = conv_out_shape(x, x.shape[1], kernel_size, stride, padding, dilation)
    for i in (0, 1) if ceil_mode else ():
        size, reach = x.shape[2 + i], dilation[i] * (kernel_size[i] - 1) + 1
        left = (size + 2 * padding[i] - reach) % stride[i]
        pixels[i] += bool(left and pixels[i] * stride[i] < size + padding[i])
    return n, c, pixels[0], pixels[1]


def contiguous(x: Tensor | None, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor | None:
    """``x.contiguous(...)``, None for None. Keep what it gives for as long as a kernel reads it."""
    return None if x is None else x.contiguous(memory_format=memory_format)


def pointer(x: Tensor | None) -> int:
    """Address of the first element, 0 for None."""
    return 0 if x is None else x.data_ptr()
