"""2:4 kernels of float16 and bfloat16 without a GPU: exact where all sums are, else within the bound of float32 sums."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncomp.sparsity import pack_2to4
from tests import cuda_emulated as emulated
from tests.test_cuda_kernels import assert_same
from tests.test_cuda_sparse24 import ARCHS, CONVS, LARGE, SMALL
from tests.test_packers import masked_2to4

_cuda = pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
HALF_ULP = {F16: 2.0**-11, BF16: 2.0**-8, F32: 2.0**-24}


def check_conv(
    arch, n, c, h, w, k, r, s, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, dtype=F16, out_dtype=F16,
    residual=None, device=SMALL, kernel=None, exact=True,
):  # fmt: skip
    """One convolution against float64. ``exact``: of small integers, whose sums and outputs are; compared bit by bit."""
    what = dict(locals())
    torch.manual_seed(n + c + h + k)
    draw = (lambda shape: torch.randint(-2, 3, shape).float()) if exact else torch.randn
    x, weight = draw((n, c, h, w)).to(dtype), masked_2to4(draw((k, c // groups, r, s)).to(dtype))
    geometry = (stride, padding, dilation, groups)
    product, size = (
        F.conv2d(a.double(), b.double(), None, *geometry) for a, b in ((x, weight), (x.abs(), weight.abs()))
    )
    res = None if residual is None else draw(product.shape).to(residual)
    scale = 2.0 ** torch.randint(-2, 2, (k,)) if exact else torch.rand(k) + 0.5
    constants = torch.stack([scale, draw((k,)) * 4, torch.full((k,), 30.0)])
    scale, bias, hi = (row.double()[:, None, None] for row in constants)
    expected = product * scale + bias + (0 if res is None else res.double() * 0.5)
    expected = torch.minimum(expected.clamp(min=-20.0), hi)
    case = emulated.Case(x, pack_2to4(weight, groups), constants, res, tuple(product.shape), out_dtype, packed=True)
    plan = _cuda.plan_conv2d_sparse24_f16(
        *device, case.x, emulated.DTYPE_CODE[dtype], n, h, w, c, case.weight, k, r, s,
        *stride, *padding, *dilation, groups, *case.epilogue(0.5, -20.0),
    )  # fmt: skip
    if kernel:
        assert plan["kernel"].startswith(f"conv2d_sparse24_f16_{kernel}"), plan["kernel"]
    result = emulated.run_planned(plan, arch, case.memory)
    if exact:
        assert_same(case.output(), expected.to(out_dtype), what | {"plan": plan["kernel"]})
    else:
        # Sums of float32 in any order, cut off or rounded: Higham, "Accuracy and Stability of Numerical Algorithms", (3.5).
        terms = r * s * c // groups // 2 + 3
        bound = terms * 2.0**-23 * (size * scale + bias.abs() + 4) + HALF_ULP[out_dtype] * expected.abs()
        worst = ((case.output().double() - expected).abs() / bound).max()
        assert worst <= 1, (what, float(worst))
    return result


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [name for name in CONVS if name != "large kernel"])
def test_conv(name, arch):
    check_conv(arch, **CONVS[name], kernel="64x64")
    check_conv(arch, **CONVS[name], dtype=BF16, out_dtype=F32)


@pytest.mark.parametrize("kernel", LARGE)
@pytest.mark.parametrize("k", [128, 200])
def test_conv_with_large_tiles(kernel, k):
    check_conv("80", 1, 24, 12, 11 if k > 128 else 23, k, 3, 3, padding=(1, 1), device=LARGE[kernel], kernel=kernel)


@pytest.mark.parametrize(
    "dtype, residual, out_dtype", [(F16, F16, F16), (F16, F32, F32), (BF16, BF16, BF16), (BF16, F32, BF16)]
)
@pytest.mark.parametrize("k", [72, 69])  # whole vectors of 8 channels, and not
def test_outputs_and_residuals(dtype, residual, out_dtype, k):
    check_conv("80", 1, 16, 5, 13, k, 1, 1, dtype=dtype, out_dtype=out_dtype, residual=residual)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("out_dtype", [F32, None])
def test_sums_within_their_bound(dtype, out_dtype):
    check_conv("80", 1, 128, 6, 7, 64, 3, 3, padding=(1, 1), dtype=dtype, out_dtype=out_dtype or dtype, exact=False)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_conv_random(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups, r, s, dtype = draw(1, 2), draw(1, 4), draw(1, 4), data.draw(st.sampled_from([F16, BF16]))
    check_conv(
        "80", draw(1, 2), groups * data.draw(st.sampled_from([8, 40, 72])), draw(r, 9), draw(s, 9), groups * draw(1, 70), r, s,
        (draw(1, 3), draw(1, 3)), (draw(0, 2), draw(0, 2)), (1, 1), groups, dtype,
        data.draw(st.sampled_from([F32, dtype])), data.draw(st.sampled_from([None, F32, dtype])),
    )  # fmt: skip


@pytest.mark.parametrize("kernel", [None, *LARGE])
def test_shared_memory_has_no_bank_conflicts(kernel):
    device = LARGE[kernel] if kernel else SMALL
    result = check_conv("80", n=4, c=32, h=8, w=8, k=128, r=3, s=3, padding=(1, 1), device=device)
    assert result.wavefronts == result.ideal_wavefronts > 0


@pytest.mark.parametrize("code, out, residual", [(0, 3, 0), (2, 2, 0), (3, 4, 0), (4, 1, 0), (3, 3, 4)])
def test_types_that_do_not_belong_together_are_refused(code, out, residual):
    with pytest.raises(ValueError, match="neither of its type nor float32"):
        _cuda.plan_conv2d_sparse24_f16(
            *SMALL,
            0,
            code,
            1,
            4,
            4,
            16,
            0,
            8,
            1,
            1,
            1,
            1,
            0,
            0,
            1,
            1,
            1,
            0,
            16 if residual else 0,
            residual,
            0.0,
            0.0,
            0,
            out,
        )
