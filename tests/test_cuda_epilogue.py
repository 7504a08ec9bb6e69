"""The CUDA kernels' epilogue beyond bytes: float16 and bfloat16 outputs and residuals, SiLU and hardswish, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cnncomp.errors import ArgumentError
from cnncomp.ops import cuda, reference
from cnncomp.ops.cuda_sparse import GATHERED
from cnncomp.ops.packing import pack_int8
from tests import cuda_emulated as emulated
from tests.cuda_device import emulated_device
from tests.test_cuda_kernels import ARCHS, CONVS, OUT_DTYPES, RESIDUALS, assert_same, check_conv, check_linear

_cuda = pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")

HALVES = [torch.float16, torch.bfloat16]
ACTIVATIONS = ["silu", "hardswish"]
#: One of each kernel, whose vectors of channels are whole in some and not in others.
KERNELS = {
    "gemm": dict(n=2, c=32, h=3, w=7, k=24, r=1, s=1, kernel="gemm_int8_"),
    "3x3": CONVS["3x3"],
    "odd channels": CONVS["odd channels"],
    "stem": dict(n=1, c=3, h=8, w=8, k=20, r=3, s=3, padding=(1, 1), kernel="conv2d_runs_int8_"),
    "depthwise": CONVS["depthwise"],
    "odd depthwise": CONVS["odd depthwise"],
    "depthwise3x3": dict(n=1, c=8, h=6, w=7, k=8, r=3, s=3, padding=(1, 1), groups=8, kernel="depthwise3x3_int8_"),
}


@pytest.mark.parametrize("out_dtype", OUT_DTYPES + HALVES)
@pytest.mark.parametrize("residual", RESIDUALS + HALVES)
def test_types(out_dtype, residual):
    for k in (24, 21):  # whole vectors of 8 channels, and not
        check_linear("80", 19, 32, k, torch.int8, out_dtype, residual)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES + HALVES)
def test_activations(activation, out_dtype):
    for k, residual in ((24, None), (21, torch.uint8), (16, torch.bfloat16)):
        check_linear("80", 19, 32, k, torch.uint8, out_dtype, residual, activation=activation)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel(name):
    check_conv("80", **KERNELS[name], out_dtype=torch.float16, residual=torch.float16, activation="silu")
    check_conv("80", **KERNELS[name], out_dtype=torch.bfloat16, residual=torch.float32)
    check_conv("80", **KERNELS[name], out_dtype=torch.uint8, residual=torch.int8, activation="hardswish")


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture(arch):
    """Turing's clamp is another, and a warpgroup's sums lie elsewhere."""
    check_conv(arch, **CONVS["3x3"], out_dtype=torch.bfloat16, residual=torch.float16, activation="silu", tile="64x64")
    check_linear(arch, 3, 464, 40, torch.int8, torch.uint8, None, "128x64", 3, activation="silu")


def special_values() -> torch.Tensor:
    """(64, 16): where SiLU and hardswish bend, where their steps leave the range of numbers, and what is none."""
    ends = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, float("inf"), -float("inf"), float("nan"), 3.0, -3.0])
    torch.manual_seed(0)
    return torch.cat([ends, torch.linspace(-100, 100, 501), torch.randn(512) * 3]).reshape(64, 16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(activation):
    """All from a float residual; the sums are zeros."""
    t = special_values()
    x, weight = torch.zeros(64, 16, dtype=torch.uint8), torch.zeros(16, 16, dtype=torch.int8)
    constants = torch.tensor([[1.0], [0.0], [float("inf")]]).expand(3, 16).contiguous()
    args = (x, weight, constants, t, 1.0, -float("inf"), torch.float32, activation, 1.0)
    with emulated_device():
        got = cuda.linear_int8(*args)
    expected = reference.linear_int8(*args)
    real = ~expected.isnan()
    assert torch.equal(got.view(torch.int32)[real], expected.view(torch.int32)[real])
    assert got.isnan().equal(expected.isnan()) and got.isnan().sum() == (2 if activation == "hardswish" else 1)
    real = t.isfinite()
    exact = (F.silu if activation == "silu" else F.hardswish)(t[real].double())
    assert ((got[real] - exact).abs() / exact.abs().clamp(min=1)).max() < 2e-7


@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
@pytest.mark.parametrize("out_dtype", [torch.uint8, *HALVES])
def test_operators_give_the_same_on_both_devices(activation, out_dtype):
    """The public operators: on a CPU as kernels and steps behind them, on a GPU in the kernel."""
    torch.manual_seed(1)
    x, weight = (
        torch.randint(0, 256, (2, 16, 5, 6), dtype=torch.uint8),
        torch.randint(-127, 128, (24, 16, 3, 3), dtype=torch.int8),
    )
    constants = torch.stack([torch.rand(24) * 1e-4, torch.randn(24) * 2, torch.rand(24) * 200 + 55])
    geometry, out_factor = ((2, 1), (1, 0), (1, 1), 1), 20.0 if activation else 1.0
    residual = torch.randn(2, 24, 3, 4).to(torch.float16)
    tail = (residual, 0.5, 0.0)
    expected = reference.conv2d_int8(x, weight, constants, *tail, *geometry, out_dtype, activation, out_factor)
    rest = ((3, 3), *geometry, out_dtype, activation, out_factor)
    assert_same(torch.ops.cnncomp.conv2d_int8(x, pack_int8(weight), constants, *tail, *rest), expected, "CPU")
    with emulated_device():
        packed = weight.permute(0, 2, 3, 1).contiguous()
        assert_same(
            cuda.conv2d_int8(x, packed, constants, *tail, *geometry, out_dtype, activation, out_factor), expected, "GPU"
        )
    flat, rest = weight[:, :, 0, 0].contiguous(), (out_dtype, activation, out_factor)
    x, residual = x[:, :, 0].transpose(1, 2).contiguous(), residual[:, :, 0, 0, None].expand(2, 24, 6).transpose(1, 2)
    expected = reference.linear_int8(x, flat, constants, residual, 0.5, 0.0, *rest)
    packed = pack_int8(flat[:, :, None, None])
    assert_same(torch.ops.cnncomp.linear_int8(x, packed, constants, residual, 0.5, 0.0, *rest), expected, "CPU")
    fake = torch.ops.cnncomp.linear_int8(*(t.to("meta") for t in (x, packed, constants, residual)), 0.5, 0.0, *rest)
    assert fake.shape == expected.shape and fake.dtype == expected.dtype


def test_bad_arguments_are_refused():
    x, packed = torch.zeros(2, 16, dtype=torch.uint8), pack_int8(torch.zeros(8, 16, 1, 1, dtype=torch.int8))
    rest = (x, packed, torch.zeros(3, 8), None, 0.0, 0.0)
    with pytest.raises(ArgumentError, match="activation: got 'gelu'"):
        torch.ops.cnncomp.linear_int8(*rest, torch.uint8, "gelu", 1.0)
    for factor in (0.0, float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="out_factor"):
            torch.ops.cnncomp.linear_int8(*rest, torch.uint8, "silu", factor)
    with pytest.raises(ArgumentError, match="out_dtype"):
        torch.ops.cnncomp.linear_int8(*rest, torch.float64)


@pytest.mark.parametrize("name", [name for name in dir(_cuda) if name.startswith("plan_conv2d_")])
def test_inputs_that_a_kernel_does_not_take(name):
    """They would be read as bytes, or bytes as halves."""
    device = (108,) if name == "plan_conv2d_int8" else (108, 164 << 10)
    rest = (0, 0, "", 0, 0, 1.0) if name == "plan_conv2d_int8" else (False,) if name.split("_")[2] in GATHERED else ()

    def plan(x, residual, out):
        sizes = (2, 3, 3, 64, 128, 64, 1, 1, 1, 1, 0, 0, 1, 1, 1)
        return getattr(_cuda, name)(*device, 128, x, *sizes, 128, 128, residual, 1.0, 0.0, 128, out, *rest)

    half = name.endswith("_f16")
    for x in (0, 1, 2) if half else (2, 3, 4):
        with pytest.raises(ValueError, match="float16 or bfloat16" if half else f"x: got dtype code {x}, expected"):
            plan(x, 2, 2)
    if not half and name != "plan_conv2d_int8":
        for residual, out, wrong in ((2, 3, "out"), (4, 2, "residual")):
            with pytest.raises(ValueError, match=f"{wrong}: got dtype code .*no half"):
                plan(0, residual, out)
    for code in (-1, 5):
        with pytest.raises(ValueError, match="expected 0 to 4"):
            plan(3 if half else 0, 2, code)
    assert plan(3 if half else 1, 2, 2)["kernel"]


def test_no_other_linear_inputs_or_activations():
    rest = (4, 16, 0, 8, 0, 0, 0, 0.0, 0.0, 0, 0, 0, 0, "", 0)
    with pytest.raises(ValueError, match="x: got dtype code 3"):
        _cuda.plan_linear_int8(1, 0, 3, *rest, 0, 1.0)
    with pytest.raises(ValueError, match="activation: got 3"):
        _cuda.plan_linear_int8(1, 0, 0, *rest, 3, 1.0)
    with pytest.raises(ValueError, match="elements of 4 bytes"):
        _cuda.plan_to_units(0, 2, 8, 2, 2, 16, 0)
