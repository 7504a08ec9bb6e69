"""Kernels of V:2:M weights, no GPU: the extension module plans, the emulator runs nvcc's PTX, the reference decides."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncomp.ops import reference
from cnncomp.sparsity.vnm import pack_vnm, to_units
from tests import cuda_emulated as emulated
from tests.ptx import MemoryFault
from tests.test_cuda_kernels import OUT_DTYPES, RESIDUALS, assert_same, random_constants, random_tensor
from tests.test_cuda_sparse24 import ARCHS
from tests.test_cuda_vectors import CHAINED, HALVES, check_in_units
from tests.test_cuda_vectors import MUTANTS as COMMON
from tests.test_packers import masked_vnm

_cuda = pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")

#: Multiprocessors and bytes of shared memory that make the plan take these tiles, and their names; SMALL for halves alone.
LARGE, LARGE_IN_LESS, SMALL = (0, 200 << 10), (0, 100 << 10), (10**6, 200 << 10)
TILES = {LARGE: "128_32_2_3", LARGE_IN_LESS: "128_32_2_2", SMALL: "64_16_4_3"}


def check_conv(
    arch, n, c, h, w, k, r, s, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, m=8, density=1.0,
    dtype=torch.float16, out_dtype=None, residual=None, device=LARGE, ptx=None,
    out_units=False,
):  # fmt: skip
    """One convolution against the reference, bit by bit: halves are small integers, whose sums are exact. ``out_units``: output
    and residual lie as the input does."""
    what = {name: value for name, value in locals().items() if name != "ptx"}
    torch.manual_seed(n + c + h + k)
    half, geometry = dtype in HALVES, (stride, padding, dilation, groups)
    out_dtype = out_dtype or (dtype if half else torch.int8)
    draw = (lambda shape, kind: torch.randint(-2, 3, shape).to(kind)) if half else random_tensor
    x, weight = draw((n, c, h, w), dtype), draw((k, c // groups, r, s), dtype if half else torch.int8)
    weight = masked_vnm(weight, 64, m, groups) * (torch.rand(weight.shape) < density).to(weight.dtype)
    acc = F.conv2d(x.double(), weight.double(), None, *geometry)
    res = None if residual is None else draw(acc.shape, residual)
    if half:
        factors = 2.0 ** torch.randint(-2, 2, (k,))
        constants, lo = torch.stack([factors, torch.randn(k).round(), torch.full((k,), 30.0)]), -20.0
        expected = reference.epilogue(acc, constants, res, 0.5, lo, out_dtype)
    else:
        constants, lo = random_constants(k, max(1, int(r * s * c // groups * 2 / m)), out_dtype)
        expected = reference.conv2d_int8(x, weight, constants, res, 0.5, lo, *geometry, out_dtype)
    units, packed = to_units(x), pack_vnm(weight, m, groups)
    expected, res = ((to_units(t).flatten(1) if out_units and t is not None else t) for t in (expected, res))
    case = emulated.Case(units.flatten(1), packed, constants, res, tuple(expected.shape), out_dtype, packed=True)
    planned = _cuda.plan_conv2d_vnm_f16 if half else _cuda.plan_conv2d_vnm_int8
    plan = planned(
        *device, case.x, emulated.DTYPE_CODE[dtype], n, h, w, len(units), case.weight, k, r, s,
        *stride, *padding, *dilation, groups, *case.epilogue(0.5, lo), out_units,
    )  # fmt: skip
    unit = "16" if dtype.itemsize == 1 and n > 8 else "8"
    assert f"_{TILES[device]}_{unit}_" in plan["kernel"] or (device == SMALL and not half), plan["kernel"]
    result = emulated.run_planned(plan, arch, case.memory, ptx)
    assert_same(case.output(), expected, what | {"plan": plan["kernel"]})
    return result


CONVS = {
    "pointwise": dict(n=17, c=64, h=2, w=7, k=64, r=1, s=1),
    "linear": dict(n=140, c=100, h=1, w=1, k=40, r=1, s=1, m=10),
    "3x3": dict(n=2, c=32, h=6, w=7, k=24, r=3, s=3, padding=(1, 1)),
    "2:4": dict(n=8, c=16, h=4, w=5, k=65, r=3, s=3, padding=(1, 1), m=4),
    "few of many": dict(n=8, c=256, h=5, w=5, k=130, r=3, s=3, padding=(1, 1), m=40),
    "odd channels": dict(n=3, c=7, h=6, w=9, k=33, r=3, s=3, padding=(1, 1), m=5),
    "uneven strides": dict(n=2, c=16, h=9, w=8, k=9, r=3, s=2, stride=(3, 2), padding=(0, 1)),
    "dilation": dict(n=1, c=32, h=8, w=9, k=8, r=3, s=3, padding=(2, 4), dilation=(2, 3)),
    "groups": dict(n=5, c=60, h=5, w=5, k=140, r=3, s=3, padding=(1, 1), groups=2, m=20),
    "large kernel": dict(n=1, c=4, h=15, w=15, k=8, r=15, s=15, padding=(7, 7)),
    "rows of zeros": dict(n=9, c=48, h=3, w=4, k=70, r=2, s=2, density=0.05),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CONVS)
def test_conv_of_halves(name, arch):
    check_conv(arch, **CONVS[name], device=SMALL)
    check_conv(arch, **CONVS[name], dtype=torch.bfloat16, out_dtype=torch.float32)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CONVS)
def test_conv_of_int8(name, arch):
    check_conv(arch, **CONVS[name], dtype=torch.uint8)
    check_conv(arch, **CONVS[name], dtype=torch.int8, device=LARGE_IN_LESS)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("k", [72, 69])  # whole vectors of 8 channels, and not
def test_outputs_and_residuals_of_int8(out_dtype, residual, k):
    check_conv("80", 9, 32, 2, 3, k, 1, 1, dtype=torch.int8, out_dtype=out_dtype, residual=residual)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("out_is_float, residual_is_float", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("k", [72, 69])
def test_outputs_and_residuals_of_halves(dtype, out_is_float, residual_is_float, k):
    kinds = [torch.float32 if as_float else dtype for as_float in (out_is_float, residual_is_float)]
    check_conv("80", 9, 32, 2, 3, k, 1, 1, dtype=dtype, out_dtype=kinds[0], residual=kinds[1])


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_conv_random(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups, r, s, dilation = draw(1, 3), draw(1, 4), draw(1, 4), (draw(1, 2), draw(1, 2))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.int8, *HALVES]))
    out_dtype = dtype if dtype in HALVES else data.draw(st.sampled_from(OUT_DTYPES))
    check_conv(
        "80", draw(1, 20), groups * draw(1, 50), draw(dilation[0] * (r - 1) + 1, 9), draw(dilation[1] * (s - 1) + 1, 9),
        groups * draw(1, 80), r, s, (draw(1, 3), draw(1, 3)), (draw(0, 2), draw(0, 2)), dilation, groups, draw(4, 40),
        data.draw(st.sampled_from([0.0, 0.3, 1.0])), dtype, out_dtype, device=data.draw(st.sampled_from(list(TILES))),
    )  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype, device", [(torch.uint8, LARGE), (torch.int8, LARGE_IN_LESS), (torch.float16, LARGE),
                                           (torch.bfloat16, SMALL)])  # fmt: skip
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("name", CHAINED)
def test_output_in_units(name, with_residual, dtype, device, arch):
    check_in_units(partial(check_conv, arch, dtype=dtype, device=device), name, dtype, with_residual)


@pytest.mark.parametrize("n, dtype", [(16, torch.uint8), (8, torch.uint8), (8, torch.float16)])
def test_output_in_units_takes_no_more_sectors(n, dtype):
    """Stores of whole sectors: as many as images need."""
    sizes = dict(n=n, c=16, h=8, w=8, k=64, r=1, s=1, dtype=dtype, out_dtype=dtype, density=0.0)
    plain, units = (check_conv("80", **sizes, out_units=out_units) for out_units in (False, True))
    assert units.sectors == plain.sectors


def test_sums_of_halves_stay_within_their_bound():
    """Random numbers: a sum of n products in float32, in any order, is off by at most n 2^-24 times the sum of their magnitudes
    (Higham, Accuracy and Stability of Numerical Algorithms, 3.1); tensor cores truncate, which doubles it."""
    torch.manual_seed(0)
    x, weight = torch.randn(8, 64, 6, 6).half(), masked_vnm(torch.randn(64, 64, 3, 3).half(), 64, 8)
    constants = torch.stack([torch.ones(64), torch.zeros(64), torch.full((64,), float("inf"))])
    units = to_units(x).flatten(1)
    case = emulated.Case(units, pack_vnm(weight, 8), constants, None, (8, 64, 4, 4), torch.float32, packed=True)
    plan = _cuda.plan_conv2d_vnm_f16(
        *LARGE,
        case.x,
        3,
        8,
        6,
        6,
        64,
        case.weight,
        64,
        3,
        3,
        1,
        1,
        0,
        0,
        1,
        1,
        1,
        *case.epilogue(0.0, -float("inf")),
        False,
    )
    emulated.run_planned(plan, "80", case.memory)
    exact, magnitude = F.conv2d(x.double(), weight.double()), F.conv2d(x.double().abs(), weight.double().abs())
    count = 64 * 9 // 4
    assert bool(((case.output() - exact).abs() <= 2 * count * 2.0**-24 * magnitude).all())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_layer_of_zeros_is_its_bias(dtype):
    check_conv("80", 1, 16, 4, 4, 70, 3, 3, density=0.0, dtype=dtype)


@pytest.mark.parametrize("n", [8, 16])
@pytest.mark.parametrize("device, dtype", [(d, t) for d in TILES for t in (torch.uint8, torch.float16)][:-2])
def test_shared_memory_has_no_bank_conflicts(device, dtype, n):
    result = check_conv("80", n=n, c=64, h=6, w=6, k=64, r=3, s=3, padding=(1, 1), dtype=dtype, device=device)
    assert result.wavefronts == result.ideal_wavefronts > 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_what_is_zero_is_not_multiplied(dtype):
    """Four of M columns, and half of their products."""
    sizes = dict(n=16, c=256, h=4, w=4, k=64, r=3, s=3, padding=(1, 1), dtype=dtype)
    whole = 2 * 16 * 16 * 64 * 256 * 9
    for m in (8, 16):
        assert check_conv("80", **sizes, m=m).summary()["tensor_ops"] == whole * 4 / m


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("n, c, h, w", [(16, 64, 4, 4), (70, 16, 1, 1), (3, 80, 5, 7), (33, 48, 2, 3), (8, 32, 4, 4)])
def test_copies_into_units_of_bytes(n, c, h, w, arch):
    x = torch.randint(0, 256, (n, c, h, w)).to(torch.uint8)
    expected = to_units(x)
    memory = emulated.GlobalMemory()
    source, image = memory.allocate(emulated.nhwc(x)), emulated.nhwc(torch.zeros_like(expected.flatten()))
    target = memory.allocate(image)
    plan = _cuda.plan_to_byte_units(source, emulated.DTYPE_CODE[x.dtype], n, h, w, c, target)
    result = emulated.run_planned(plan, arch, memory)
    assert torch.equal(torch.from_numpy(memory.fetch(target, image)).reshape(expected.shape), expected)
    if n in (8, 16):
        assert result.sectors * 32 == 2 * x.nbytes


def test_what_cannot_be_copied_into_units_of_bytes_is_refused():
    of_bytes = "a multiple of 16 of one byte"
    for change, match in ((dict(c=24), of_bytes), (dict(out=8), of_bytes), (dict(x_dtype=3), "got dtype code 3")):
        a = dict(x=0, x_dtype=1, n=8, h=4, w=4, c=32, out=0) | change
        with pytest.raises(ValueError, match=match):
            _cuda.plan_to_byte_units(*a.values())


MUTANTS = {name: COMMON[name] for name in COMMON if name != "halves of the depth exchanged"} | {
    "metadata of other lanes": (
        AssertionError,
        r"(mma\.sp\S+ \{.*?\},\{.*?\},\{.*?\},\{.*?\},)%\w+",
        r"\g<1>0x44444444",
    ),
    "quarters of the depth exchanged": (
        AssertionError,
        r"(mma\.\S+ \{.*?\},\{.*?\},)\{(.*?),(.*?),(.*?),(.*?)\}",
        r"\1{\3,\2,\4,\5}",
    ),
    "bytes not turned": (AssertionError, r"prmt\.b32(\s+)(%\w+), (%\w+), (%\w+), (%\w+);", r"mov.b32\1\2, \3;"),
}
MUTANTS["copy of eight bytes outside"] = (
    (AssertionError, MemoryFault),
    r"(cp\.async\.ca\.shared\.global \[[^\]]+\], \[%\w+\], 8), %\w+;",
    r"\1, 8;",
)
IMAGES = {"copy of eight bytes outside": 7}
ONLY = {
    "copy of eight bytes outside": torch.uint8,
    "matrices not turned": torch.float16,
    "bytes not turned": torch.uint8,
}


CASES = [(t, name) for name in MUTANTS for t in (torch.uint8, torch.float16) if ONLY.get(name, t) == t]


@pytest.mark.parametrize("dtype, name", CASES)
def test_broken_kernel_is_caught(name, dtype):
    error, pattern, replacement = MUTANTS[name]
    kernel = "conv2d_vnm_f16" if dtype == torch.float16 else "conv2d_vnm_int8"
    ptx, count = re.subn(pattern, replacement, emulated.ptx_of(kernel, "80"))
    assert count > 0
    sizes = dict(n=IMAGES.get(name, 9), c=128, h=5, w=5, k=16, r=3, s=3, padding=(1, 1), dtype=dtype)
    check_conv("80", **sizes)
    with pytest.raises(error):
        check_conv("80", **sizes, ptx=ptx)


@pytest.mark.parametrize(
    "change, match",
    [(dict(r=16), "more than 15 rows"), (dict(n=2**20, h=64), "2\\^31 bytes"), (dict(x=8), "aligned")],
)
def test_what_the_kernels_cannot_run_is_refused(change, match):
    a = dict(x=0, signed=False, n=1, h=20, w=20, c=32, weight=0, k=8, r=3, s=3) | change
    with pytest.raises(ValueError, match=match):
        _cuda.plan_conv2d_vnm_int8(*SMALL, *a.values(), 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0.0, 0.0, 0, 0, False)
