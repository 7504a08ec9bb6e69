"""2:4 kernels without a GPU: the extension module plans, the emulator runs nvcc's PTX, the reference decides."""

from __future__ import annotations

import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncomp.ops import reference
from cnncomp.sparsity import pack_2to4
from tests import cuda_emulated as emulated
from tests.ptx import MemoryFault, RaceError, UninitialisedMemory
from tests.test_cuda_kernels import INT_RANGE, OUT_DTYPES, RESIDUALS, assert_same, random_constants, random_tensor
from tests.test_packers import masked_2to4

_cuda = pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")

ARCHS = ("80", "86", "89", "90a", "120a") if os.environ.get("CNNCOMP_GPU_FULL") else ("80",)
#: Multiprocessors and bytes of shared memory that make the plan take these tiles, if there are pixels enough.
MUCH, LITTLE = 160 << 10, 100 << 10
SMALL, NARROW, WIDE = (10**6, MUCH), (5, MUCH), (1, MUCH)


def check_conv(
    arch, n, c, h, w, k, r, s, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, dtype=torch.uint8,
    out_dtype=torch.int8, residual=None, device=SMALL, kernel=None, ptx=None,
):  # fmt: skip
    """One convolution against the reference; gives back what the emulator counted."""
    what = {name: value for name, value in locals().items() if name != "ptx"}
    torch.manual_seed(n + c + h + k)
    x = random_tensor((n, c, h, w), dtype)
    weight = masked_2to4(torch.randint(-127, 128, (k, c // groups, r, s), dtype=torch.int8))
    constants, lo = random_constants(k, r * s * c // groups // 2, out_dtype)
    geometry = (stride, padding, dilation, groups)
    shape = tuple(torch.nn.functional.conv2d(x.float(), weight.float(), None, *geometry).shape)
    res = None if residual is None else random_tensor(shape, residual)
    expected = reference.conv2d_int8(x, weight, constants, res, 0.37, lo, *geometry, out_dtype)
    case = emulated.Case(x, pack_2to4(weight, groups), constants, res, shape, out_dtype, packed=True)
    plan = _cuda.plan_conv2d_sparse24_int8(
        *device, case.x, dtype == torch.int8, n, h, w, c, case.weight, k, r, s,
        *stride, *padding, *dilation, groups, *case.epilogue(0.37, lo),
    )  # fmt: skip
    if kernel:
        assert plan["kernel"].startswith(f"conv2d_sparse24_int8_{kernel}"), plan["kernel"]
    result = emulated.run_planned(plan, arch, case.memory, ptx)
    assert_same(case.output(), expected, what | {"plan": plan["kernel"]})
    return result


CONVS = {
    "pointwise": dict(n=2, c=64, h=6, w=7, k=64, r=1, s=1),
    "3x3": dict(n=2, c=32, h=6, w=7, k=24, r=3, s=3, padding=(1, 1)),
    "16 channels": dict(n=1, c=16, h=9, w=9, k=16, r=5, s=5, padding=(2, 2), stride=(2, 2)),
    "channels across steps": dict(n=1, c=80, h=4, w=5, k=65, r=3, s=3, padding=(1, 1)),
    "a step": dict(n=1, c=128, h=8, w=8, k=64, r=1, s=1),
    "a step and a chunk": dict(n=1, c=144, h=8, w=8, k=63, r=1, s=1),
    "uneven strides": dict(n=2, c=16, h=9, w=8, k=9, r=3, s=2, stride=(3, 2), padding=(0, 1)),
    "dilation": dict(n=1, c=32, h=8, w=9, k=8, r=3, s=3, padding=(2, 4), dilation=(2, 3)),
    "padding alone": dict(n=1, c=16, h=1, w=1, k=4, r=3, s=3, padding=(1, 1)),
    "long reduction": dict(n=1, c=144, h=6, w=7, k=70, r=3, s=3, padding=(1, 1)),
    "groups": dict(n=1, c=32, h=5, w=5, k=12, r=3, s=3, padding=(1, 1), groups=2),
    "large kernel": dict(n=1, c=16, h=15, w=15, k=8, r=15, s=15, padding=(7, 7)),
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CONVS)
def test_conv(name, arch):
    check_conv(arch, **CONVS[name], kernel="64x64_32_2" if name == "long reduction" else "64x64")
    check_conv(arch, **CONVS[name], dtype=torch.int8)


LARGE = {
    "128x64_32_1_3": NARROW,
    "128x128_64_1_3": WIDE,
    "128x64_32_1_2": (5, LITTLE),
    "128x128_32_1_3": (1, LITTLE),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", LARGE)
@pytest.mark.parametrize("k", [128, 136, 200])
def test_conv_with_large_tiles(arch, kernel, k):
    w = 11 if k > 128 else 23
    check_conv(arch, 1, 48, 12, w, k, 3, 3, padding=(1, 1), device=LARGE[kernel], kernel=kernel)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("k", [72, 69])  # whole vectors of 8 channels, and not
def test_outputs_and_residuals(out_dtype, residual, k):
    check_conv("80", 1, 32, 5, 13, k, 1, 1, dtype=torch.int8, out_dtype=out_dtype, residual=residual)


@pytest.mark.parametrize("m, c, k", [(1, 16, 1), (64, 128, 64), (63, 112, 65), (65, 272, 127)])
def test_linear_at_tile_edges(m, c, k):
    x, weight = random_tensor((m, c), torch.int8), masked_2to4(torch.randint(-127, 128, (k, c), dtype=torch.int8))
    constants, lo = random_constants(k, c // 2, torch.uint8)
    res = random_tensor((m, k), torch.float32)
    case = emulated.Case(x, pack_2to4(weight[..., None, None]), constants, res, (m, k), torch.uint8, packed=True)
    plan = _cuda.plan_linear_sparse24_int8(*SMALL, case.x, True, m, c, case.weight, k, *case.epilogue(-0.61, lo))
    emulated.run_planned(plan, "80", case.memory)
    assert_same(case.output(), reference.linear_int8(x, weight, constants, res, -0.61, lo, torch.uint8), (m, c, k))


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_conv_random(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups, r, s, dilation = draw(1, 2), draw(1, 4), draw(1, 4), (draw(1, 2), draw(1, 2))
    check_conv(
        data.draw(st.sampled_from(ARCHS)), draw(1, 2), groups * data.draw(st.sampled_from([16, 48, 64])),
        draw(dilation[0] * (r - 1) + 1, 9), draw(dilation[1] * (s - 1) + 1, 9), groups * draw(1, 70), r, s,
        (draw(1, 3), draw(1, 3)), (draw(0, 2), draw(0, 2)), dilation, groups,
        data.draw(st.sampled_from(list(INT_RANGE))), data.draw(st.sampled_from(OUT_DTYPES)),
        data.draw(st.sampled_from(RESIDUALS)), data.draw(st.sampled_from([SMALL, NARROW])),
    )  # fmt: skip


def test_layer_of_zeros():
    x = random_tensor((2, 16, 3, 3), torch.uint8)
    constants, lo = random_constants(8, 16, torch.float32)
    case = emulated.Case(x, pack_2to4(torch.zeros(8, 16, 3, 3, dtype=torch.int8)), constants, None, (2, 8, 1, 1),
                         torch.float32, packed=True)  # fmt: skip
    plan = _cuda.plan_conv2d_sparse24_int8(
        *SMALL, case.x, False, 2, 3, 3, 16, case.weight, 8, 3, 3, 1, 1, 0, 0, 1, 1, 1, *case.epilogue(0.0, lo)
    )
    emulated.run_planned(plan, "80", case.memory)
    assert_same(case.output(), constants[1].expand(2, 8)[..., None, None].clamp(min=lo).minimum(
        constants[2][:, None, None]), "the bias")  # fmt: skip


@pytest.mark.parametrize("device, c, k", [(SMALL, 64, 64), (SMALL, 128, 64), *((d, 64, 128) for d in LARGE.values())])
def test_shared_memory_has_no_bank_conflicts(device, c, k):
    result = check_conv("80", n=4, c=c, h=8, w=8, k=k, r=3, s=3, padding=(1, 1), device=device)
    assert result.wavefronts == result.ideal_wavefronts > 0


MUTANTS = {
    "barrier removed": ((RaceError, UninitialisedMemory), r"bar\.sync[^;]*;", ""),
    "wait too weak": (RaceError, r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;"),
    "copy of what is outside": (
        MemoryFault,
        r"(cp\.async\.cg\.shared\.global \[[^]]+\], \[[^]]+\], 16), %\w+;",
        r"\1, 16;",
    ),
}


def check_that_broken_is_caught(name, kernel, check, **more):
    """``check`` passes on a convolution of the kernel, and fails with its text changed by a mutant."""
    error, pattern, replacement = MUTANTS[name]
    ptx, count = re.subn(pattern, replacement, emulated.ptx_of(kernel, "80"))
    assert count > 0
    sizes = dict(n=1, c=64, h=5, w=5, k=16, r=3, s=3, padding=(1, 1), **more)
    check("80", **sizes)
    with pytest.raises(error):
        check("80", **sizes, ptx=ptx)


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_kernel_is_caught(name):
    check_that_broken_is_caught(name, "conv2d_sparse24_int8", check_conv)


@pytest.mark.parametrize(
    "change, match",
    [(dict(c=24), "no multiple of 16 bytes"), (dict(r=16), "more than 15 rows"), (dict(n=2**20, h=64), "2\\^31 bytes"),
     (dict(x=8), "aligned")],
)  # fmt: skip
def test_what_the_kernels_cannot_run_is_refused(change, match):
    a = dict(x=0, signed=False, n=1, h=20, w=20, c=32, weight=0, k=8, r=3, s=3) | change
    with pytest.raises(ValueError, match=match):
        _cuda.plan_conv2d_sparse24_int8(*SMALL, *a.values(), 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0.0, 0.0, 0, 0)
