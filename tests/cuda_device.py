"""The emulator in the place of a device: the launch glue of cnncomp.ops.cuda runs on CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from cnncomp.ops import cuda
from tests import cuda_emulated as emulated
from tests.ptx import GlobalMemory

try:
    from cnncomp import _cuda
except ImportError:  # built without nvcc
    _cuda = None  # type: ignore[assignment]


def host_bytes(pointer: int, size: int) -> np.ndarray:
    """Memory of this process as an array."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))


class EmulatedModule:
    """Stands in for the extension module: takes host pointers, plans with the real one, runs in the emulator."""

    WORKSPACE_BYTES = _cuda.WORKSPACE_BYTES if _cuda else 0

    def capture_id(self, device: int, stream: int) -> int:
        return 0

    def conv2d_int8(self, device: int, stream: int, multiprocessors: int, *arguments: Any) -> None:
        names = (
            "x x_signed n h w c weight k r s stride_h stride_w pad_h pad_w dil_h dil_w groups constants residual "
            "residual_dtype residual_scale lo out out_dtype workspace workspace_bytes tile parts"
        )
        a = dict(zip(names.split(), arguments, strict=True))
        p, q = (
            (a[size] + 2 * a[f"pad_{i}"] - a[f"dil_{i}"] * (a[kernel] - 1) - 1) // a[f"stride_{i}"] + 1
            for i, size, kernel in (("h", "h", "r"), ("w", "w", "s"))
        )
        weights = a["k"] * a["r"] * a["s"] * a["c"] // a["groups"]
        self._run(
            _cuda.plan_conv2d_int8, multiprocessors, a, a["n"] * a["h"] * a["w"] * a["c"], weights, a["n"] * p * q
        )

    def linear_int8(self, device: int, stream: int, multiprocessors: int, *arguments: Any) -> None:
        names = (
            "x x_signed m c weight k constants residual residual_dtype residual_scale lo out out_dtype workspace "
            "workspace_bytes tile parts"
        )
        a = dict(zip(names.split(), arguments, strict=True))
        self._run(_cuda.plan_linear_int8, multiprocessors, a, a["m"] * a["c"], a["k"] * a["c"], a["m"])

    def _run(self, plan: Any, multiprocessors: int, a: dict[str, Any], x: int, weights: int, pixels: int) -> None:
        size_of = (1, 1, 4)
        sizes = {"x": x, "weight": weights, "constants": 12 * a["k"], "out": pixels * a["k"] * size_of[a["out_dtype"]]}
        if a["residual"]:
            sizes["residual"] = pixels * a["k"] * size_of[a["residual_dtype"]]
        if a["workspace"]:
            sizes["workspace"] = a["workspace_bytes"]
        memory = GlobalMemory()
        host = {name: host_bytes(a[name], size) for name, size in sizes.items()}
        placed = a | {name: memory.allocate(view) for name, view in host.items()}
        emulated.run_planned(plan(multiprocessors, *placed.values()), "80", memory)
        for name in {"out", "workspace"} & host.keys():
            host[name][:] = memory.fetch(placed[name], host[name])


@contextlib.contextmanager
def emulated_device() -> Iterator[None]:
    """While this lasts, cnncomp.ops.cuda takes CPU tensors and launches in the emulator, as an sm_80 of 108 multiprocessors."""
    with (
        mock.patch.object(cuda, "backend", lambda device: "cuda"),
        mock.patch.object(cuda, "_cuda", EmulatedModule()),
        mock.patch.object(cuda, "_launch_arguments", lambda x: (0, 0, 108)),
    ):
        yield
