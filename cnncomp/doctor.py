"""What cnncomp finds on this machine: instruction sets, devices, versions; whether its kernels give the right results here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import cnncomp
from cnncomp import _cpu, kernels
from cnncomp.data import PACKAGES
from cnncomp.dispatch import cpu_name
from cnncomp.dispatch.plan import cache_dir
from cnncomp.nn import (
    BlocksQuantConv2d,
    BlocksQuantLinear,
    Clamp,
    DenseConv2d,
    DenseLinear,
    Geometry,
    QuantConv2d,
    QuantLinear,
    QuantSpec,
    ScatteredQuantConv2d,
    Sparse24QuantConv2d,
    Sparse24QuantLinear,
    SparseConv2d,
    SparseLinear,
    SparseQuantConv2d,
    SparseQuantLinear,
    TritonBlocksQuantConv2d,
    TritonBlocksQuantLinear,
    TritonVectorsQuantConv2d,
    TritonVectorsQuantLinear,
    VectorsQuantConv2d,
    VectorsQuantLinear,
    VnmQuantConv2d,
    VnmQuantLinear,
    quantize_weight,
)
from cnncomp.nn.dense import DEPTHWISE_KERNEL, DIRECT_KERNEL, ROWS_KERNEL
from cnncomp.ops import cuda as cuda_ops
from cnncomp.ops import reference
from cnncomp.ops._openmp import attach


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``advice``: what to do about it, empty where nothing needs doing."""

    topic: str
    value: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything. Nothing is changed, and whatever is missing is a finding, never an error."""
    return [*_versions(), *_cpu_findings(), *_gpu_findings(), *_kernel_findings("cpu"), *_tool_findings(), *_storage()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[Finding]:
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return [Finding("cnncomp", f"{cnncomp.__version__}, torch {torch.__version__}, {system}")]


def _cpu_findings() -> list[Finding]:
    available, used = _cpu.isa_available(), _cpu.isa()
    shared = attach()
    advice = "" if shared else "this torch has no OpenMP runtime: the kernels run on one thread"
    return [
        Finding("CPU", f"{cpu_name()}, {os.cpu_count()} logical cores"),
        Finding("instruction sets", f"{', '.join(available)}; in use: {used}"),
        Finding("threads", f"{torch.get_num_threads()} (torch.set_num_threads, OMP_NUM_THREADS)"),
        Finding("OpenMP", "torch's own threads are used" if shared else "not attached", advice),
    ]


def _gpu_findings() -> list[Finding]:
    found = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            found.append(Finding(f"GPU {i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"))
            found += _kernel_findings(f"cuda:{i}")
    elif torch.version.cuda is None:
        advice = "for an NVIDIA GPU: a torch built with CUDA, see https://pytorch.org/get-started/locally"
        found.append(Finding("GPU", "this torch is built without CUDA", advice))
    else:
        found.append(Finding("GPU", f"none found (torch is built for CUDA {torch.version.cuda})"))
    built = cuda_ops._cuda is not None
    install = (
        "install it again (pip install --force-reinstall --no-deps)"
        if _nvcc()
        else "install the CUDA toolkit, then it again"
    )
    advice = "" if built else f"for CUDA C++ kernels, which cnncomp was built without: {install}"
    found.append(Finding("CUDA kernels", "built" if built else "not in this build", advice))
    triton = _version("triton")
    usable = kernels.available()
    advice = "" if usable else "for the Triton kernels: pip install triton"
    found.append(Finding("Triton", triton or "not installed", advice))
    return found


def _tool_findings() -> list[Finding]:
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    advice = "" if compiler else "torch.compile needs a C++ compiler: install g++"
    found = [Finding("nvcc", _nvcc() or "not found"), Finding("C++ compiler", compiler or "not found", advice)]
    for package in (*PACKAGES, "matplotlib"):
        version = _version(package)
        pinned = PACKAGES.get(package, package)
        command = f"pip install {'--no-deps ' if '==' in pinned else ''}{pinned}"
        found.append(Finding(package, version or "not installed", "" if version else f"for the demo: {command}"))
    return found


def _nvcc() -> str | None:
    path = shutil.which("nvcc")
    if path is None:
        return None
    try:
        out = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return f"{path}, which does not run"
    release = next(
        (line.split("release", 1)[1].split(",")[0].strip() for line in out.splitlines() if "release" in line), "?"
    )
    return f"{release}, {path}"


def _storage() -> list[Finding]:
    folder = cache_dir()
    plans = len(list(folder.glob("*.json"))) if folder.is_dir() else 0
    return [Finding("measured plans", f"{plans} in {folder}")]


Check = Callable[[torch.device], bool]


def _sparse(*shape: int) -> Tensor:
    """A random weight (K, C, ...), mostly zeros, with something in every fourth input channel alone: a pattern of all sparse
    kernels."""
    fourth = torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2)) % 4 == 0
    return torch.randn(shape) * (torch.rand(shape) < 0.4) * fourth


def _conv_int8(device: torch.device, cls: type[QuantConv2d] = QuantConv2d) -> bool:
    geometry = Geometry(32, 40, (3, 3), padding=(1, 1))
    weight, scale = quantize_weight(_sparse(40, 32, 3, 3))
    layer = cls(geometry, weight, scale, torch.randn(40), QuantSpec(0.02, torch.uint8), Clamp(0.0))
    x = torch.randint(0, 256, (1, 32, 9, 11), dtype=torch.uint8)
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    expected = reference.conv2d_int8(
        x, weight, layer.constants, None, 1.0, layer.lo, stride, padding, dilation, 1, torch.float32
    )
    return torch.equal(layer.to(device)(x.to(device)).cpu(), expected)


def _linear_int8(device: torch.device, cls: type[QuantLinear] = QuantLinear) -> bool:
    weight, scale = quantize_weight(_sparse(40, 80))
    bias, step = torch.randn(40), 0.02
    layer = cls(weight, scale, bias, QuantSpec(step, torch.uint8))
    x = torch.randint(0, 256, (5, 80), dtype=torch.uint8)
    expected = F.linear(x.double() * step, weight.double() * scale.double()[:, None], bias.double())
    return _close(layer.to(device)(x.to(device)), expected)


def _conv_sparse(device: torch.device) -> bool:
    weight = torch.randn(40, 24, 3, 3) * (torch.rand(40, 24, 3, 3) < 0.1)
    x, bias = torch.randn(1, 24, 9, 11), torch.randn(40)
    layer = SparseConv2d(Geometry(24, 40, (3, 3), padding=(1, 1)), weight, bias, Clamp())
    return _close(layer.to(device)(x.to(device)), F.conv2d(x.double(), weight.double(), bias.double(), padding=1))


def _conv_depthwise(device: torch.device) -> bool:
    x, weight, bias = torch.randn(1, 24, 9, 21), torch.randn(24, 1, 3, 3), torch.randn(24)
    layer = DenseConv2d(Geometry(24, 24, (3, 3), padding=(1, 1), groups=24), weight, bias, kernel=DEPTHWISE_KERNEL)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=24)
    return _close(layer.to(device)(x.to(device)), expected)


def _conv_dense(device: torch.device) -> bool:
    x, weight, bias = torch.randn(1, 24, 9, 21), torch.randn(40, 24, 3, 3), torch.randn(40)
    layer = DenseConv2d(Geometry(24, 40, (3, 3), padding=(1, 1)), weight, bias, kernel=DIRECT_KERNEL)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    return _close(layer.to(device)(x.to(device)), expected)


def _linear_dense(device: torch.device) -> bool:
    x, weight, bias = torch.randn(5, 72), torch.randn(40, 72), torch.randn(40)
    layer = DenseLinear(weight, bias, kernel=ROWS_KERNEL)
    return _close(layer.to(device)(x.to(device)), F.linear(x.double(), weight.double(), bias.double()))


def _linear_sparse(device: torch.device) -> bool:
    weight = torch.randn(40, 72) * (torch.rand(40, 72) < 0.1)
    x, bias = torch.randn(5, 72), torch.randn(40)
    layer = SparseLinear(weight, bias, Clamp())
    return _close(layer.to(device)(x.to(device)), F.linear(x.double(), weight.double(), bias.double()))


def _close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got.cpu().double(), expected, rtol=1e-5, atol=1e-4)


CHECKS: dict[str, Check] = {
    "conv2d_int8": _conv_int8,
    "linear_int8": _linear_int8,
    "conv2d_sparse": _conv_sparse,
    "linear_sparse": _linear_sparse,
    "conv2d_sparse_int8": partial(_conv_int8, cls=SparseQuantConv2d),
    "conv2d_scattered_int8": partial(_conv_int8, cls=ScatteredQuantConv2d),
    "linear_sparse_int8": partial(_linear_int8, cls=SparseQuantLinear),
    "conv2d_sparse24_int8": partial(_conv_int8, cls=Sparse24QuantConv2d),
    "linear_sparse24_int8": partial(_linear_int8, cls=Sparse24QuantLinear),
    "conv2d_blocks_int8": partial(_conv_int8, cls=BlocksQuantConv2d),
    "linear_blocks_int8": partial(_linear_int8, cls=BlocksQuantLinear),
    "conv2d_vectors_int8": partial(_conv_int8, cls=VectorsQuantConv2d),
    "linear_vectors_int8": partial(_linear_int8, cls=VectorsQuantLinear),
    "conv2d_blocks_int8.triton": partial(_conv_int8, cls=TritonBlocksQuantConv2d),
    "linear_blocks_int8.triton": partial(_linear_int8, cls=TritonBlocksQuantLinear),
    "conv2d_vectors_int8.triton": partial(_conv_int8, cls=TritonVectorsQuantConv2d),
    "linear_vectors_int8.triton": partial(_linear_int8, cls=TritonVectorsQuantLinear),
    "conv2d_vnm_int8": partial(_conv_int8, cls=VnmQuantConv2d),
    "linear_vnm_int8": partial(_linear_int8, cls=VnmQuantLinear),
    "conv2d_depthwise": _conv_depthwise,
    "conv2d_dense": _conv_dense,
    "linear_dense": _linear_dense,
}


def _kernel_findings(device: str) -> list[Finding]:
    """Each kernel run once on random numbers, against the reference."""
    found = []
    for name, check in CHECKS.items():
        advice = ""
        try:
            with torch.random.fork_rng(devices=[]), torch.inference_mode():
                torch.manual_seed(0)
                right = check(torch.device(device))
            value = "works" if right else "gives wrong results"
            advice = "" if right else "please report this, with the output of cnncomp doctor"
        except Exception as error:  # whatever keeps a kernel from running is what the report is for
            value = f"does not run: {type(error).__name__}: {error}"
        found.append(Finding(f"{name}, {device}", value, advice))
    return found
