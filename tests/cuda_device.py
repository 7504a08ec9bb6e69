"""The emulator in the place of a device: the launch glue of cnncomp.ops.cuda runs on CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from cnncomp.ops import cuda, cuda_sparse
from cnncomp.sparsity import gathered, vectors, vnm
from cnncomp.sparsity.two_four import packed_shape
from cnncomp.sparsity.weights import round_up
from tests import cuda_emulated as emulated
from tests.ptx import GlobalMemory

try:
    from cnncomp import _cuda
except ImportError:  # built without nvcc
    _cuda = None  # type: ignore[assignment]


def host_bytes(pointer: int, size: int) -> np.ndarray:
    """Memory of this process as an array."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))


CONV_NAMES = (
    "x x_signed n h w c weight k r s stride_h stride_w pad_h pad_w dil_h dil_w groups constants residual residual_dtype "
    "residual_scale lo out out_dtype"
)
WORKSPACE_NAMES = " workspace workspace_bytes tile parts activation out_factor"


def out_size(a: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of the output of a convolution with these arguments."""
    p, q = (
        (a[size] + 2 * a[f"pad_{size}"] - a[f"dil_{size}"] * (a[kernel] - 1) - 1) // a[f"stride_{size}"] + 1
        for size, kernel in (("h", "r"), ("w", "s"))
    )
    return p, q


class EmulatedModule:
    """Stands in for the extension module: takes host pointers, plans with the real one, runs in the emulator."""

    WORKSPACE_BYTES = _cuda.WORKSPACE_BYTES if _cuda else 0

    def capture_id(self, device: int, stream: int) -> int:
        return 0

    def conv2d_int8(self, device: int, stream: int, multiprocessors: int, *arguments: Any) -> None:
        a = dict(zip((CONV_NAMES + WORKSPACE_NAMES).split(), arguments, strict=True))
        weights = a["k"] * a["r"] * a["s"] * a["c"] // a["groups"]
        plan = functools.partial(_cuda.plan_conv2d_int8, multiprocessors)
        self._run(plan, a, a["n"] * a["h"] * a["w"] * a["c"], weights, a["n"] * math.prod(out_size(a)))

    def __getattr__(self, name: str) -> Any:
        """The kernels with packed sparse weights, by their names."""
        format, _, kind = name.removeprefix("conv2d_").partition("_")
        return functools.partial(self._packed, format, kind)

    def _packed(
        self, format: str, kind: str, device: int, stream: int, multiprocessors: int, shared: int, *arguments: Any
    ) -> None:
        names = CONV_NAMES + " out_units" * (format in cuda_sparse.GATHERED)
        a = dict(zip(names.split(), arguments, strict=True))
        dtype = torch.int8 if kind == "int8" else torch.float16
        logical, groups = (a["k"], a["c"] // a["groups"], a["r"], a["s"]), a["groups"]
        runs_of = {"vectors": vectors, "vnm": vnm}.get(format)
        if format == "sparse24":
            weights = math.prod(packed_shape(logical, dtype, groups))
        elif runs_of:
            runs = groups * -(-(a["k"] // groups) // runs_of.RUN)
            pieces = int(host_bytes(a["weight"], 4 * runs + 4).view(np.int32)[-1])
            weights = vectors.table_bytes(runs) + pieces * runs_of.piece_bytes(dtype)
        else:
            slices = groups * -(-(a["k"] // groups) // 64)
            steps = int(host_bytes(a["weight"], 4 * slices + 4).view(np.int32)[-1])
            weights = gathered.table_bytes(slices) + steps * gathered.STEP_BYTES
        plan = functools.partial(getattr(_cuda, f"plan_conv2d_{format}_{kind}"), multiprocessors, shared)
        images = round_up(a["n"], runs_of.unit(dtype, a["n"])) if runs_of else a["n"]
        x = images * a["h"] * a["w"] * a["c"] * dtype.itemsize
        self._run(plan, a, x, weights, a["n"] * math.prod(out_size(a)))

    def to_units(self, device: int, stream: int, *image: int) -> None:
        self._copy(_cuda.plan_to_units, vectors.UNIT, *image)

    def to_byte_units(self, device: int, stream: int, *image: int) -> None:
        self._copy(_cuda.plan_to_byte_units, vnm.unit(torch.int8, image[2]), *image)

    def _copy(self, plan: Any, unit: int, x: int, x_dtype: int, n: int, h: int, w: int, c: int, out: int) -> None:
        pixel = h * w * c * (1 if x_dtype < 2 else 2)
        memory, source, target = GlobalMemory(), host_bytes(x, n * pixel), host_bytes(out, round_up(n, unit) * pixel)
        placed = memory.allocate(source), x_dtype, n, h, w, c, memory.allocate(target)
        emulated.run_planned(plan(*placed), "80", memory)
        target[:] = memory.fetch(placed[-1], target)

    def quantize(self, device: int, stream: int, *arguments: Any) -> None:
        names = "x x_dtype n pixels c channels_last inv_scale out out_dtype"
        a = dict(zip(names.split(), arguments, strict=True))
        count = a["n"] * a["pixels"] * a["c"]
        self._pass(_cuda.plan_quantize, a, count * (4 if a["x_dtype"] == 2 else 2), count)

    def max_pool2d_int8(self, device: int, stream: int, *arguments: Any) -> None:
        names = "p q x x_dtype n h w c r s stride_h stride_w pad_h pad_w dil_h dil_w out"
        a = dict(zip(names.split(), arguments, strict=True))
        channels = a["n"] * a["c"]
        self._pass(_cuda.plan_max_pool2d_int8, a, channels * a["h"] * a["w"], channels * a["p"] * a["q"])

    def mean_shift_int8(self, device: int, stream: int, *arguments: Any) -> None:
        names = "x x_dtype n h w c k r s stride_h stride_w pad_h pad_w dil_h dil_w groups shift out"
        a = dict(zip(names.split(), arguments, strict=True))
        images, outputs = a["n"] * a["h"] * a["w"] * a["c"], a["n"] * a["k"] * math.prod(out_size(a))
        self._pass(_cuda.plan_mean_shift_int8, a, images, 4 * outputs, shift=4 * a["k"])

    def mean_pool2d(self, device: int, stream: int, *arguments: Any) -> None:
        names = "x x_dtype n h w c out"
        a = dict(zip(names.split(), arguments, strict=True))
        channels = a["n"] * a["c"]
        self._pass(_cuda.plan_mean_pool2d, a, 4 * channels * a["h"] * a["w"], 4 * channels)

    def _pass(self, plan: Any, a: dict[str, Any], x: int, out: int, **others: int) -> None:
        """Bytes of the input, of the output, and of what else is read."""
        memory, target = GlobalMemory(), host_bytes(a["out"], out)
        read = {name: memory.allocate(host_bytes(a[name], size)) for name, size in ({"x": x} | others).items()}
        placed = a | read | {"out": memory.allocate(target)}
        emulated.run_planned(plan(*placed.values()), "80", memory)
        target[:] = memory.fetch(placed["out"], target)

    def linear_int8(self, device: int, stream: int, multiprocessors: int, *arguments: Any) -> None:
        names = "x x_signed m c weight k constants residual residual_dtype residual_scale lo out out_dtype"
        a = dict(zip((names + WORKSPACE_NAMES).split(), arguments, strict=True))
        plan = functools.partial(_cuda.plan_linear_int8, multiprocessors)
        self._run(plan, a, a["m"] * a["c"], a["k"] * a["c"], a["m"])

    def _run(self, plan: Any, a: dict[str, Any], x: int, weights: int, pixels: int) -> None:
        size_of = (1, 1, 4, 2, 2)
        sizes = {"x": x, "weight": weights, "constants": 12 * a["k"], "out": pixels * a["k"] * size_of[a["out_dtype"]]}
        if a["residual"]:
            sizes["residual"] = pixels * a["k"] * size_of[a["residual_dtype"]]
        if a.get("workspace"):
            sizes["workspace"] = a["workspace_bytes"]
        memory = GlobalMemory()
        host = {name: host_bytes(a[name], size) for name, size in sizes.items()}
        placed = a | {name: memory.allocate(view) for name, view in host.items()}
        emulated.run_planned(plan(*placed.values()), "80", memory)
        for name in {"out", "workspace"} & host.keys():
            host[name][:] = memory.fetch(placed[name], host[name])


@contextlib.contextmanager
def emulated_device() -> Iterator[None]:
    """While this lasts, cnncomp.ops.cuda takes CPU tensors and launches in the emulator, as an sm_80 of 108 multiprocessors."""
    with (
        mock.patch.object(cuda, "backend", lambda device: "cuda"),
        mock.patch.object(cuda, "_cuda", EmulatedModule()),
        mock.patch.object(cuda, "_launch_arguments", lambda x: (0, 0, 108)),
        mock.patch.object(cuda_sparse, "_shared", lambda device: 164 << 10),
        mock.patch.object(cuda_sparse, "check_device", lambda device: None),
    ):
        yield
