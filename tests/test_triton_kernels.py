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


@pytest.mark.parametrize("name", ["triton_interpreted.py", "triton_steps_interpreted.py"])
def test_in_interpreter(name):
    """Everything of a file, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{name}"]
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


#: n, c, h, w, k, r, s, stride, padding, dilation, groups.
STEPS = {
    "3x3": (2, 64, 6, 7, 80, 3, 3, (1, 1), (1, 1), (1, 1), 1),
    "odd": (1, 14, 9, 8, 42, 3, 2, (2, 1), (2, 1), (1, 2), 2),
    "more taps than bits": (1, 16, 9, 9, 16, 8, 8, (1, 1), (3, 4), (1, 1), 1),
}
BLOCKS = {"blocks": {1: (64, 16), 2: (64, 8)}, "vectors": {1: (32, 4), 2: (32, 1)}}


def run_steps(dtype: str, block: tuple[int, int], sizes: tuple[Any, ...], density: float, arch: int) -> Any:
    """Got and expected of a convolution with sparse weights, all blocks run with all checks, and counts. Floats are small
    integers, whose sums are exact."""
    from cnncomp.kernels.conv2d_steps import tile_for
    from cnncomp.kernels.launch import cdiv
    from cnncomp.ops import reference
    from cnncomp.sparsity import vectors
    from cnncomp.sparsity.steps import pack_steps, view_steps
    from tests.cuda_emulated import nhwc
    from tests.ptx import GlobalMemory, emulate
    from tests.test_packers import masked_blocks
    from tests.triton_gate import steps_variant

    n, c, h, w, k, r, s, *geometry = sizes
    (stride, padding, dilation, groups), kind = geometry, TYPES[dtype]
    torch.manual_seed(c + k)
    low, high = {"u8": (0, 256), "i8": (-128, 128)}.get(dtype, (-4, 5))
    x = torch.randint(low, high, (n, c, h, w)).to(kind)
    of_weights = torch.int8 if x.itemsize == 1 else kind
    weight = torch.randint(max(low, -127), min(high, 128), (k, c // groups, r, s)).to(of_weights)
    weight = masked_blocks(weight, *block, groups, density)
    acc = torch.nn.functional.conv2d(x.double(), weight.double(), None, *geometry).float()
    constants = torch.stack([(torch.rand(k) + 0.5) / 2000, torch.randn(k) * 30 + 60, torch.rand(k) * 100 + 100])
    expected = reference.epilogue(acc, constants, None, 0.0, 0.0, kind)
    steps = view_steps(pack_steps(weight, *block, groups), weight.shape, of_weights, *block, groups)
    variant = steps_variant(
        "", dtype, block, {"R": r, "S": s, "WHOLE": c // groups % block[1] == 0}, c // groups % 16 == 0
    )
    compiled = variant.compiled(arch)
    memory, (p, q) = GlobalMemory(), expected.shape[2:]
    image = nhwc(torch.zeros(expected.shape, dtype=kind))
    given = nhwc(vectors.to_units(x).flatten() if block[1] == 1 else x)
    tables = [t.contiguous() for t in (steps.values, steps.places, steps.first, steps.sums, constants)]
    tables = [t if t.numel() else torch.zeros(16, dtype=t.dtype) for t in tables]  # nothing is read of no steps
    pointers = [memory.allocate(a) for a in (given, *(nhwc(t.flatten()) for t in tables), image)]
    blocks, unit = (len(steps.first) - 1) // groups, vectors.UNIT if block[1] == 1 else 1
    tile = tile_for(block[0], x.itemsize)
    grid = (cdiv(cdiv(n, unit) * unit * p * q, tile.block_m), groups * blocks, 1)
    integers = [n, h, w, c, k, p, q, c // groups, k // groups, blocks, *stride, *padding, *dilation]
    result = emulate(
        compiled.asm["ptx"], grid, 32 * tile.num_warps, [*pointers, 0.0, 0.0, 1.0, *integers], memory=memory,
        shared=compiled.metadata.shared,
    )  # fmt: skip
    got = torch.from_numpy(memory.fetch(pointers[-1], image)).view(kind).permute(0, 3, 1, 2)
    return got, expected, result


@pytest.mark.parametrize("pattern", BLOCKS)
@pytest.mark.parametrize(
    ("arch", "name", "density", "dtype"),
    [(80, "3x3", 0.4, "u8"), (80, "3x3", 0.4, "i8"), (80, "3x3", 0.4, "fp16"), (80, "3x3", 0.4, "bf16"),
     (80, "odd", 0.5, "u8"), (80, "odd", 0.5, "fp16"), (80, "more taps than bits", 0.5, "i8"), (80, "3x3", 0.0, "u8"),
     (90, "3x3", 0.4, "u8"), (90, "3x3", 0.4, "fp16"), (120, "odd", 0.5, "u8"), (120, "odd", 0.5, "bf16")],
)  # fmt: skip
def test_compiled_sparse_conv_is_exact_in_the_emulator(arch, name, density, pattern, dtype):
    block = BLOCKS[pattern][TYPES[dtype].itemsize]
    got, expected, result = run_steps(dtype, block, STEPS[name], density, arch)
    assert torch.equal(got, expected)
    products = [opcode for opcode in result.instructions if opcode.startswith("wgmma" if arch == 90 else "mma")]
    assert bool(products) == (density > 0)


@pytest.mark.parametrize(
    ("pattern", "dtype", "most"),
    [("blocks", "u8", 16), ("vectors", "u8", 44), ("blocks", "fp16", 9), ("vectors", "fp16", 16)],
)
def test_instructions_of_a_useful_sparse_product(pattern, dtype, most):
    """Warp instructions per kept mma of a 3x3 convolution with three quarters of its blocks gone, on sm_80: prologue and
    epilogue weigh as much as the few steps that are left; of int8 1xV, four bytes are copied at once, so addresses bind."""
    from bench.gpu_model import sample_of
    from cnncomp.kernels.conv2d_steps import tile_for
    from cnncomp.kernels.launch import cdiv
    from cnncomp.sparsity.steps import pack_steps, view_steps
    from tests.ptx import Checks, emulate, load
    from tests.test_packers import masked_blocks
    from tests.triton_gate import steps_variant

    n, c, pixels, kind = 8, 128, 28, TYPES[dtype]
    m, block, depth = n * pixels**2, BLOCKS[pattern][kind.itemsize], 32 // kind.itemsize
    torch.manual_seed(0)
    weight = torch.ones(c, c, 3, 3, dtype=torch.int8 if kind.itemsize == 1 else kind)
    weight = masked_blocks(weight, *block, 1, 0.25)
    steps = view_steps(pack_steps(weight, *block), weight.shape, weight.dtype, *block, 1)
    compiled = steps_variant("", dtype, block, {"R": 3, "S": 3, "WHOLE": True}).compiled(80)
    tile, blocks = tile_for(block[0], kind.itemsize), len(steps.first) - 1
    grid = (cdiv(m, tile.block_m), blocks, 1)
    tables = [t.clone() for t in (steps.values, steps.places, steps.first, steps.sums)]
    tensors = torch.zeros(m * c, dtype=kind), *tables, torch.ones(3 * c), torch.zeros(m * c, dtype=kind)
    sizes = [n, pixels, pixels, c, c, pixels, pixels, c, c, blocks, 1, 1, 1, 1, 1, 1]
    counts = emulate(
        load(compiled.asm["ptx"]), grid, 32 * tile.num_warps, [*tensors, 0.0, 0.0, 1.0, *sizes],
        shared=compiled.metadata.shared, blocks=sample_of(grid[0] * blocks, 16), checks=Checks(races=False, blocks=False),
    ).summary()  # fmt: skip
    useful = m * int(torch.count_nonzero(weight)) / (16 * 8 * depth) * counts["blocks"] / (grid[0] * blocks)
    assert counts["instructions"] / useful <= most
