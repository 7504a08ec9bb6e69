"""CUDA kernels without a GPU: the extension module plans the launch, the emulator runs nvcc's PTX, the reference decides."""

from __future__ import annotations

import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncomp.ops import reference
from tests import cuda_emulated as emulated
from tests.ptx import MemoryFault, RaceError

_cuda = pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")

ARCHS = (
    ("75", "80", "86", "89", "90a", "120a") if os.environ.get("CNNCOMP_GPU_FULL") else ("75", "80")
)  # one per code path
SMS = 108  # multiprocessors of an A100
INT_RANGE = {torch.uint8: (0, 256), torch.int8: (-128, 128)}
OUT_DTYPES = [torch.uint8, torch.int8, torch.float32]
RESIDUALS = [None, torch.uint8, torch.int8, torch.float32]


def random_tensor(shape, dtype):
    return torch.randn(shape) * 20 if dtype.is_floating_point else torch.randint(*INT_RANGE[dtype], shape, dtype=dtype)


def random_constants(k, products, out_dtype):
    """(3, k) constants that spread the outputs over the 8-bit range and past its ends, and lo."""
    lo, top = {torch.uint8: (0.0, 255.0), torch.int8: (-128.0, 127.0)}.get(out_dtype, (-1e4, 1e4))
    scale = (torch.rand(k) + 0.5) * 100 / (7000 * products**0.5)
    hi = torch.where(torch.rand(k) < 0.3, torch.rand(k) * top, torch.tensor(top))
    return torch.stack([scale, torch.randn(k) * 30 + 30, hi]), lo


def assert_same(got, expected, what):
    if not torch.equal(got, expected):
        at = (got != expected).nonzero()
        i = tuple(at[0].tolist())
        raise AssertionError(f"{what}: {len(at)} of {got.numel()} differ, first {i}: {got[i]}, expected {expected[i]}")


