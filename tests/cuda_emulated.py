"""Compiles the CUDA kernels to PTX or machine code with nvcc, and runs planned launches in the emulator."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.ptx import GlobalMemory, Result, emulate, entry_names, load

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "cuda_tests"
NVCC = shutil.which("nvcc") or ("/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").exists() else None)
FLAGS = ["-std=c++17", "-O3", "--fmad=false", f"-I{ROOT / 'csrc'}"]
#: File names of the kernels, with the parts of a launch's name that stand for its template's flags, in order.
FLAGS_OF = {
    "conv2d_int8": ("_s8",),
    "conv2d_runs_int8": ("_s8",),
    "gemm_int8": ("_s8",),
    "depthwise_int8": ("_s8",),
    "depthwise3x3_int8": ("_s8",),
    "conv2d_sparse24_int8": ("_s8",),
    "conv2d_sparse24_f16": ("_bf16",),
    "conv2d_blocks_int8": ("_s8",),
    "conv2d_blocks_f16": ("_bf16",),
    "conv2d_vectors_int8": ("_s8",),
    "conv2d_vectors_f16": ("_bf16",),
    "conv2d_vnm_int8": ("_s8",),
    "conv2d_vnm_f16": ("_bf16",),
    "to_units": (),
    "to_byte_units": (),
    "quantize": ("_planes",),
    "max_pool2d_int8": ("_s8",),
    "mean_pool2d": (),
    "mean_shift_int8": ("_s8",),
    "mean_shift_depthwise_int8": ("_s8",),
}
KERNELS = tuple(FLAGS_OF)
DTYPE_CODE = {torch.uint8: 0, torch.int8: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}

ACTIVATION_CODE = {"": 0, "silu": 1, "hardswish": 2}


def _included(path: Path) -> set[Path]:
    """A source and what it includes of the project's."""
    names = re.findall(r'^#include "(cuda/[^"]+)"', path.read_text(), re.M)
    return {path}.union(*(_included(ROOT / "csrc" / name) for name in names))


@cache
def digest(kernel: str) -> str:
    """Of a kernel's sources, the flags and the compiler: what a compiled file in the cache depends on."""
    assert NVCC
    h = hashlib.sha256(subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout)
    h.update(" ".join(FLAGS).encode())
    for path in sorted(_included(SOURCES / f"{kernel}.cu")):
        h.update(path.name.encode() + path.read_bytes())
    return h.hexdigest()[:16]


