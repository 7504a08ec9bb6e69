"""Choice and launch of the GPU kernels: CUDA C++ where this build has machine code for the device, else Triton."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cnncomp.errors import DeviceError
from cnncomp.kernels import available
from cnncomp.ops import reference
from cnncomp.ops.conv2d_int8 import ACTIVATION_CODE
from cnncomp.ops.library import contiguous, conv_out_shape, conv_out_size, pool_out_shape
from cnncomp.ops.packing import PackedSparse
from cnncomp.sparsity.blocks import PackedBlocks, pack_blocks, unpack_blocks

try:
    from cnncomp import _cuda
except ImportError:  # built without nvcc
    _cuda = None  # type: ignore[assignment]

_DTYPE_CODE = {torch.uint8: 0, torch.int8: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}


@functools.cache
def backend(device: torch.device) -> str:
    """ "cuda" or "triton": what runs the int8 kernels on this device. Warns, once, where this build has no CUDA kernels for it.

    Raises:
        DeviceError: neither can.
    """
    if _cuda is not None and _cuda.supports(_index(device)):
        return "cuda"
    if has_triton(device):
        if _cuda is not None:
            major, minor = torch.cuda.get_device_capability(device)
            message = f"this build has no CUDA kernels for {device}, sm_{major}{minor}: Triton's run there"
            warnings.warn(message, UserWarning, stacklevel=2)
        return "triton"
    raise DeviceError("x", device, "a device that this build's CUDA kernels or Triton 3 (sm_80 and later) can run on")


@functools.cache
def has_both(device: torch.device) -> bool:
    """Whether the int8 kernels of CUDA C++ and Triton's can run on this device: which is faster is for measurement to say."""
    return has_triton(device) and _cuda is not None and _cuda.supports(_index(device))


def has_triton(device: torch.device) -> bool:
    """Whether Triton's int8 kernels can run on this device: it has no int8 dot before sm_80."""
    return device.type == "cuda" and available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _module() -> ModuleType:
    assert _cuda is not None
    return _cuda


def _launch_arguments(x: Tensor) -> tuple[int, int, int]:
    """Device index, stream handle and number of multiprocessors."""
    return _index(x.device), torch.cuda.current_stream(x.device).cuda_stream, _multiprocessors(x.device)


