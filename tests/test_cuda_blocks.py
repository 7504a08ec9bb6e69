"""Kernels of gathered blocks without a GPU: the extension module plans, the emulator runs nvcc's PTX, the reference decides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncomp.ops import reference
from cnncomp.sparsity import pack_gathered
from tests import cuda_emulated as emulated
from tests.test_cuda_kernels import OUT_DTYPES, RESIDUALS, assert_same, random_constants, random_tensor
from tests.test_cuda_sparse24 import ARCHS, MUTANTS, check_that_broken_is_caught
from tests.test_packers import masked_blocks

_cuda = pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")

#: Multiprocessors and bytes of shared memory that make the plan take these tiles.
LARGE, LARGE_IN_LESS, SMALL = (1, 160 << 10), (1, 100 << 10), (10**6, 160 << 10)
HALVES = (torch.float16, torch.bfloat16)


def check_conv(
    arch, n, c, h, w, k, r, s, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, density=0.4, dtype=torch.uint8,
    out_dtype=torch.int8, residual=None, device=SMALL, kernel=None, ptx=None,
):  # fmt: skip
    """One convolution against the reference, bit by bit: halves are small integers, whose sums are exact."""
    what = {name: value for name, value in locals().items() if name != "ptx"}
    torch.manual_seed(n + c + h + k)
    half, geometry = dtype in HALVES, (stride, padding, dilation, groups)
    draw = (lambda shape, kind: torch.randint(-2, 3, shape).to(kind)) if half else random_tensor
    x, weight = draw((n, c, h, w), dtype), draw((k, c // groups, r, s), dtype if half else torch.int8)
    weight = masked_blocks(weight, 64, 16 // dtype.itemsize, groups, density)
    acc = F.conv2d(x.double(), weight.double(), None, *geometry)
    res = None if residual is None else draw(acc.shape, residual)
    if half:
        constants, lo = (
            torch.stack([2.0 ** torch.randint(-2, 2, (k,)), torch.randn(k).round(), torch.full((k,), 30.0)]),
            -20.0,
        )
        expected = reference.epilogue(acc, constants, res, 0.5, lo, out_dtype)
    else:
        constants, lo = random_constants(k, max(1, int(r * s * c // groups * density)), out_dtype)
        expected = reference.conv2d_int8(x, weight, constants, res, 0.5, lo, *geometry, out_dtype)
    case = emulated.Case(x, pack_gathered(weight, groups), constants, res, tuple(acc.shape), out_dtype, packed=True)
    planned = _cuda.plan_conv2d_blocks_f16 if half else _cuda.plan_conv2d_blocks_int8
    plan = planned(
        *device, case.x, emulated.DTYPE_CODE[dtype], n, h, w, c, case.weight, k, r, s,
        *stride, *padding, *dilation, groups, *case.epilogue(0.5, lo),
    )  # fmt: skip
    if kernel:
        assert f"_{kernel}_" in plan["kernel"], plan["kernel"]
    result = emulated.run_planned(plan, arch, case.memory, ptx)
    assert_same(case.output(), expected, what | {"plan": plan["kernel"]})
    return result


CONVS = {
    "pointwise": dict(n=2, c=64, h=6, w=7, k=64, r=1, s=1),
    "3x3": dict(n=2, c=32, h=6, w=7, k=24, r=3, s=3, padding=(1, 1)),
    "dense": dict(n=1, c=80, h=4, w=5, k=65, r=3, s=3, padding=(1, 1), density=1.0),
    "few blocks": dict(n=1, c=256, h=5, w=5, k=200, r=3, s=3, padding=(1, 1), density=0.02),
    "uneven strides": dict(n=2, c=16, h=9, w=8, k=9, r=3, s=2, stride=(3, 2), padding=(0, 1)),
    "dilation": dict(n=1, c=32, h=8, w=9, k=8, r=3, s=3, padding=(2, 4), dilation=(2, 3)),
    "groups": dict(n=1, c=64, h=5, w=5, k=140, r=3, s=3, padding=(1, 1), groups=2),
    "large kernel": dict(n=1, c=16, h=15, w=15, k=8, r=15, s=15, padding=(7, 7)),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CONVS)
def test_conv(name, arch):
    check_conv(arch, **CONVS[name], kernel="64_16_3")
    check_conv(arch, **CONVS[name], dtype=torch.int8, device=LARGE, kernel="128_32_3")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [name for name in CONVS if name != "large kernel"])
def test_conv_of_halves(name, arch):
    check_conv(arch, **CONVS[name], dtype=torch.float16, out_dtype=torch.float16, kernel="64_16_3")
    check_conv(
        arch, **CONVS[name], dtype=torch.bfloat16, out_dtype=torch.float32, device=LARGE_IN_LESS, kernel="128_32_2"
    )


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("k", [72, 69])  # whole vectors of 8 channels, and not
def test_outputs_and_residuals(out_dtype, residual, k):
    check_conv("80", 1, 32, 5, 13, k, 1, 1, dtype=torch.int8, out_dtype=out_dtype, residual=residual, density=0.7)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_conv_random(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups, r, s, dilation = draw(1, 2), draw(1, 4), draw(1, 4), (draw(1, 2), draw(1, 2))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.int8, torch.float16]))
    check_conv(
        "80", draw(1, 2), groups * data.draw(st.sampled_from([16, 48, 64])),
        draw(dilation[0] * (r - 1) + 1, 9), draw(dilation[1] * (s - 1) + 1, 9), groups * draw(1, 70), r, s,
        (draw(1, 3), draw(1, 3)), (draw(0, 2), draw(0, 2)), dilation, groups, data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        dtype, torch.float16 if dtype == torch.float16 else data.draw(st.sampled_from(OUT_DTYPES)),
        device=data.draw(st.sampled_from([LARGE, LARGE_IN_LESS, SMALL])),
    )  # fmt: skip


def test_layer_of_zeros_and_zero_slices():
    check_conv("80", 1, 16, 4, 4, 64, 3, 3, density=0.0)
    check_conv("80", 1, 16, 4, 4, 200, 1, 1, density=0.5)


@pytest.mark.parametrize("device", [LARGE, LARGE_IN_LESS, SMALL])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_shared_memory_has_no_bank_conflicts(device, dtype):
    out = torch.float16 if dtype == torch.float16 else torch.uint8
    sizes = dict(n=4, c=64, h=8, w=8, k=64, r=3, s=3, padding=(1, 1), dtype=dtype, out_dtype=out)
    result = check_conv("80", **sizes, device=device)
    assert result.wavefronts == result.ideal_wavefronts > 0


def test_what_is_zero_is_not_multiplied():
    """36 blocks kept at random of 72 take no more steps than they fill, and the whole as many as all of them."""
    whole, half = (
        check_conv("80", n=1, c=128, h=8, w=8, k=64, r=3, s=3, padding=(1, 1), density=density)
        for density in (1.0, 0.5)
    )
    assert whole.summary()["tensor_ops"] == 2 * 64 * 64 * 128 * 9
    assert half.summary()["tensor_ops"] < 0.7 * whole.summary()["tensor_ops"]


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_kernel_is_caught(name):
    check_that_broken_is_caught(name, "conv2d_blocks_int8", check_conv, density=0.7)


@pytest.mark.parametrize(
    "change, match",
    [(dict(c=24), "no multiple of 16 bytes"), (dict(r=16), "more than 15 rows"), (dict(n=2**20, h=64), "2\\^31 bytes"),
     (dict(x=8), "aligned")],
)  # fmt: skip
def test_what_the_kernels_cannot_run_is_refused(change, match):
    a = dict(x=0, signed=False, n=1, h=20, w=20, c=32, weight=0, k=8, r=3, s=3) | change
    with pytest.raises(ValueError, match=match):
        _cuda.plan_conv2d_blocks_int8(*SMALL, *a.values(), 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0.0, 0.0, 0, 0)
