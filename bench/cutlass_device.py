"""Launches CUTLASS's kernels on the GPU of this machine: the PTX and parameters that the emulator gets, by the CUDA driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from bench.cutlass_kernels import Planned, Variant, build, plan
from bench.peers_cutlass import TORCH

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        raise RuntimeError(f"{name} failed with CUresult {code}")


@cache
def function(variant: Variant, shared: int) -> ctypes.c_void_p:
    """The kernel, loaded into the current context, which may use ``shared`` bytes of shared memory."""
    built = build(variant)
    module, found = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), built.ptx.read_bytes() + b"\0")
    _call("cuModuleGetFunction", ctypes.byref(found), module, built.program.kernel.name.encode())
    _call("cuFuncSetAttribute", found, _MAX_DYNAMIC_SHARED, shared)
    return found


def launch(variant: Variant, planned: Planned, stream: int) -> None:
    """Launch on a stream of torch's device."""
    parameter = ctypes.create_string_buffer(planned.parameter, len(planned.parameter))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameter))
    _call(
        "cuLaunchKernel", function(variant, planned.shared), *planned.grid, planned.threads, 1, 1, planned.shared,
        ctypes.c_void_p(stream), pointers, None,
    )  # fmt: skip


def conv(variant: Variant, sizes: tuple[int, ...]) -> Callable[[], None]:
    """A function that launches a convolution on random tensors of the device.

    Args:
        variant: A kernel with source "conv".
        sizes: n, h, w, c, k, r, s, padding, stride, dilation.
    """
    n, h, w, c, k, r, s, padding, stride, dilation = sizes
    p, q = ((size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1 for size, taps in ((h, r), (w, s)))
    shapes = ((n, h, w, c), (k, r, s, c), (k,), (n, p, q, k))
    kinds = (variant.dtype, variant.dtype, variant.output, variant.output)
    tensors = [
        torch.randint(-3, 4, shape, device="cuda").to(TORCH[kind]) for shape, kind in zip(shapes, kinds, strict=True)
    ]
    planned = plan(variant, sizes, [t.data_ptr() for t in tensors])

    def call(keep: list[torch.Tensor] = tensors) -> None:
        launch(variant, planned, torch.cuda.current_stream().cuda_stream)

    return call
