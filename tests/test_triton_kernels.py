"""Triton kernels without a GPU: exact in the interpreter, and as compiled ahead of time in the emulator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cnncomp import kernels
from tests.helpers import outside_xdist

pytestmark = pytest.mark.skipif(not kernels.available(), reason="Triton is not installed")
ROOT = Path(__file__).parent.parent


def test_available_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import cnncomp.kernels as k; assert not k.available()"
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


def test_in_interpreter():
    """Everything of triton_interpreted.py, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_interpreted.py"]
    environment = outside_xdist() | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile into a folder of this run, not into the user's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


TYPES = {"u8": torch.uint8, "i8": torch.int8, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: n, c, h, w, k, r, s, stride, padding, dilation, groups. c and k are multiples of 16, as the attributes say, but in the last.
COMPILED = {
    "3x3": (1, 80, 5, 6, 80, 3, 3, (1, 1), (1, 1), (1, 1), 1),
    "stride and dilation": (2, 48, 9, 8, 32, 3, 2, (2, 1), (2, 1), (1, 2), 1),
    "groups": (1, 160, 5, 4, 96, 2, 3, (1, 2), (0, 1), (1, 1), 2),
    "seven rows": (1, 64, 8, 5, 16, 7, 5, (1, 1), (3, 2), (1, 1), 1),
    "stem": (2, 3, 11, 9, 21, 7, 7, (2, 2), (3, 3), (1, 1), 1),
}


def compiled_case(dtype: str, residual: str | None, out: str, sizes: tuple[Any, ...]) -> tuple[Any, torch.Tensor]:
    """Random tensors of a convolution on the emulated device, and what the reference makes of them."""
    from cnncomp.ops import reference
    from tests import cuda_emulated as emulated

    n, c, h, w, k, r, s, *geometry = sizes
    torch.manual_seed(c + k)
    x = torch.randint(*((0, 256) if dtype == "u8" else (-128, 128)), (n, c, h, w), dtype=TYPES[dtype])
    weight = torch.randint(-127, 128, (k, c // geometry[3], r, s), dtype=torch.int8)
    scale = (torch.rand(k) + 0.5) * 100 / (7000 * (weight[0].numel()) ** 0.5)
    constants = torch.stack([scale, torch.randn(k) * 30 + 60, torch.rand(k) * 100 + 100])
    shape = tuple(torch.nn.functional.conv2d(x.float(), weight.float(), None, *geometry).shape)
    res = None if residual is None else torch.randint(-128, 128, shape, dtype=torch.int8)
    expected = reference.conv2d_int8(x, weight, constants, res, 0.37, 0.0, *geometry, TYPES[out])
    return emulated.Case(x, weight, constants, res, shape, TYPES[out]), expected


def compiled_conv(
    tile: Any, dtype: str, residual: str | None, out: str, taps: tuple[int, int], flat: bool, arch: int
) -> Any:
    from cnncomp.kernels.conv2d_int8 import conv2d_int8_kernel
    from tests.triton_gate import CONV_INTEGERS, int8_variant

    meta = {"R": taps[0], "S": taps[1], "FLAT": flat, "WORDS": not flat}
    integers = (*CONV_INTEGERS, "c_group")
    return int8_variant("", conv2d_int8_kernel, integers, tile, meta, dtype, residual, out, aligned=not flat).compiled(
        arch
    )


def run_compiled(
    compiled: Any, case: Any, grid: tuple[int, ...], warps: int, integers: list[int], **options: Any
) -> Any:
    """``options`` are emulate's; ``kernel`` among them stands for what was compiled."""
    from tests.ptx import emulate

    pointers = [case.x, case.weight, case.constants, *([case.residual] if case.residual else []), case.out]
    kernel = options.pop("kernel", compiled.asm["ptx"])
    return emulate(
        kernel, grid, 32 * warps, [*pointers, 0.37, 0.0, 1.0, *integers], memory=case.memory, shared=compiled.metadata.shared,
        **options,
    )  # fmt: skip


def conv_launch(tile: Any, expected: torch.Tensor, sizes: tuple[Any, ...]) -> tuple[tuple[int, int, int], list[int]]:
    """Grid and integer arguments of a convolution."""
    from cnncomp.kernels.launch import cdiv

    n, c, h, w, k, _, _, stride, padding, dilation, groups = sizes
    p, q = expected.shape[2:]
    integers = [n * p * q, h, w, c, k, p, q, c // groups, k // groups, *stride, *padding, *dilation]
    return (cdiv(n * p * q, tile.block_m) * cdiv(k // groups, tile.block_n), groups, 1), integers


@pytest.mark.parametrize(
    "dtype, residual, out", [("u8", "i8", "u8"), ("i8", None, "fp32"), ("u8", None, "bf16"), ("i8", "i8", "fp16")]
)
@pytest.mark.parametrize(
    ("arch", "name", "size"),
    [(80, "3x3", "MEDIUM"), (90, "3x3", "LARGE"), (120, "3x3", "MEDIUM"), (80, "stride and dilation", "SMALL"),
     (80, "groups", "WIDE"), (80, "seven rows", "SMALL"), (80, "stem", "FLAT_TILE")],
)  # fmt: skip
def test_compiled_conv_is_exact_in_the_emulator(arch, name, size, dtype, residual, out):
    """What Triton makes of the kernel, not what its interpreter thinks: the PTX itself, against the reference."""
    from cnncomp.kernels import conv2d_int8, launch

    r, s = COMPILED[name][5:7]
    flat = size == "FLAT_TILE"
    tile = conv2d_int8.FLAT_TILE if flat else getattr(launch, size)
    case, expected = compiled_case(dtype, residual, out, COMPILED[name])
    compiled = compiled_conv(tile, dtype, residual, out, (r, s), flat, arch)
    grid, integers = conv_launch(tile, expected, COMPILED[name])
    result = run_compiled(compiled, case, grid, tile.num_warps, integers)
    assert torch.equal(case.output(), expected)
    assert any(opcode.startswith("wgmma" if arch == 90 else "mma") for opcode in result.instructions)


@pytest.mark.parametrize(
    ("dtype", "size", "m", "c", "k"),
    [("u8", "SMALL", 35, 208, 48), ("u8", "WIDE", 130, 96, 144), ("i8", "MEDIUM", 7, 64, 80)],
)
def test_compiled_gemm_is_exact_in_the_emulator(dtype, size, m, c, k):
    from cnncomp.kernels import launch
    from cnncomp.kernels.gemm_int8 import gemm_int8_kernel
    from tests.triton_gate import int8_variant

    tile = getattr(launch, size)
    case, expected = compiled_case(dtype, None, "u8", (m, c, 1, 1, k, 1, 1, (1, 1), (0, 0), (1, 1), 1))
    variant = int8_variant("", gemm_int8_kernel, ("m", "c", "k"), tile, {"WORDS": True}, dtype, None)
    compiled = variant.compiled(80)
    grid = (launch.cdiv(m, tile.block_m) * launch.cdiv(k, tile.block_n), 1, 1)
    run_compiled(compiled, case, grid, tile.num_warps, [m, c, k])
    assert torch.equal(case.output(), expected)


@pytest.mark.parametrize(
    ("size", "dtype", "c", "pixels", "most"),
    [
        ("LARGE", "u8", 64, 56, 12),
        ("LARGE", "i8", 64, 56, 10),
        ("WIDE", "u8", 128, 28, 9.5),
        ("MEDIUM", "u8", 256, 14, 15),
    ],
)
def test_instructions_of_a_useful_product(size, dtype, c, pixels, most):
    """Warp instructions per useful m16n8k32 of a 3x3 convolution on sm_80: bytes are not unpacked."""
    from bench.gpu_model import sample_of
    from cnncomp.kernels import launch
    from tests.ptx import Checks, emulate, load

    tile = getattr(launch, size)
    compiled = compiled_conv(tile, dtype, None, "u8", (3, 3), False, 80)
    m = pixels**2
    kind = torch.uint8 if dtype == "u8" else torch.int8
    tensors = torch.zeros(m * c, dtype=kind), torch.zeros(c * 9 * c, dtype=torch.int8), torch.ones(3 * c)
    out = torch.zeros(m * c, dtype=torch.uint8)
    sizes = [m, pixels, pixels, c, c, pixels, pixels, c, c, 1, 1, 1, 1, 1, 1]
    grid = launch.cdiv(m, tile.block_m) * launch.cdiv(c, tile.block_n)
    counts = emulate(
        load(compiled.asm["ptx"]), grid, 32 * tile.num_warps, [*tensors, out, 0.0, 0.0, 1.0, *sizes],
        shared=compiled.metadata.shared, blocks=sample_of(grid, 16), checks=Checks(races=False, blocks=False),
    ).summary()  # fmt: skip
    useful = m * c * 9 * c / (16 * 8 * 32) * counts["blocks"] / grid
    assert counts["instructions"] / useful <= most