@functools.lru_cache(maxsize=8)
def _workspace(device: torch.device, stream: int, capture: int) -> Tensor:
    """Zeros that kernels of one stream may use in turn, and leave as zeros: room for sums that thread blocks share.

    Calls that are captured into a graph have a workspace of their own, for the graph may be replayed on another stream. It is
    made, and so zeroed, within the graph.
    """
    return torch.zeros(_module().WORKSPACE_BYTES // 4, dtype=torch.int32, device=device)


def _workspace_arguments(device: torch.device, index: int, stream: int) -> tuple[int, int]:
    """Address and bytes of a stream's workspace."""
    space = _workspace(device, stream, _module().capture_id(index, stream))
    return space.data_ptr(), space.nbytes


#: The plan chooses the tile, and how many blocks share the reduction of one.
_NO_WISH = ("", 0)


def _epilogue_arguments(
    constants: Tensor, residual: Tensor | None, residual_scale: float, lo: float, out: Tensor
) -> tuple[int, int, int, float, float, int, int]:
    pointer, code = (0, 0) if residual is None else (residual.data_ptr(), _DTYPE_CODE[residual.dtype])
    return constants.data_ptr(), pointer, code, residual_scale, lo, out.data_ptr(), _DTYPE_CODE[out.dtype]


def _mean_shift(
    x: Tensor,
    shift: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``shift`` (K,) times the sum of ``x`` under each output's window: (N, K, P, Q) float32, channels_last."""
    n, c, h, w = x.shape
    k, (r, s) = len(shift), kernel_size
    if backend(x.device) == "triton":
        ones = torch.ones((groups, c // groups, r, s), dtype=torch.float64, device=x.device)
        where = (None, list(stride), list(padding), list(dilation), groups)
        window = torch.nn.functional.conv2d(x.double(), ones, *where).float().repeat_interleave(k // groups, 1)
        return (shift.view(-1, 1, 1) * window).contiguous(memory_format=torch.channels_last)
    shape = conv_out_shape(x, k, kernel_size, stride, padding, dilation)
    out = torch.empty(shape, device=x.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    x, shift = x.contiguous(memory_format=torch.channels_last), shift.contiguous()
    index, start, _ = _launch_arguments(x)
    _module().mean_shift_int8(
        index, start, x.data_ptr(), _DTYPE_CODE[x.dtype], n, h, w, c, k, r, s, *stride, *padding, *dilation, groups,
        shift.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def _shifted(
    run: Callable[..., Tensor],
    mean_shift: Callable[[Tensor], Tensor],
    geometry: tuple[Any, ...],
    constants: Tensor,
    channels: tuple[int, ...],
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    out_dtype: torch.dtype,
    activation: str,
    out_factor: float,
) -> Tensor:
    """A layer with mean-shift weights: what the shift adds goes through the kernel as a float residual. A residual of the
    layer's own comes behind that, so then the kernel gives floats and the last steps are torch's.

    Args:
        run: The layer, from its constants on.
        mean_shift: What ``shift`` (K,) adds.
        geometry: The layer's arguments between ``lo`` and ``out_dtype``.
        channels: The shape in which a row of ``constants`` broadcasts to the output.
    """
    plain, addend = constants[:3], mean_shift(constants[3])
    if residual is None:
        return run(plain, addend, 1.0, lo, *geometry, out_dtype, activation, out_factor)
    unclamped = plain.clone()
    unclamped[2] = math.inf
    t = run(unclamped, addend, 1.0, -math.inf, *geometry, torch.float32)
    t = t + residual.float() * torch.tensor(residual_scale, dtype=torch.float32)
    return reference.finish(t, lo, plain[2].view(channels), out_dtype, activation, out_factor)


def conv2d_int8(
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out_dtype: torch.dtype,
    activation: str = "",
    out_factor: float = 1.0,
    triton: bool = False,
) -> Tensor:
    """int8 convolution on the GPU. No synchronisation; allocates only the output, and once for each stream the workspace, so it
    may be captured.

    Args:
        x: (N, C, H, W) uint8 or int8; channels_last, or it is copied.
        weight: (K, R, S, C/G) int8.
        constants: (3, K) float32: scale, bias, hi; (4, K) with a shift, for mean-shift weights.
        residual: Shape of the output, uint8, int8, float32, float16 or bfloat16; or None.
        residual_scale: Factor of the residual.
        lo: Lower clamp.
        stride, padding, dilation: (vertical, horizontal).
        groups: G.
        out_dtype: uint8, int8, float32, float16 or bfloat16.
        activation: "silu", "hardswish" or "".
        out_factor: Behind the activation, before the clamp.
        triton: Triton's kernel, where others could run too.

    Returns:
        (N, K, P, Q) of ``out_dtype``, channels_last.

    Raises:
        DeviceError: no kernel for this device.
    """
    if constants.shape[0] == 4:
        geometry = (stride, padding, dilation, groups)
        return _shifted(
            functools.partial(conv2d_int8, x, weight, triton=triton),
            lambda shift: _mean_shift(x, shift, (weight.shape[1], weight.shape[2]), *geometry),
            geometry, constants, (-1, 1, 1), residual, residual_scale, lo, out_dtype, activation, out_factor,
        )  # fmt: skip
    if triton or backend(x.device) == "triton":
        from cnncomp.kernels.conv2d_int8 import conv2d_int8 as launch

        args = (x, weight, constants, residual, residual_scale, lo, stride, padding, dilation, groups, out_dtype)
        return launch(*args, activation, out_factor)
    n, c, h, w = x.shape
    k, r, s, _ = weight.shape
    p = conv_out_size(h, r, stride[0], padding[0], dilation[0])
    q = conv_out_size(w, s, stride[1], padding[1], dilation[1])
    out = torch.empty((n, k, p, q), dtype=out_dtype, device=x.device, memory_format=torch.channels_last)
    x, weight, constants = x.contiguous(memory_format=torch.channels_last), weight.contiguous(), constants.contiguous()
    residual = contiguous(residual, torch.channels_last)
    index, stream, multiprocessors = _launch_arguments(x)
    _module().conv2d_int8(
        index, stream, multiprocessors, x.data_ptr(), x.dtype == torch.int8, n, h, w, c, weight.data_ptr(), k, r, s,
        *stride, *padding, *dilation, groups, *_epilogue_arguments(constants, residual, residual_scale, lo, out),
        *_workspace_arguments(x.device, index, stream), *_NO_WISH, ACTIVATION_CODE[activation], out_factor,
    )  # fmt: skip
    return out


def linear_int8(
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
    """int8 linear on the GPU: ``x`` (..., C), ``weight`` (K, C), output (..., K); otherwise as :func:`conv2d_int8`."""
    if constants.shape[0] == 4:
        one = ((1, 1), (0, 0), (1, 1), 1)
        return _shifted(
            functools.partial(linear_int8, x, weight, triton=triton),
            lambda shift: _mean_shift(x.reshape(-1, x.shape[-1], 1, 1), shift, (1, 1), *one).reshape(*x.shape[:-1], -1),
            (), constants, (-1,), residual, residual_scale, lo, out_dtype, activation, out_factor,
        )  # fmt: skip
    if triton or backend(x.device) == "triton":
        from cnncomp.kernels.gemm_int8 import linear_int8 as launch

        args = (x, weight, constants, residual, residual_scale, lo, out_dtype)
        return launch(*args, activation, out_factor)
    c, k = x.shape[-1], weight.shape[0]
    out = torch.empty((*x.shape[:-1], k), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, weight, constants = x.contiguous(), weight.contiguous(), constants.contiguous()
    residual = contiguous(residual)
    index, stream, multiprocessors = _launch_arguments(x)
    _module().linear_int8(
        index, stream, multiprocessors, x.data_ptr(), x.dtype == torch.int8, x.numel() // c, c, weight.data_ptr(), k,
        *_epilogue_arguments(constants, residual, residual_scale, lo, out),
        *_workspace_arguments(x.device, index, stream), *_NO_WISH, ACTIVATION_CODE[activation], out_factor,
    )  # fmt: skip
    return out


def quantize(x: Tensor, inv_scale: float, dtype: torch.dtype) -> Tensor:
    """``x`` of any shape, float32, float16 or bfloat16, in 8 bit (:func:`cnncomp.ops.reference.quantize`), images as
    channels_last."""
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    if backend(x.device) == "triton":
        return reference.quantize(x, inv_scale, dtype).contiguous(memory_format=layout)
    out = torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=layout)
    if out.numel() == 0:
        return out
    planes = x.dim() == 4 and x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
    if planes:
        n, c, pixels = *x.shape[:2], x.shape[2] * x.shape[3]
    else:
        x = x.contiguous(memory_format=layout)
        n, c, pixels = (x.shape[0], x.shape[1], x.shape[2] * x.shape[3]) if x.dim() == 4 else (1, 1, x.numel())
    index, stream, _ = _launch_arguments(x)
    source = (x.data_ptr(), _DTYPE_CODE[x.dtype], n, pixels, c, not planes)
    _module().quantize(index, stream, *source, inv_scale, out.data_ptr(), _DTYPE_CODE[dtype])
    return out


def max_pool2d_int8(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> Tensor:
    """Max-pool of 8-bit ``x`` (N, C, H, W): (N, C, P, Q), channels_last."""
    if backend(x.device) == "triton":
        return reference.max_pool2d_int8(x, kernel_size, stride, padding, dilation, ceil_mode)
    n, k, p, q = pool_out_shape(x, kernel_size, stride, padding, dilation, ceil_mode)
    out = torch.empty((n, k, p, q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    x = x.contiguous(memory_format=torch.channels_last)
    index, stream, _ = _launch_arguments(x)
    _module().max_pool2d_int8(
        index, stream, p, q, x.data_ptr(), _DTYPE_CODE[x.dtype], n, x.shape[2], x.shape[3], k, *kernel_size, *stride,
        *padding, *dilation, out.data_ptr(),
    )  # fmt: skip
    return out


def mean_pool2d(x: Tensor) -> Tensor:
    """The mean of each channel of float32 ``x`` (N, C, H, W): (N, C, 1, 1). Of channels_last, each channel is summed in
    the order of its pixels, and times 1 / pixels; others are torch's."""
    n, c, h, w = x.shape
    last = x.is_contiguous(memory_format=torch.channels_last)
    if backend(x.device) == "triton" or not last:
        return torch.nn.functional.adaptive_avg_pool2d(x, 1)
    out = torch.empty((n, c, 1, 1), dtype=x.dtype, device=x.device)
    if out.numel():
        index, stream, _ = _launch_arguments(x)
        _module().mean_pool2d(index, stream, x.data_ptr(), _DTYPE_CODE[x.dtype], n, h, w, c, out.data_ptr())
    return out


#: Output channels that share an index list on the GPU: one side of a tensor-core tile, the least that the kernel takes.
SPARSE_RUN = 16


def pack_sparse(weight: Tensor, groups: int = 1) -> PackedSparse:
    """Pack a masked float32 weight (K, C/G, R, S) for the GPU: the fields hold what :func:`cnncomp.sparsity.pack_blocks` calls
    values, positions and block_ptr, and ``block`` the length of a run of outputs."""
    return PackedSparse(*pack_blocks(weight.detach().float(), SPARSE_RUN, 1, groups), SPARSE_RUN)


def unpack_sparse(packed: PackedSparse, shape: Sequence[int], groups: int = 1) -> Tensor:
    """The inverse of :func:`pack_sparse`: the weight of ``shape`` (K, C/G, R, S)."""
    return unpack_blocks(PackedBlocks(*packed[:3]), shape, groups)


def conv2d_sparse(
    x: Tensor,
    packed: PackedSparse,
    out_channels: int,
    kernel_size: Sequence[int],
    bias: Tensor | None,
    residual: Tensor | None,
    lo: float,
    hi: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Sparse fp32 convolution on the GPU: (N, C, H, W) to (N, K, P, Q), contiguous.

    Raises:
        DeviceError: no Triton.
    """
    sparse = _sparse_kernels(x)
    weight = PackedBlocks(*packed[:3])
    return sparse.conv2d_sparse(
        x, weight, out_channels, kernel_size, bias, residual, lo, hi, stride, padding, dilation, groups
    )


def _sparse_kernels(x: Tensor) -> ModuleType:
    if not available():
        raise DeviceError("x", x.device, "a CPU, or a GPU with Triton 3 installed: the sparse kernel needs it")
    from cnncomp.kernels import conv2d_sparse

    return conv2d_sparse
