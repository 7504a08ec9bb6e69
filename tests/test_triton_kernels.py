"""Triton kernels without a GPU: exact in the interpreter, compiled ahead of time for three architectures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cnncomp import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="Triton is not installed")
ROOT = Path(__file__).parent.parent
ARCHS = (80, 90, 120)


def test_available_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import cnncomp.kernels as k; assert not k.available()"
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


def test_in_interpreter():
    """Everything of triton_interpreted.py, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_interpreted.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile into a folder of this run, not into the user's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def int8_arguments(dtype: str, residual: str | None, out: str, names: list[str], odd: bool) -> tuple[Any, ...]:
    pointers = {"x_ptr": dtype, "weight_ptr": "i8", "constants_ptr": "fp32", "residual_ptr": residual, "out_ptr": out}
    multiples = {"c", "k", "c_group", "k_group"} if not odd else set()
    return pointers, {name: name in multiples for name in names}, ("residual_scale", "lo")


def check(report: Any, arch: int, mma: bool, copies: bool) -> None:
    """No spills, tensor cores used, tiles copied asynchronously, nothing contracted in the epilogue."""
    spilled = report.stack + report.opcodes["LDL"] + report.opcodes["STL"]
    assert spilled == 0, f"{report.stack} bytes of stack, {report.registers} registers"
    assert "fma.rn" not in report.ptx, "a multiply and an add were contracted"
    if mma:
        assert sum(n for name, n in report.opcodes.items() if name in ("IMMA", "IGMMA", "HMMA", "HGMMA", "QMMA")) > 0
    if copies:
        assert report.opcodes["LDGSTS"] > 0, "no asynchronous copies"
    assert report.shared <= 99 * 1024 if arch in (86, 89, 120) else report.shared <= 163 * 1024


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype, residual, out, size", [("u8", "u8", "u8", "LARGE"), ("i8", None, "fp32", "SMALL")])
def test_gemm_compiles(arch, dtype, residual, out, size):
    from cnncomp.kernels import launch
    from cnncomp.kernels.gemm_int8 import gemm_int8_kernel
    from tests.triton_aot import compile_kernel, inspect

    tile = getattr(launch, size)
    arguments = int8_arguments(dtype, residual, out, ["m", "c", "k"], odd=False)
    check(inspect(compile_kernel(gemm_int8_kernel, *arguments, tile.meta(), arch, tile.options())), arch, True, True)


