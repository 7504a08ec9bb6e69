"""Every operator: registration (opcheck), agreement with its reference, typed errors, no silent gradient."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import cnncomp
from cnncomp.dispatch.candidates import options_for
from cnncomp.errors import ArgumentError, DeviceError, DtypeError, InferenceOnlyError, OverflowRiskError
from cnncomp.nn import (
    LINEAR,
    Clamp,
    DenseConv2d,
    DenseLinear,
    Geometry,
    QuantConv2d,
    QuantLinear,
    QuantSpec,
    SparseConv2d,
    SparseLinear,
)
from cnncomp.ops import conv2d_int8, cuda, max_pool2d_int8, packing, quantize, reference
from tests.helpers import make_quant_conv, random_8bit, reference_conv

OPS = torch.ops.cnncomp
DTYPES = (torch.uint8, torch.int8)


def _conv_args(
    dtype: torch.dtype, groups: int = 1, residual: torch.dtype | None = None, out: torch.dtype = torch.uint8
):
    g = Geometry(8 * groups, 12 * groups, (3, 3), (2, 1), (1, 1), (1, 1), groups)
    spec = None if out == torch.float32 else QuantSpec(0.05, out)
    layer = make_quant_conv(g, dtype, spec, Clamp(0.0))
    x = random_8bit((2, g.in_channels, 9, 7), dtype).contiguous(memory_format=torch.channels_last)
    shape = (2, g.out_channels, 5, 7)
    res = None
    if residual is not None:
        res = torch.randn(shape) if residual == torch.float32 else random_8bit(shape, residual)
    return (
        x, layer.weight, layer.constants, res, layer.residual_scale, layer.lo,
        g.kernel_size, g.stride, g.padding, g.dilation, g.groups, out,
    )  # fmt: skip


def _sparse_args(groups: int = 1):
    weight = torch.randn(6 * groups, 5, 3, 3) * (torch.rand(6 * groups, 5, 3, 3) > 0.8)
    packed = packing.pack_sparse(weight, groups, block=2)
    bias = torch.randn(6 * groups)
    x = torch.randn(2, 5 * groups, 8, 9)
    return (x, *packed, bias, None, 0.0, 6.0, 6 * groups, (3, 3), (1, 2), (1, 0), (1, 1), groups)


def _depthwise_args(residual: bool):
    x, weight = torch.randn(2, 5, 8, 9), torch.randn(5, 1, 3, 5)
    z = torch.randn(2, 5, 4, 9) if residual else None
    return (x, weight, torch.randn(5), z, 0.0, 6.0, (2, 1), (1, 2), (1, 1))


def _linear_sparse_args():
    packed = packing.pack_sparse((torch.randn(7, 33) * (torch.rand(7, 33) > 0.7)).reshape(7, 33, 1, 1))
    return (torch.randn(3, 33), *packed, None, torch.randn(3, 7), -1.0, 1.0, 7)


def _linear_args():
    weight, scale = torch.randint(-127, 128, (9, 20), dtype=torch.int8), torch.rand(9) * 0.01 + 1e-3
    layer = QuantLinear(weight, scale, torch.randn(9), QuantSpec(0.1, torch.int8))
    return (random_8bit((4, 20), torch.int8), layer.weight, layer.constants, None, 1.0, layer.lo, torch.float32)


CASES = {
    "quantize-4d": ("quantize", lambda: (torch.randn(2, 5, 4, 3), 12.5, torch.int8)),
    "quantize-2d": ("quantize", lambda: (torch.randn(7, 5), 12.5, torch.uint8)),
    "conv-u8": ("conv2d_int8", lambda: _conv_args(torch.uint8)),
    "conv-s8-groups-residual": ("conv2d_int8", lambda: _conv_args(torch.int8, 2, torch.uint8, torch.int8)),
    "conv-f32": ("conv2d_int8", lambda: _conv_args(torch.uint8, 1, torch.float32, torch.float32)),
    "linear-int8": ("linear_int8", _linear_args),
    "conv-sparse": ("conv2d_sparse", _sparse_args),
    "conv-sparse-groups": ("conv2d_sparse", lambda: _sparse_args(3)),
    "conv-depthwise": ("conv2d_depthwise", lambda: _depthwise_args(False)),
    "conv-depthwise-residual": ("conv2d_depthwise", lambda: _depthwise_args(True)),
    "linear-sparse": ("linear_sparse", _linear_sparse_args),
    "activate": ("activate", lambda: (torch.randn(2, 5, 4, 3), "silu")),
    "activate-channels-last": ("activate", lambda: (torch.randn(2, 4, 3, 5).permute(0, 3, 1, 2), "hardswish")),
    "affine-channels": (
        "affine_channels",
        lambda: (torch.randn(2, 5, 4, 3), torch.randn(5), torch.randn(5), 0.0, 6.0),
    ),
    "concat-channels": ("concat_channels", lambda: ([torch.randn(2, 5, 4, 3), torch.randn(2, 1, 4, 3)],)),
    "concat-channels-last": (
        "concat_channels",
        lambda: ([torch.randn(2, 4, 3, c).permute(0, 3, 1, 2) for c in (5, 3)],),
    ),
    "max-pool-ceil": ("max_pool2d", lambda: (torch.randn(2, 3, 8, 9), (3, 3), (2, 2), (0, 0), (1, 1), True)),
    "scale-channels": ("scale_channels", lambda: (torch.randn(2, 5, 4, 3), torch.randn(2, 5, 1, 1))),
    "max-pool": ("max_pool2d_int8", lambda: (random_8bit((2, 6, 9, 8), torch.uint8), (3, 3), (2, 2), (1, 1), (1, 1))),
    "max-pool-8bit-ceil": (
        "max_pool2d_int8",
        lambda: (random_8bit((2, 6, 9, 8), torch.int8), (3, 3), (2, 2), (0, 0), (1, 1), True),
    ),
    "concat-8bit": (
        "concat_channels",
        lambda: ([random_8bit((2, 4, 3, c), torch.uint8).permute(0, 3, 1, 2) for c in (5, 3)],),
    ),
    "conv-hardswish": ("conv2d_int8", lambda: (*_conv_args(torch.uint8), "hardswish", 2.5)),
    "linear-silu": ("linear_int8", lambda: (*_linear_args(), "silu", 1.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    name, args = CASES[case]
    torch.library.opcheck(getattr(OPS, name).default, args())


#: Operators whose weights may lie anyhow where nothing is computed.
PACKED = [f"conv2d_{f}_{kind}" for f in ("sparse24", "blocks", "vectors", "vnm") for kind in ("int8", "f16")]
PACKED += [f"linear_{f}_int8" for f in ("sparse24", "blocks", "vectors", "vnm")]


def _on_fake_gpu(op: Any, args: tuple[Any, ...]) -> Tensor:
    def fake(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    with FakeTensorMode():
        out: Tensor = op(*tree_map_only(Tensor, fake, args))
    return out


@pytest.mark.parametrize("case", CASES)
def test_a_compiler_knows_results_on_a_gpu(case: str) -> None:
    """Without one: torch.compile asks with tensors that have no memory."""
    name, args = CASES[case]
    op, given = getattr(OPS, name).default, args()
    out, expected = _on_fake_gpu(op, given), op(*given)
    assert out.device.type == "cuda" and out.dtype == expected.dtype
    assert out.shape == expected.shape and out.stride() == expected.stride()


@pytest.mark.parametrize("name", PACKED)
def test_a_compiler_knows_results_of_packed_weights_on_a_gpu(name: str) -> None:
    dtype = torch.float16 if name.endswith("f16") else torch.uint8
    weight, constants, rest = torch.empty(100, dtype=torch.int8), torch.empty(3, 24), (None, 1.0, 0.0)
    if name.startswith("linear"):
        args, shape = (torch.empty(5, 16, dtype=dtype), weight, constants, *rest, dtype), (5, 24)
        assert _on_fake_gpu(getattr(OPS, name).default, args).shape == shape
        return
    x = torch.empty(8, 16, 9, 7, dtype=dtype)
    args = (x, weight, constants, *rest, (3, 3), (2, 1), (1, 1), (1, 1), 1, dtype)
    out = _on_fake_gpu(getattr(OPS, name).default, args)
    assert out.device.type == "cuda" and out.dtype == dtype and out.shape == (8, 24, 5, 7)
    assert out.is_contiguous(memory_format=torch.channels_last)
    if name in ("conv2d_vectors_int8", "conv2d_vectors_f16", "conv2d_vnm_int8", "conv2d_vnm_f16"):
        in_units = _on_fake_gpu(getattr(OPS, name).default, (*args, True))
        assert in_units.device.type == "cuda" and in_units.numel() == out.numel()


@given(
    n=st.integers(0, 3),
    c=st.integers(1, 40),
    k=st.integers(1, 40),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 1, 2, 3, "depthwise"]),
    dtype=st.sampled_from(DTYPES),
    out=st.sampled_from([torch.uint8, torch.int8, torch.float32]),
    residual=st.sampled_from([None, torch.uint8, torch.int8, torch.float32]),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    seed=st.integers(0, 1000),
)
def test_conv2d_int8_is_bit_equal_to_the_reference(
    n, c, k, size, kernel, stride, dilation, groups, dtype, out, residual, layout, seed
) -> None:
    torch.manual_seed(seed)
    if groups == "depthwise":
        groups = k = c
    else:
        c, k = c * groups, k * groups
    padding = tuple(d // 2 for d in kernel)
    extent = [(kernel[i] - 1) * dilation + 1 for i in (0, 1)]
    size = tuple(max(size[i], extent[i] - 2 * padding[i]) for i in (0, 1))
    g = Geometry(c, k, kernel, stride, padding, (dilation, dilation), groups)
    spec = None if out == torch.float32 else QuantSpec(0.03, out)
    layer = make_quant_conv(g, dtype, spec, Clamp(0.0, 6.0), residual_scale=0.07)
    x = random_8bit((n, c, *size), dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = random_8bit((n, c, size[0] + 1, size[1] * 2), dtype)[:, :, 1:, ::2]
    shape = layer(x).shape
    res = None
    if residual is not None:
        res = torch.randn(shape) if residual == torch.float32 else random_8bit(shape, residual)
    assert torch.equal(layer(x, res), reference_conv(layer, x, res))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [127, -127])
def test_int8_extremes_do_not_saturate(dtype: torch.dtype, weight: int) -> None:
    """All products at their largest: any 16-bit intermediate sum that saturates would show."""
    g = Geometry(64, 17, (3, 3), (1, 1), (1, 1))
    q = torch.full((17, 64, 3, 3), weight, dtype=torch.int8)
    layer = QuantConv2d(g, q, torch.ones(17), None, QuantSpec(1.0, dtype))
    for value in (torch.iinfo(dtype).min, torch.iinfo(dtype).max):
        x = torch.full((1, 64, 5, 6), value, dtype=dtype)
        assert torch.equal(layer(x), reference_conv(layer, x))


@given(
    shape=st.sampled_from([(0, 3, 4, 4), (1, 1, 1, 1), (2, 3, 5, 7), (1, 33, 17, 16), (5,), (3, 19)]),
    dtype=st.sampled_from(DTYPES),
    inv_scale=st.floats(2.0**-10, 2.0**10, width=32),
    channels_last=st.booleans(),
)
def test_quantize_is_bit_equal_to_the_reference(shape, dtype, inv_scale, channels_last) -> None:
    x = torch.randn(shape) * 200 / inv_scale
    if x.numel() > 4:
        x.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.5 / inv_scale])
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    out = OPS.quantize(x, inv_scale, dtype)
    assert torch.equal(out, reference.quantize(x, inv_scale, dtype))
    if x.dim() == 4:
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_quantize_rounds_half_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, 254.5, 255.5])
    assert OPS.quantize(x, 1.0, torch.uint8).tolist() == [0, 2, 2, 4, 0, 0, 254, 255]
    assert OPS.quantize(x, 1.0, torch.int8).tolist() == [0, 2, 2, 4, 0, -2, 127, 127]


@given(
    c=st.integers(1, 40), size=st.tuples(st.integers(3, 11), st.integers(3, 11)), kernel=st.integers(1, 3),
    stride=st.integers(1, 3), dtype=st.sampled_from(DTYPES), ceil_mode=st.booleans(),
)  # fmt: skip
def test_max_pool2d_int8(c, size, kernel, stride, dtype, ceil_mode) -> None:
    x = random_8bit((2, c, *size), dtype)
    args = ((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), (1, 1), ceil_mode)
    assert torch.equal(OPS.max_pool2d_int8(x, *args), reference.max_pool2d_int8(x, *args))


@given(
    c=st.integers(1, 70), k=st.integers(1, 40), size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    kernel=st.integers(1, 3), stride=st.integers(1, 3), dilation=st.integers(1, 2), groups=st.integers(1, 3),
    zeros=st.sampled_from([0.0, 0.5, 0.9, 1.0]), residual=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_conv2d_sparse_is_close_to_torch(c, k, size, kernel, stride, dilation, groups, zeros, residual, seed) -> None:
    """Within 1e-5 of the sum of absolute products, the scale on which float rounding acts."""
    torch.manual_seed(seed)
    padding = (kernel - 1) * dilation // 2
    g = Geometry(c * groups, k * groups, (kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)
    weight = torch.randn(g.out_channels, c, kernel, kernel) * (torch.rand(g.out_channels, c, kernel, kernel) >= zeros)
    size = tuple(max(s, (kernel - 1) * dilation + 1 - 2 * padding) for s in size)
    x, bias = torch.randn(2, g.in_channels, *size), torch.randn(g.out_channels)
    layer = SparseConv2d(g, weight, bias, Clamp(-1.0, 2.0))
    res = torch.randn_like(layer(x)) if residual else None
    where = (g.stride, g.padding, g.dilation, g.groups)
    expected = reference.conv2d_sparse(x, weight, bias, res, -1.0, 2.0, *where)
    scale = reference.conv2d_sparse(x.abs(), weight.abs(), bias.abs(), res, 0.0, float("inf"), *where).abs() + 1
    assert ((layer(x, res) - expected).abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize("m", [0, 1, 3, 8, 50])
def test_linear_layers(m: int) -> None:
    weight = torch.randn(31, 130) * (torch.rand(31, 130) > 0.8)
    x, bias = torch.randn(m, 130), torch.randn(31)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(SparseLinear(weight, bias)(x), expected, rtol=1e-5, atol=1e-4)
    q, scale = cnncomp.nn.quantize_weight(weight)
    layer = QuantLinear(q, scale, bias, QuantSpec(0.03, torch.int8), Clamp(0.0))
    res = torch.randn(m, 31)
    x8 = reference.quantize(x, layer.inv_scale, torch.int8)
    args = (layer.constants, res, layer.residual_scale, layer.lo, torch.float32)
    assert torch.equal(layer(x, res), reference.linear_int8(x8, q, *args))


@pytest.mark.parametrize("groups", [1, 2, 35])
@pytest.mark.parametrize("channels", [(35, 35), (70, 105)])
def test_packing_round_trip(groups: int, channels: tuple[int, int]) -> None:
    c, k = channels
    if c % groups or k % groups:
        pytest.skip("not divisible")
    weight = torch.randint(-127, 128, (k, c // groups, 3, 2), dtype=torch.int8)
    packed = packing.pack_int8(weight, groups)
    assert torch.equal(packing.unpack_int8(packed, c, k, (3, 2), groups), weight)
    masked = weight.float() * (torch.rand(weight.shape) > 0.7)
    sparse = packing.pack_sparse(masked, groups, block=4)
    assert sparse.values.numel() == int(torch.count_nonzero(masked))
    assert torch.equal(packing.unpack_sparse(sparse, c, k, (3, 2), groups), masked)


def test_backward_says_what_to_do() -> None:
    layer = SparseConv2d(Geometry(3, 4, (3, 3)), torch.randn(4, 3, 3, 3))
    with pytest.raises(InferenceOnlyError, match="before cnncomp.convert"):
        layer(torch.randn(1, 3, 8, 8, requires_grad=True)).sum().backward()
    with pytest.raises(InferenceOnlyError, match="before cnncomp.convert"):
        make_quant_conv(Geometry(3, 4, (3, 3)))(torch.randn(1, 3, 8, 8, requires_grad=True))


def test_bad_input_is_named() -> None:
    args = list(_conv_args(torch.uint8))
    with pytest.raises(DtypeError, match="x: got torch.float32"):
        OPS.conv2d_int8(args[0].float(), *args[1:])
    with pytest.raises(ArgumentError, match="packed shape"):
        OPS.conv2d_int8(args[0][:, :4], *args[1:])
    with pytest.raises(ArgumentError, match="residual"):
        OPS.conv2d_int8(*args[:3], torch.zeros(1, 1, 1, 1), *args[4:])
    with pytest.raises(ArgumentError, match="no smaller than the kernel"):
        SparseConv2d(Geometry(3, 4, (3, 3)), torch.randn(4, 3, 3, 3))(torch.randn(1, 3, 2, 2))
    with pytest.raises(ArgumentError, match="3 channels"):
        SparseConv2d(Geometry(3, 4, (3, 3)), torch.randn(4, 3, 3, 3))(torch.randn(1, 4, 8, 8))
    with pytest.raises(ArgumentError, match="NaN"):
        SparseConv2d(Geometry(1, 1, (1, 1)), torch.full((1, 1, 1, 1), float("nan")))
    with pytest.raises(OverflowRiskError, match="66312 products"):
        QuantLinear(torch.zeros(1, 66312, dtype=torch.int8), torch.ones(1), None, QuantSpec(1.0, torch.uint8))
    QuantLinear(torch.zeros(1, 66311, dtype=torch.int8), torch.ones(1), None, QuantSpec(1.0, torch.uint8))


NO_STEPS = [0.0, -1.0, math.nan, math.inf]


@pytest.mark.parametrize("step", NO_STEPS)
def test_steps_that_are_none_are_refused(step: float) -> None:
    weight, ones, spec = torch.zeros(2, 4, dtype=torch.int8), torch.ones(2), QuantSpec(0.1, torch.uint8)
    with pytest.raises(ArgumentError, match="weight_scale: .*1 of them not finite and above 0"):
        QuantLinear(weight, torch.tensor([1.0, step]), None, spec)
    with pytest.raises(ArgumentError, match="input_scale"):
        QuantSpec(step, torch.uint8)
    layer = QuantLinear(weight, ones, None, spec)
    with pytest.raises(ArgumentError, match="residual_scale"):
        layer.set_output(None, step)
    with pytest.raises(ArgumentError, match="inv_scale"):
        OPS.quantize(torch.ones(3), step, torch.uint8)
    x, residual = random_8bit((3, 4), torch.uint8), torch.zeros(3, 2, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match="residual_scale"):
        OPS.linear_int8(x, layer.weight, layer.constants, residual, step, 0.0, torch.float32)
    assert OPS.linear_int8(x, layer.weight, layer.constants, None, step, 0.0, torch.float32).shape == (3, 2)


def test_tensors_too_large_for_a_gpu_are_refused_before_a_launch() -> None:
    """Without memory: what is checked is shapes."""
    constants, weight = torch.empty(3, 8, device="meta"), torch.empty(8, 1, 1, 16, dtype=torch.int8, device="meta")
    x = torch.empty(1, 16, 2**14, 2**13, dtype=torch.uint8, device="meta")
    where = ((1, 1), (1, 1), (0, 0), (1, 1), 1, torch.uint8)
    with pytest.raises(ArgumentError, match="x: got shape .* expected at most 2,147,483,647 elements"):
        conv2d_int8._conv_cuda(x, weight, constants, None, 1.0, 0.0, *where)
    wide = torch.empty(2**10, 1, 1, 16, dtype=torch.int8, device="meta")
    with pytest.raises(ArgumentError, match="out: got shape"):
        x = torch.empty(1, 16, 2**11, 2**10, dtype=torch.uint8, device="meta")
        conv2d_int8._conv_cuda(x, wide, torch.empty(3, 2**10, device="meta"), None, 1.0, 0.0, *where)
    rows = torch.empty(2**28, 16, dtype=torch.int8, device="meta")
    with pytest.raises(ArgumentError, match="x: got shape"):
        conv2d_int8._linear_cuda(
            rows, torch.empty(8, 16, dtype=torch.int8, device="meta"), constants, None, 1.0, 0.0, torch.uint8
        )
    with pytest.raises(ArgumentError, match="x: got shape"):
        quantize._cuda(torch.empty(2**31, device="meta"), 1.0, torch.uint8)
    with pytest.raises(ArgumentError, match="x: got shape"):
        max_pool2d_int8._cuda(
            torch.empty(2, 2**10, 2**10, 2**10, dtype=torch.uint8, device="meta"), (1, 1), (1, 1), (0, 0), (1, 1)
        )


@pytest.mark.parametrize(
    ("built", "triton", "capability"), [(True, True, (9, 0)), (True, True, (7, 0)), (False, True, (8, 0))]
)
def test_a_gpu_without_kernels_of_this_build_is_told_once(built, triton, capability, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "_cuda", types.SimpleNamespace(supports=lambda index: False) if built else None)
    monkeypatch.setattr(cuda, "available", lambda: triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda.backend.cache_clear()
    device = torch.device("cuda", 5)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(3):
                if capability < (8, 0):
                    with pytest.raises(DeviceError, match="cuda:5"):
                        cuda.backend(device)
                else:
                    assert cuda.backend(device) == "triton"
        assert [str(w.message) for w in told] == (
            ["this build has no CUDA kernels for cuda:5, sm_90: Triton's run there"]
            if built and capability >= (8, 0)
            else []
        )
    finally:
        cuda.backend.cache_clear()


def test_quantised_layers_stay_in_float_where_nothing_can_run_them(monkeypatch) -> None:
    def refuse(self, weight):
        raise DeviceError("x", "cuda:0", "another")

    monkeypatch.setattr(QuantConv2d, "_pack", refuse)
    layer = DenseConv2d(CONV, W)
    layer.info.input = SPEC
    with pytest.warns(UserWarning, match="quantised layers run in float: x: got cuda:0"):
        options, why_not = options_for(layer, "cpu")
    assert all(o.candidate.dense for o in options) and "expected another" in why_not


CONV = Geometry(4, 8, (3, 3), padding=(1, 1))
W = torch.ones(8, 4, 3, 3)
SPEC = QuantSpec(0.1, torch.uint8)


def quant(weight: Tensor, bias: Tensor | None, activation: Clamp = LINEAR) -> QuantConv2d:
    return QuantConv2d(CONV, weight.to(torch.int8), torch.ones(weight.shape[0]), bias, SPEC, activation)


@pytest.mark.parametrize(
    "build",
    [
        lambda w, b: SparseConv2d(CONV, w, b),
        lambda w, b: DenseConv2d(CONV, w, b),
        lambda w, b: DenseConv2d(CONV, w, b, kernel="dense.direct"),
        quant,
    ],
    ids=["sparse", "dense", "direct", "int8"],
)
def test_layers_refuse_tensors_that_do_not_fit(build: Callable[[Tensor, Tensor | None], object]) -> None:
    build(W, torch.ones(8))
    for wrong in (torch.ones(8, 4, 1, 1), torch.ones(8, 2, 3, 3), torch.ones(7, 4, 3, 3)):
        with pytest.raises(ArgumentError, match="weight"):
            build(wrong, None)
    for bias in (torch.ones(1), torch.ones(9), torch.ones(8, 1)):
        with pytest.raises(ArgumentError, match="bias"):
            build(W, bias)


def test_linear_layers_refuse_biases_that_do_not_fit() -> None:
    for layer in (SparseLinear, DenseLinear):
        with pytest.raises(ArgumentError, match="bias"):
            layer(torch.ones(8, 4), torch.ones(4))
    with pytest.raises(ArgumentError, match="upper bounds"):
        quant(W, None, Clamp(0.0, (1.0,) * 7))
    with pytest.raises(ArgumentError, match="activation"):
        Clamp(float("nan"), 1.0)


def test_operators_refuse_vectors_and_windows_that_are_none() -> None:
    x, packed = torch.ones(1, 4, 6, 6), packing.pack_sparse(W)
    where = dict(out_channels=8, kernel_size=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1)

    def sparse(bias: Tensor | None = None, **other: Any) -> Tensor:
        args = {**where, **other}
        return torch.ops.cnncomp.conv2d_sparse(x, *packed, bias, None, -math.inf, math.inf, *args.values())

    assert sparse().shape == (1, 8, 6, 6)
    for bias in (torch.ones(7), torch.ones(16)[::2]):
        with pytest.raises(ArgumentError, match="bias"):
            sparse(bias)
        with pytest.raises(ArgumentError, match="bias"):
            dense = packing.pack_dense(W, 1, 4)
            torch.ops.cnncomp.conv2d_dense(x, dense, bias, None, 0.0, 1.0, 8, [1, 1], [1, 1], [1, 1])
        with pytest.raises(ArgumentError, match="bias"):
            torch.ops.cnncomp.conv2d_depthwise(x[:, :1], W[:1, :1], bias[:2], None, 0.0, 1.0, [1, 1], [1, 1], [1, 1])
        with pytest.raises(ArgumentError, match="bias"):
            torch.ops.cnncomp.linear_dense(torch.ones(1, 4), torch.ones(8, 4), bias, None, 0.0, 1.0)
    for name, value in (("stride", [0, 1]), ("dilation", [1, 0]), ("padding", [-1, 0])):
        with pytest.raises(ArgumentError, match=name):
            sparse(**{name: value})
    q = torch.zeros(1, 4, 6, 6, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match="dilation"):
        torch.ops.cnncomp.max_pool2d_int8(q, [3, 3], [2, 2], [1, 1], [1, 0])
    constants = torch.ones(8, 3).t()
    with pytest.raises(ArgumentError, match="constants"):
        weight = packing.pack_int8(W.to(torch.int8))
        ones = ([3, 3], [1, 1], [1, 1], [1, 1], 1, torch.float32)
        torch.ops.cnncomp.conv2d_int8(q, weight, constants, None, 1.0, -math.inf, *ones)
    with pytest.raises(ArgumentError, match="0 input"):
        torch.ops.cnncomp.conv2d_int8(q[:, :0], weight, constants.contiguous(), None, 1.0, -math.inf, *ones)