def check_conv(
    arch, n, c, h, w, k, r, s, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, dtype=torch.uint8,
    out_dtype=torch.int8, residual=None, tile="", parts=1, kernel=None, misalign=0, ptx=None,
):  # fmt: skip
    """One convolution against the reference; gives back what the emulator counted."""
    what = {name: value for name, value in locals().items() if name != "ptx"}
    torch.manual_seed(n + c + h + k)
    x, weight = random_tensor((n, c, h, w), dtype), torch.randint(-127, 128, (k, c // groups, r, s), dtype=torch.int8)
    constants, lo = random_constants(k, r * s * c // groups, out_dtype)
    geometry = (stride, padding, dilation, groups)
    shape = tuple(torch.nn.functional.conv2d(x.float(), weight.float(), None, *geometry).shape)
    res = None if residual is None else random_tensor(shape, residual)
    expected = reference.conv2d_int8(x, weight, constants, res, 0.37, lo, *geometry, out_dtype)
    case = emulated.Case(x, weight, constants, res, shape, out_dtype, misalign, _cuda.WORKSPACE_BYTES)
    plan = _cuda.plan_conv2d_int8(
        SMS, case.x, dtype == torch.int8, n, h, w, c, case.weight, k, r, s,
        *stride, *padding, *dilation, groups, *case.epilogue(0.37, lo, tile, parts),
    )  # fmt: skip
    if kernel:
        assert plan["kernel"].startswith(kernel), plan["kernel"]
    result = emulated.run_planned(plan, arch, case.memory, ptx)
    assert_same(case.output(), expected, what | {"plan": plan["kernel"]})
    return result


def check_linear(
    arch, m, c, k, dtype=torch.uint8, out_dtype=torch.int8, residual=None, tile="", parts=1, kernel=None
):
    what = dict(locals())
    torch.manual_seed(m + c + k)
    x, weight = random_tensor((m, c), dtype), torch.randint(-127, 128, (k, c), dtype=torch.int8)
    constants, lo = random_constants(k, c, out_dtype)
    res = None if residual is None else random_tensor((m, k), residual)
    expected = reference.linear_int8(x, weight, constants, res, -0.61, lo, out_dtype)
    case = emulated.Case(x, weight, constants, res, (m, k), out_dtype, 0, _cuda.WORKSPACE_BYTES)
    plan = _cuda.plan_linear_int8(
        SMS, case.x, dtype == torch.int8, m, c, case.weight, k, *case.epilogue(-0.61, lo, tile, parts)
    )
    if kernel:
        assert plan["kernel"].startswith(kernel), plan["kernel"]
    result = emulated.run_planned(plan, arch, case.memory)
    assert_same(case.output(), expected, what | {"plan": plan["kernel"]})
    return result


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "m, c, k", [(1, 16, 1), (64, 64, 64), (63, 48, 65), (65, 80, 63), (130, 192, 8), (5, 256, 100), (64, 320, 16)]
)
def test_linear_at_tile_edges(arch, m, c, k):
    check_linear(arch, m, c, k, kernel="gemm_int8_64x64")
    check_linear(arch, m, c, k, torch.int8)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("m, c, k", [(128, 128, 128), (127, 144, 136), (129, 64, 257)])
def test_linear_with_large_tiles(arch, m, c, k):
    check_linear(arch, m, c, k, torch.int8, multiprocessors=FEW, kernel="gemm_int8_128x128")


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("k", [24, 21])  # whole vectors of 8 channels, and not
def test_linear_outputs_and_residuals(out_dtype, residual, k):
    check_linear("80", 19, 32, k, torch.int8, out_dtype, residual)


CONVS = {
    "pointwise": dict(n=2, c=32, h=6, w=7, k=16, r=1, s=1, kernel="gemm_int8_64x64"),
    "3x3": dict(n=2, c=32, h=6, w=7, k=24, r=3, s=3, padding=(1, 1), kernel="conv2d_int8_64x64"),
    "channels across steps": dict(n=1, c=80, h=4, w=5, k=65, r=3, s=3, padding=(1, 1)),
    "16 channels": dict(n=1, c=16, h=9, w=9, k=16, r=5, s=5, padding=(2, 2), stride=(2, 2)),
    "stem": dict(n=1, c=3, h=14, w=15, k=40, r=7, s=7, stride=(2, 2), padding=(3, 3), kernel="conv2d_int8_64x64"),
    "odd channels": dict(n=1, c=33, h=4, w=4, k=5, r=2, s=3, padding=(1, 2)),
    "odd linear": dict(n=3, c=50, h=1, w=1, k=9, r=1, s=1),
    "uneven strides": dict(n=2, c=16, h=9, w=8, k=9, r=3, s=2, stride=(3, 2), padding=(0, 1)),
    "dilation": dict(n=1, c=32, h=8, w=9, k=8, r=3, s=3, padding=(2, 4), dilation=(2, 3)),
    "padding alone": dict(n=1, c=16, h=1, w=1, k=4, r=3, s=3, padding=(1, 1)),
    "groups": dict(n=1, c=32, h=5, w=5, k=12, r=3, s=3, padding=(1, 1), groups=2),
    "odd groups": dict(n=1, c=12, h=5, w=5, k=9, r=3, s=3, padding=(1, 1), groups=3),
    "depthwise": dict(n=2, c=20, h=9, w=7, k=20, r=3, s=3, stride=(2, 1), padding=(1, 1), groups=20,
                      kernel="depthwise_int8_4"),
    "odd depthwise": dict(n=1, c=7, h=5, w=6, k=7, r=3, s=3, padding=(1, 1), groups=7, kernel="depthwise_int8_1"),
    "depth multiplier": dict(n=1, c=4, h=6, w=5, k=8, r=3, s=3, padding=(1, 1), dilation=(1, 2), groups=4),
    "one group of one": dict(n=1, c=1, h=6, w=5, k=8, r=3, s=3, padding=(1, 1), kernel="conv2d_int8_64x64"),
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CONVS)
def test_conv(name, arch):
    check_conv(arch, **CONVS[name])
    if arch == "80":
        check_conv(arch, **CONVS[name], dtype=torch.int8)


@pytest.mark.parametrize("name", ["3x3", "depthwise"])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_conv_outputs_and_residuals(name, out_dtype, residual):
    check_conv("80", **CONVS[name], out_dtype=out_dtype, residual=residual)


@pytest.mark.parametrize("arch", ARCHS)
def test_conv_with_large_tiles(arch):
    sizes = dict(n=1, c=48, h=12, w=11, k=136, r=3, s=3, padding=(1, 1))
    check_conv(arch, **sizes, multiprocessors=FEW, kernel="conv2d_int8_128x128")


def test_misaligned_input_is_read_byte_by_byte():
    check_conv("80", **CONVS["3x3"] | {"kernel": "conv2d_int8_64x64_32x32_3_u8_bytes"}, misalign=1)
    check_conv("80", **CONVS["depthwise"] | {"kernel": "depthwise_int8_1"}, misalign=2)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_conv_random(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups, r, s, dilation = draw(1, 2), draw(1, 4), draw(1, 4), (draw(1, 2), draw(1, 2))
    check_conv(
        data.draw(st.sampled_from(ARCHS)), draw(1, 2), groups * data.draw(st.sampled_from([5, 16, 48, 64])),
        draw(dilation[0] * (r - 1) + 1, 9), draw(dilation[1] * (s - 1) + 1, 9), groups * draw(1, 70), r, s,
        (draw(1, 3), draw(1, 3)), (draw(0, 2), draw(0, 2)), dilation, groups,
        data.draw(st.sampled_from(list(INT_RANGE))), data.draw(st.sampled_from(OUT_DTYPES)),
        data.draw(st.sampled_from(RESIDUALS)),
    )  # fmt: skip


def test_extremes_and_ties():
    """255 * -127 throughout, and halves that must go to the even neighbour."""
    x, weight = torch.full((3, 512), 255, dtype=torch.uint8), torch.full((8, 512), -127, dtype=torch.int8)
    constants = torch.tensor([[1.0], [0.0], [float("inf")]]).expand(3, 8).contiguous()
    case = emulated.Case(x, weight, constants, None, (3, 8), torch.float32)
    plan = _cuda.plan_linear_int8(1, case.x, False, 3, 512, case.weight, 8, *case.epilogue(0.0, -float("inf")))
    emulated.run_planned(plan, "80", case.memory)
    assert_same(case.output(), torch.full((3, 8), -255.0 * 127 * 512), "extremes")

    x, weight = torch.zeros(11, 16, dtype=torch.int8), torch.zeros(8, 16, dtype=torch.int8)
    x[:, 0], weight[:, 0] = torch.arange(-5, 6), 1
    constants = torch.tensor([[0.5], [0.0], [127.0]]).expand(3, 8).contiguous()
    case = emulated.Case(x, weight, constants, None, (11, 8), torch.int8)
    plan = _cuda.plan_linear_int8(1, case.x, True, 11, 16, case.weight, 8, *case.epilogue(0.0, -128.0))
    emulated.run_planned(plan, "80", case.memory)
    assert case.output()[:, 3].tolist() == [-2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2]


def test_shared_memory_has_no_bank_conflicts():
    result = check_linear("80", 64, 256, 64, torch.int8)
    assert result.wavefronts == result.ideal_wavefronts > 0
    result = check_conv("80", n=1, c=64, h=8, w=8, k=64, r=3, s=3, padding=(1, 1))
    assert result.wavefronts == result.ideal_wavefronts


MUTANTS = {
    "barrier removed": (RaceError, r"bar\.sync[^;]*;", ""),
    "wait too weak": (RaceError, r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;"),
    "copy of what is outside": (
        MemoryFault,
        r"(cp\.async\.cg\.shared\.global \[%\w+\], \[%\w+\], 16), %\w+;",
        r"\1, 16;",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_kernel_is_caught(name):
    """The checks can fail: the same kernel, broken."""
    error, pattern, replacement = MUTANTS[name]
    ptx, count = re.subn(pattern, replacement, emulated.ptx_of("conv2d_int8", "80"))
    assert count > 0
    sizes = dict(n=1, c=64, h=5, w=5, k=16, r=3, s=3, padding=(1, 1))
    check_conv("80", **sizes)
    if name.startswith("copy"):  # reads the first pixel in place of zeros, so the numbers are wrong, not the addresses
        error = AssertionError
    with pytest.raises(error):
        check_conv("80", **sizes, ptx=ptx)


def test_output_past_its_end_is_caught():
    x, weight = torch.zeros(5, 16, dtype=torch.uint8), torch.zeros(8, 16, dtype=torch.int8)
    case = emulated.Case(x, weight, torch.zeros(3, 8), None, (4, 8), torch.int8)
    plan = _cuda.plan_linear_int8(1, case.x, False, 5, 16, case.weight, 8, *case.epilogue(0.0, 0.0))
    with pytest.raises(MemoryFault, match="out of bounds"):
        emulated.run_planned(plan, "80", case.memory)


def test_module_without_a_driver():
    if _cuda.device_count():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="cuda"):
        _cuda.device_info(0)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="multiples of groups=3"):
        _cuda.plan_conv2d_int8(1, 0, False, 1, 4, 4, 4, 0, 6, 1, 1, 1, 1, 0, 0, 1, 1, 3, 0, 0, 0, 0.0, 0.0, 0, 0)
    with pytest.raises(ValueError, match="dtype code"):
        _cuda.plan_linear_int8(1, 0, False, 1, 4, 0, 6, 0, 0, 7, 0.0, 0.0, 0, 0)