CONV_INTEGERS = [
    "m",
    "h",
    "w",
    "c",
    "k",
    "p",
    "q",
    "k_group",
    "stride_h",
    "stride_w",
    "pad_h",
    "pad_w",
    "dil_h",
    "dil_w",
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype, residual, out", [("u8", "u8", "u8")])
@pytest.mark.parametrize("size, flat", [("MEDIUM", False), ("LARGE", False), ("FLAT_TILE", True)])
def test_conv_compiles(arch, dtype, residual, out, size, flat):
    from cnncomp.kernels import conv2d_int8, launch
    from tests.triton_aot import compile_kernel, inspect

    tile = conv2d_int8.FLAT_TILE if flat else getattr(launch, size)
    arguments = int8_arguments(dtype, residual, out, [*CONV_INTEGERS, "c_group"], odd=flat)
    meta = tile.meta() | {"R": 3, "S": 3, "FLAT": flat}
    report = inspect(compile_kernel(conv2d_int8.conv2d_int8_kernel, *arguments, meta, arch, tile.options()))
    check(report, arch, True, not flat)


@pytest.mark.parametrize("arch", ARCHS)
def test_depthwise_compiles(arch):
    from cnncomp.kernels.conv2d_int8 import DEPTHWISE_TILE, depthwise_int8_kernel
    from tests.triton_aot import compile_kernel, inspect

    arguments = int8_arguments("u8", "u8", "u8", CONV_INTEGERS, odd=False)
    meta = {"R": 3, "S": 3, "BLOCK_M": DEPTHWISE_TILE.block_m, "BLOCK_N": DEPTHWISE_TILE.block_n}
    report = inspect(compile_kernel(depthwise_int8_kernel, *arguments, meta, arch, DEPTHWISE_TILE.options()))
    check(report, arch, False, False)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype, mma", [("fp16", True), ("fp32", False)])
def test_sparse_compiles(arch, dtype, mma):
    from cnncomp.kernels.conv2d_sparse import conv2d_sparse_kernel
    from tests.triton_aot import compile_kernel, inspect

    data = dict.fromkeys(["x_ptr", "values_ptr", "bias_ptr", "residual_ptr", "out_ptr"], dtype)
    pointers: dict[str, str | None] = data | {"positions_ptr": "i32", "block_ptr_ptr": "i32"}
    integers = dict.fromkeys([*CONV_INTEGERS, "c_group", "blocks"], False)
    meta = {"R": 3, "S": 3, "V": 32, "BLOCK_M": 64, "BLOCK_K": 32, "PRECISION": "ieee"}
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    compiled = compile_kernel(conv2d_sparse_kernel, pointers, integers, ("lo", "hi"), meta, arch, options)
    report = inspect(compiled)
    assert report.stack == 0 and report.opcodes["LDL"] == 0
    assert (report.opcodes["HMMA"] + report.opcodes["HGMMA"] > 0) == mma


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("dtype, residual, out", [("u8", "i8", "u8"), ("i8", None, "fp32")])
def test_compiled_conv_is_exact_in_the_emulator(arch, dtype, residual, out):
    """What Triton makes of the kernel, not what its interpreter thinks: the PTX itself, against the reference."""
    from cnncomp.kernels import conv2d_int8, launch
    from cnncomp.ops import reference
    from tests import cuda_emulated as emulated
    from tests.ptx import emulate
    from tests.triton_aot import compile_kernel

    types = {"u8": torch.uint8, "i8": torch.int8, "fp32": torch.float32}
    torch.manual_seed(0)
    n, c, h, w, k = 1, 80, 5, 6, 80  # c and k multiples of 16, as the attributes say
    tile = launch.LARGE if arch == 90 else launch.MEDIUM  # wgmma takes 64 rows or more
    x = torch.randint(*((0, 256) if dtype == "u8" else (-128, 128)), (n, c, h, w), dtype=types[dtype])
    weight = torch.randint(-127, 128, (k, c, 3, 3), dtype=torch.int8)
    constants = torch.stack([torch.rand(k) * 1e-4, torch.randn(k) * 20 + 60, torch.full((k,), 200.0)])
    res = None if residual is None else torch.randint(-128, 128, (n, k, h, w), dtype=torch.int8)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    expected = reference.conv2d_int8(x, weight, constants, res, 0.37, 0.0, *geometry, types[out])

    arguments = int8_arguments(dtype, residual, out, [*CONV_INTEGERS, "c_group"], odd=False)
    meta = tile.meta() | {"R": 3, "S": 3, "FLAT": False}
    compiled = compile_kernel(conv2d_int8.conv2d_int8_kernel, *arguments, meta, arch, tile.options())
    case = emulated.Case(x, weight, constants, res, (n, k, h, w), types[out])
    pointers = [case.x, case.weight, case.constants, *([case.residual] if residual else []), case.out]
    integers = [n * h * w, h, w, c, k, h, w, c, k, 1, 1, 1, 1, 1, 1]
    grid = (launch.cdiv(n * h * w, tile.block_m) * launch.cdiv(k, tile.block_n), 1, 1)
    result = emulate(
        compiled.asm["ptx"], grid, 32 * tile.num_warps, [*pointers, 0.37, 0.0, *integers], memory=case.memory,
        shared=compiled.metadata.shared,
    )  # fmt: skip
    assert torch.equal(case.output(), expected)
    assert any(opcode.startswith("wgmma" if arch == 90 else "mma") for opcode in result.instructions)
