"""Kernels of runs of 32 outputs, no GPU: the extension module plans, the emulator runs nvcc's PTX, the reference decides."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncomp.ops import reference
from cnncomp.sparsity.vectors import columns, pack_vectors, to_units
from tests import cuda_emulated as emulated
from tests.ptx import EmulatorError, MemoryFault, RaceError
from tests.test_cuda_kernels import OUT_DTYPES, RESIDUALS, assert_same, random_constants, random_tensor
from tests.test_cuda_sparse24 import ARCHS
from tests.test_cuda_sparse24 import MUTANTS as COMMON
from tests.test_packers import masked_blocks

_cuda = pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")

#: Multiprocessors and bytes of shared memory that make the plan take these tiles, and their names.
LARGE, LARGE_IN_LESS, SMALL = (0, 200 << 10), (0, 100 << 10), (10**6, 200 << 10)
TILES = {LARGE: "128_64_2_3", LARGE_IN_LESS: "128_64_2_2", SMALL: "64_32_4_3"}
HALVES = (torch.float16, torch.bfloat16)


def check_conv(
    arch, n, c, h, w, k, r, s, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, density=0.4, dtype=torch.float16,
    out_dtype=None, residual=None, device=SMALL, ptx=None, out_units=False,
):  # fmt: skip
    """One convolution against the reference, bit by bit: halves are small integers, whose sums are exact. ``out_units``: output
    and residual lie as the input does."""
    what = {name: value for name, value in locals().items() if name != "ptx"}
    torch.manual_seed(n + c + h + k)
    half, geometry = dtype in HALVES, (stride, padding, dilation, groups)
    out_dtype = out_dtype or (dtype if half else torch.int8)
    draw = (lambda shape, kind: torch.randint(-2, 3, shape).to(kind)) if half else random_tensor
    x, weight = draw((n, c, h, w), dtype), draw((k, c // groups, r, s), dtype if half else torch.int8)
    weight = masked_blocks(weight, 32, columns(dtype), groups, density)
    acc = F.conv2d(x.double(), weight.double(), None, *geometry)
    res = None if residual is None else draw(acc.shape, residual)
    if half:
        factors = 2.0 ** torch.randint(-2, 2, (k,))
        constants, lo = torch.stack([factors, torch.randn(k).round(), torch.full((k,), 30.0)]), -20.0
        expected = reference.epilogue(acc, constants, res, 0.5, lo, out_dtype)
    else:
        constants, lo = random_constants(k, max(1, int(r * s * c // groups * density)), out_dtype)
        expected = reference.conv2d_int8(x, weight, constants, res, 0.5, lo, *geometry, out_dtype)
    units, packed = to_units(x, groups), pack_vectors(weight, groups)
    expected, res = ((to_units(t).flatten(1) if out_units and t is not None else t) for t in (expected, res))
    case = emulated.Case(units.flatten(1), packed, constants, res, tuple(expected.shape), out_dtype, packed=True)
    planned = _cuda.plan_conv2d_vectors_f16 if half else _cuda.plan_conv2d_vectors_int8
    plan = planned(
        *device, case.x, emulated.DTYPE_CODE[dtype], n, h, w, len(units) * columns(dtype), case.weight, k, r, s,
        *stride, *padding, *dilation, groups, *case.epilogue(0.5, lo), out_units,
    )  # fmt: skip
    assert f"_{TILES[device]}_" in plan["kernel"], plan["kernel"]
    result = emulated.run_planned(plan, arch, case.memory, ptx)
    assert_same(case.output(), expected, what | {"plan": plan["kernel"]})
    return result


CONVS = {
    "pointwise": dict(n=9, c=64, h=2, w=7, k=64, r=1, s=1),
    "linear": dict(n=70, c=100, h=1, w=1, k=40, r=1, s=1),
    "3x3": dict(n=2, c=32, h=6, w=7, k=24, r=3, s=3, padding=(1, 1)),
    "dense": dict(n=8, c=16, h=4, w=5, k=65, r=3, s=3, padding=(1, 1), density=1.0),
    "few positions": dict(n=8, c=256, h=5, w=5, k=100, r=3, s=3, padding=(1, 1), density=0.02),
    "odd channels": dict(n=3, c=7, h=6, w=9, k=33, r=3, s=3, padding=(1, 1)),
    "uneven strides": dict(n=2, c=16, h=9, w=8, k=9, r=3, s=2, stride=(3, 2), padding=(0, 1)),
    "dilation": dict(n=1, c=32, h=8, w=9, k=8, r=3, s=3, padding=(2, 4), dilation=(2, 3)),
    "groups": dict(n=5, c=60, h=5, w=5, k=140, r=3, s=3, padding=(1, 1), groups=2),
    "large kernel": dict(n=1, c=4, h=15, w=15, k=8, r=15, s=15, padding=(7, 7)),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CONVS)
def test_conv_of_halves(name, arch):
    check_conv(arch, **CONVS[name])
    check_conv(arch, **CONVS[name], dtype=torch.bfloat16, out_dtype=torch.float32, device=LARGE)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CONVS)
def test_conv_of_int8(name, arch):
    check_conv(arch, **CONVS[name], dtype=torch.uint8)
    check_conv(arch, **CONVS[name], dtype=torch.int8, device=LARGE_IN_LESS)


def test_tile_that_ends_past_the_last_pixel_on_sm_120():
    """There the compiler doubles what follows a branch, barriers too: a warp that parts would meet one in two places."""
    check_conv("120a", **CONVS["odd channels"], dtype=torch.uint8)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("k", [36, 33])  # whole vectors of 4 channels, and not
def test_outputs_and_residuals_of_int8(out_dtype, residual, k):
    check_conv("80", 9, 32, 2, 3, k, 1, 1, dtype=torch.int8, out_dtype=out_dtype, residual=residual, density=0.7)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("out_is_float, residual_is_float", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("k", [36, 33])
def test_outputs_and_residuals_of_halves(dtype, out_is_float, residual_is_float, k):
    kinds = (torch.float32 if as_float else dtype for as_float in (out_is_float, residual_is_float))
    check_conv("80", 9, 32, 2, 3, k, 1, 1, (1, 1), (0, 0), (1, 1), 1, 0.7, dtype, *kinds)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_conv_random(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups, r, s, dilation = draw(1, 3), draw(1, 4), draw(1, 4), (draw(1, 2), draw(1, 2))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.int8, *HALVES]))
    out_dtype = dtype if dtype in HALVES else data.draw(st.sampled_from(OUT_DTYPES))
    check_conv(
        "80", draw(1, 10), groups * draw(1, 50), draw(dilation[0] * (r - 1) + 1, 9), draw(dilation[1] * (s - 1) + 1, 9),
        groups * draw(1, 70), r, s, (draw(1, 3), draw(1, 3)), (draw(0, 2), draw(0, 2)), dilation, groups,
        data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), dtype, out_dtype,
        device=data.draw(st.sampled_from([LARGE, LARGE_IN_LESS, SMALL])),
    )  # fmt: skip


#: Batches of whole units, whose pixels are no whole tiles, and outputs that are no whole runs.
CHAINED = {
    "edges": dict(n=16, c=32, h=5, w=5, k=72, r=3, s=3, padding=(1, 1)),
    "one unit": dict(n=8, c=20, h=3, w=3, k=200, r=1, s=1, stride=(2, 2)),
    "groups": dict(n=32, c=48, h=4, w=3, k=80, r=3, s=2, padding=(1, 0), groups=2),
}


def check_in_units(check_conv, name, dtype, with_residual):
    """A convolution of CHAINED whose output and residual lie in units."""
    half = dtype in HALVES
    residual = (dtype if half else torch.int8) if with_residual else None
    for out_dtype in (dtype,) if half else (torch.int8, torch.uint8):
        check_conv(**CHAINED[name], out_dtype=out_dtype, residual=residual, out_units=True)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype, device", [(torch.uint8, LARGE), (torch.int8, SMALL), (torch.float16, LARGE_IN_LESS),
                                           (torch.bfloat16, SMALL)])  # fmt: skip
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("name", CHAINED)
def test_output_in_units(name, with_residual, dtype, device, arch):
    check_in_units(partial(check_conv, arch, dtype=dtype, device=device), name, dtype, with_residual)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_output_in_units_takes_no_more_sectors(dtype):
    """Stores of whole sectors: as many as images need."""
    sizes = dict(n=16, c=16, h=8, w=8, k=64, r=1, s=1, dtype=dtype, out_dtype=dtype, device=LARGE, density=0.0)
    plain, units = (check_conv("80", **sizes, out_units=out_units) for out_units in (False, True))
    assert units.sectors == plain.sectors


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_words_that_are_not_exchanged_are_caught(dtype):
    kernel = "conv2d_vectors_f16" if dtype == torch.float16 else "conv2d_vectors_int8"
    ptx, count = re.subn(
        r"shfl\.sync\.bfly\.b32(\s+)(%\w+)\|%\w+, (%\w+),.*;", r"mov.b32\1\2, \3;", emulated.ptx_of(kernel, "80")
    )
    assert count > 0
    with pytest.raises(AssertionError):
        check_conv("80", **CHAINED["edges"], dtype=dtype, out_dtype=dtype, out_units=True, ptx=ptx)


@pytest.mark.parametrize(
    "change, match",
    [(dict(n=9), "multiple of 8"), (dict(k=6), "multiple of 4"), (dict(out=8), "aligned to 16"), (dict(code=2), "another size"),
     (dict(residual=16, residual_code=2), "another size")],
)  # fmt: skip
def test_outputs_that_do_not_fit_into_units_are_refused(change, match):
    a = dict(n=8, k=8, residual=0, residual_code=0, out=0, code=0) | change
    n, k, *rest = a.values()
    epilogue = (*rest[:2], 1.0, 0.0, *rest[2:])
    with pytest.raises(ValueError, match=match):
        _cuda.plan_conv2d_vectors_int8(*SMALL, 0, 0, n, 4, 4, 32, 0, k, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, *epilogue, True)


def test_sums_of_halves_stay_within_their_bound():
    """Random numbers: a sum of n products in float32, in any order, is off by at most n 2^-24 times the sum of their magnitudes
    (Higham, Accuracy and Stability of Numerical Algorithms, 3.1); tensor cores truncate, which doubles it."""
    torch.manual_seed(0)
    x, weight = torch.randn(8, 64, 6, 6).half(), torch.randn(32, 64, 3, 3).half()
    weight = masked_blocks(weight, 32, 1, 1, 0.3)
    constants = torch.stack([torch.ones(32), torch.zeros(32), torch.full((32,), float("inf"))])
    case = emulated.Case(
        to_units(x).flatten(1), pack_vectors(weight), constants, None, (8, 32, 4, 4), torch.float32, packed=True
    )
    plan = _cuda.plan_conv2d_vectors_f16(
        *LARGE,
        case.x,
        3,
        8,
        6,
        6,
        64,
        case.weight,
        32,
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
    count = int((weight[0] != 0).sum())
    assert bool(((case.output() - exact).abs() <= 2 * count * 2.0**-24 * magnitude).all())


def test_layer_of_zeros_and_zero_runs():
    check_conv("80", 1, 16, 4, 4, 64, 3, 3, density=0.0)
    check_conv("80", 1, 4, 4, 4, 200, 1, 1, density=0.3, dtype=torch.int8)


@pytest.mark.parametrize("device", TILES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_shared_memory_has_no_bank_conflicts(device, dtype):
    result = check_conv("80", n=16, c=64, h=6, w=6, k=64, r=3, s=3, padding=(1, 1), dtype=dtype, device=device)
    assert result.wavefronts == result.ideal_wavefronts > 0


def test_what_is_zero_is_not_multiplied():
    """Each run of 64 channels at 9 taps that keeps half of its positions takes no more pieces than they fill."""
    whole, half = (
        check_conv("80", n=8, c=64, h=8, w=8, k=64, r=3, s=3, padding=(1, 1), density=density) for density in (1.0, 0.5)
    )
    assert whole.summary()["tensor_ops"] == 2 * 8 * 64 * 64 * 64 * 9
    assert half.summary()["tensor_ops"] < 0.6 * whole.summary()["tensor_ops"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.uint8, *HALVES])
@pytest.mark.parametrize("n, c, h, w", [(8, 64, 4, 4), (70, 16, 1, 1), (3, 80, 5, 7), (17, 48, 2, 3)])
def test_copies_into_units(n, c, h, w, dtype, arch):
    x = torch.randint(0, 256, (n, c, h, w)).to(dtype)
    expected = to_units(x)
    memory = emulated.GlobalMemory()
    source, image = memory.allocate(emulated.nhwc(x)), emulated.nhwc(torch.zeros_like(expected.flatten()))
    target = memory.allocate(image)
    plan = _cuda.plan_to_units(source, emulated.DTYPE_CODE[dtype], n, h, w, c, target)
    result = emulated.run_planned(plan, arch, memory)
    got = torch.from_numpy(memory.fetch(target, image)).view(dtype).reshape(expected.shape)
    assert torch.equal(got, expected)
    if n % 8 == 0 and h * w % 16 == 0:
        assert result.sectors * 32 == x.nbytes + expected.nbytes


def test_what_cannot_be_copied_into_units_is_refused():
    for change, match in ((dict(c=24), "whole pieces"), (dict(out=8), "aligned"), (dict(x_dtype=2), "1 or 2")):
        a = dict(x=0, x_dtype=1, n=8, h=4, w=4, c=32, out=0) | change
        with pytest.raises(ValueError, match=match):
            _cuda.plan_to_units(*a.values())


MUTANTS = {
    "barrier removed": COMMON["barrier removed"],
    "copy of what is outside": (
        (AssertionError, MemoryFault),
        r"(cp\.async\.cg\.shared\.global \[[^\]]+\], \[%\w+\], 16), %\w+;",
        r"\1, 16;",
    ),
    "wait too weak": (RaceError, r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;"),
    "no wait": (RaceError, r"cp\.async\.wait_group 1;", ""),
    "matrices not turned": (AssertionError, r"\.x4\.trans\.", ".x4."),
    "halves of the depth exchanged": (
        AssertionError,
        r"(mma\.\S+ \{.*?\},)\{(.*?),(.*?),(.*?),(.*?)\}",
        r"\1{\4,\5,\2,\3}",
    ),
    "remainders of 16 lost": (
        (AssertionError, EmulatorError),
        r"and\.b32( +\t?)(%\w+), (%\w+), 15;",
        r"mov.u32 \2, 0;",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_broken_kernel_is_caught(name, dtype):
    error, pattern, replacement = MUTANTS[name]
    kernel = "conv2d_vectors_f16" if dtype == torch.float16 else "conv2d_vectors_int8"
    if name == "matrices not turned" and dtype != torch.float16:
        pytest.skip("8 bits are not turned")
    ptx, count = re.subn(pattern, replacement, emulated.ptx_of(kernel, "80"))
    assert count > 0
    sizes = dict(n=9, c=64, h=5, w=5, k=16, r=3, s=3, padding=(1, 1), dtype=dtype, density=0.7)
    check_conv("80", **sizes)
    with pytest.raises(error):
        check_conv("80", **sizes, ptx=ptx)


@pytest.mark.parametrize(
    "change, match",
    [(dict(c=18), "no multiple of 4"), (dict(r=16), "more than 15 rows"), (dict(n=2**20, h=64), "2\\^31 bytes"),
     (dict(x=8), "aligned")],
)  # fmt: skip
def test_what_the_kernels_cannot_run_is_refused(change, match):
    a = dict(x=0, signed=False, n=1, h=20, w=20, c=32, weight=0, k=8, r=3, s=3) | change
    with pytest.raises(ValueError, match=match):
        _cuda.plan_conv2d_vectors_int8(*SMALL, *a.values(), 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0.0, 0.0, 0, 0, False)