def compiled(kernel: str, arch: str, kind: str) -> Path:
    """csrc/cuda/<kernel>.cu compiled for sm_<arch> ("75", "90a", ...) to "ptx" or "cubin", or taken from the cache."""
    assert NVCC
    CACHE.mkdir(parents=True, exist_ok=True)
    out = CACHE / f"{kernel}.sm_{arch}.{digest(kernel)}.{kind}"
    if not out.exists():
        partial = out.with_suffix(f".{os.getpid()}")  # tests run in several processes
        source = str(SOURCES / f"{kernel}.cu")
        command = [NVCC, *FLAGS, f"-arch=sm_{arch}", f"-{kind}", source, "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr)
        partial.rename(out)
    return out


def linked_as_it_is(target: Path, sources: set[Path]) -> bool:
    """Whether ninja would leave an object in its build folder as it is: of this command and these sources.

    Its log says how long it compiled. An object is newer than a source that was changed meanwhile, and knows nothing of that;
    nor is an object ninja's whose folder was moved or copied.
    """
    import ninja

    log = target.parent / ".ninja_log"
    lines = [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []
    times = [(int(line[0]), int(line[1])) for line in lines if len(line) == 5 and line[3] == str(target)]
    if not times:
        return False
    start, end = times[-1]
    began = target.stat().st_mtime - (end - start) / 1000
    if any(path.stat().st_mtime > began for path in sources):
        return False
    command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(target.parent), "-n", str(target)]
    run = subprocess.run(command, capture_output=True, text=True)
    return run.returncode == 0 and "no work to do" in run.stdout


def built_objects(kernel: str) -> list[Path]:
    """Objects of a kernel, of the builds by setup.py, that belong to its sources as they are now."""
    found = sorted(ROOT.glob(f"build/ninja-*/csrc_cuda_{kernel}.cu.o"))
    return [one for one in found if linked_as_it_is(one, _included(SOURCES / f"{kernel}.cu"))]


def machine_code(kernel: str, arch: str, folder: Path) -> Path:
    """Machine code of a kernel for sm_<arch>: what the installed module was linked of, put into ``folder``, if that belongs to
    the sources as they are; else compiled here."""
    from tests.triton_aot import TOOLS

    for one in built_objects(kernel):
        with tempfile.TemporaryDirectory(dir=folder) as own:
            command = [str(TOOLS / "cuobjdump"), "--extract-elf", f"sm_{arch}", str(one)]
            subprocess.run(command, cwd=own, capture_output=True, check=True)
            found = list(Path(own).glob(f"csrc_cuda_{kernel}.cu.*.sm_{arch}.cubin"))
            if found:  # a build may be for other architectures
                assert len(found) == 1, found
                return found[0].rename(folder / found[0].name)
    return compiled(kernel, arch, "cubin")


@cache
def ptx_of(kernel: str, arch: str) -> str:
    return compiled(kernel, arch, "ptx").read_text()


def source_of(launch: str) -> str:
    """The file, without suffix, of a launch's kernel."""
    return max((name for name in KERNELS if launch.startswith(name + "_")), key=len)


@cache
def entry_of(launch: str, ptx: str) -> str:
    """The mangled kernel of a launch's name: the same numbers first, and the same flags."""
    source = source_of(launch)
    numbers = re.findall(r"(?<=[_x])\d+(?=[_x])", launch.removeprefix(source))
    flags = ["1" if re.search(f"{flag}(_|$)", launch) else "0" for flag in FLAGS_OF[source]]
    found = [
        name
        for name in entry_names(ptx)
        if re.findall(r"Li(\d+)E", name)[: len(numbers)] == numbers and re.findall(r"Lb([01])E", name) == flags
    ]
    assert len(found) == 1, (launch, found)
    return found[0]


def shared_of(plan: dict[str, Any], arch: str) -> int:
    """Bytes of dynamic shared memory that a planned launch asks for on sm_<arch>."""
    return int(plan["shared_turing" if arch == "75" else "shared"])


def run_planned(plan: dict[str, Any], arch: str, memory: GlobalMemory, ptx: str | None = None) -> Result:
    """Run in the emulator what the extension module would launch."""
    ptx = ptx or ptx_of(source_of(plan["kernel"]), arch)
    kernel = load(ptx, entry_of(plan["kernel"], ptx))
    return emulate(kernel, plan["grid"], plan["block"], [plan["params"]], shared=shared_of(plan, arch), memory=memory)


def nhwc(x: Tensor) -> np.ndarray:
    """As an array, channels last; bfloat16, which numpy has not, as int16."""
    x = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
    return x.permute(0, 2, 3, 1).contiguous().numpy() if x.dim() == 4 else x.contiguous().numpy()


class Case:
    """Tensors of one convolution (x 4-D) or linear layer (x 2-D) on the emulated device."""

    def __init__(
        self, x: Tensor, weight: Tensor, constants: Tensor, residual: Tensor | None, shape: tuple[int, ...],
        out_dtype: torch.dtype, misalign: int = 0, workspace: int = 0, packed: bool = False,
    ) -> None:  # fmt: skip
        self.memory = GlobalMemory()
        put = self.memory.allocate
        self.x = put(nhwc(x), misalign)
        self.weight = put(weight.numpy() if packed else nhwc(weight))
        self.constants = put(constants.numpy())
        self.residual = 0 if residual is None else put(nhwc(residual))
        self.residual_dtype = 0 if residual is None else DTYPE_CODE[residual.dtype]
        self.image = nhwc(torch.zeros(shape, dtype=out_dtype))
        self.out = put(self.image)
        self.out_dtype = out_dtype
        self.zeros = np.zeros(workspace // 4, np.int32)
        self.workspace = put(self.zeros) if workspace else 0

    def epilogue(self, residual_scale: float, lo: float) -> tuple[Any, ...]:
        """Arguments of the extension module's functions, as they come after the sizes."""
        code = DTYPE_CODE[self.out_dtype]
        return self.constants, self.residual, self.residual_dtype, residual_scale, lo, self.out, code

    def schedule(
        self, tile: str = "", parts: int = 0, activation: str = "", out_factor: float = 1.0
    ) -> tuple[Any, ...]:
        """The arguments after those: workspace, tile, parts, activation, factor behind it; not every function has them."""
        return self.workspace, self.zeros.nbytes, tile, parts, ACTIVATION_CODE[activation], out_factor

    def output(self) -> Tensor:
        """What the kernel wrote."""
        out = torch.from_numpy(self.memory.fetch(self.out, self.image)).view(self.out_dtype)
        return out.permute(0, 3, 1, 2) if out.dim() == 4 else out

    def workspace_is_zero(self) -> bool:
        """As it was before, and as the next kernel wants it."""
        return not self.workspace or not self.memory.fetch(self.workspace, self.zeros).any()
