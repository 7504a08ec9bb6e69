"""The mean-shift scheme: the article's class, its formula and what is done about it; layers, conversion and files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cnncomp
from cnncomp import Quantization
from cnncomp.errors import ArgumentError, DtypeError
from cnncomp.models import ArticleNet, DigitsNet, mobilenet_v2
from cnncomp.nn import Clamp, Geometry, QuantConv2d, QuantLinear, QuantSpec, quantize_weight
from cnncomp.ops import reference
from cnncomp.pruning import prune
from cnncomp.quantization import integer_weight, mean_shift, quantization_of, quantize
from cnncomp.quantization.article import smallest_ratio
from tests.helpers import random_8bit, randomize_norms, reference_conv


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 32, 32)


# --- the formula ---


@given(seed=st.integers(0, 10_000), exponent=st.integers(-20, 20), channel=st.sampled_from([None, 0, 1]))
@settings(deadline=None)
def test_the_formula(seed: int, exponent: int, channel: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(5, 7, 3, generator=generator) + 0.7) * 2.0**exponent
    found = mean_shift(x, per_channel=channel)
    dims = (0, 1, 2) if channel is None else tuple(d for d in range(3) if d != channel)
    mean = x.double().mean(dims, keepdim=channel is not None)
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-5, atol=1e-6 * 2.0**exponent)
    q = ((x.double() - found.mean.double()) / found.ratio.double()).round()
    assert found.q.dtype == torch.int8 and torch.equal(found.q.double(), q)
    assert found.q.abs().amax(dims).eq(127).all()  # the range is used, and not left
    assert ((found.value() - x).abs() <= found.ratio * 0.5001 + 1e-6 * x.abs()).all()


def test_dividing_once_more_by_the_ratio_gives_the_normalised_value() -> None:
    """The article's last formula is x̂/α, which is no approximation of x; its code's is x̂."""
    x = torch.randn(100) + 3
    found = mean_shift(x, ratio=0.05)
    assert torch.equal(found.value(), found.q * torch.tensor(0.05) + found.mean)
    assert torch.equal(found.value(normalized=True), found.value() / 0.05)
    assert (found.value() - x).abs().max() < 0.026 and (found.value(normalized=True) - x).abs().min() > 5


@given(largest=st.floats(1e-20, 1e20))
def test_the_smallest_ratio_that_fits(largest: float) -> None:
    alpha = torch.tensor(smallest_ratio(largest))
    below = torch.nextafter(alpha, torch.zeros(()))
    assert round(largest / alpha.item()) <= 127 < round(largest / below.item())


def test_a_ratio_that_overflows_names_the_smallest_that_fits() -> None:
    model = ArticleNet()
    with pytest.raises(ArgumentError, match="overflows") as error:
        Quantization(model, 1e-5)
    assert "parameter 'features.0.weight'" in str(error.value)
    x = torch.randn(50)
    with pytest.raises(ArgumentError, match="at least") as error:
        mean_shift(x, 1e-4)
    smallest = float(error.value.expected.split()[2].rstrip(":"))
    assert mean_shift(x, smallest).q.abs().max() == 127
    with pytest.raises(ArgumentError, match="at least"):
        mean_shift(x, torch.nextafter(torch.tensor(smallest), torch.zeros(())).item())


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_ratios_above_zero(ratio: float) -> None:
    with pytest.raises(ArgumentError, match="quantization_ratio: got .* expected a number above 0"):
        Quantization(ArticleNet(), ratio)


def test_constants_and_bad_values() -> None:
    assert mean_shift(torch.full((4,), 2.5)).value().tolist() == [2.5] * 4
    assert mean_shift(torch.zeros(3, 2), per_channel=0).value().tolist() == [[0, 0]] * 3
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="NaN or infinity"):
            mean_shift(torch.tensor([1.0, bad]))
    with pytest.raises(ArgumentError, match="no floating-point parameters"):
        Quantization(nn.ReLU())
    with pytest.raises(ArgumentError, match="a torch.nn.Module"):
        Quantization(lambda x: x)  # type: ignore[arg-type]


# --- the class ---


@pytest.mark.parametrize("per_channel", [False, True])
def test_all_parameters_are_quantised_and_nothing_else(per_channel: bool) -> None:
    model, x = randomize_norms(DigitsNet().eval()), torch.rand(8, 1, 8, 8)
    before = copy.deepcopy(model.state_dict())
    quantized = Quantization(model, per_channel=per_channel)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for p in expected.parameters():
            p.copy_(mean_shift(p, None, 0 if per_channel and p.dim() > 1 else None).value())
        got = quantized(x)
        assert torch.equal(got, expected(x)) and not torch.equal(got, model(x))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    weight = quantized.stored["conv2/0/weight"]
    assert weight.mean.numel() == weight.ratio.numel() == (64 if per_channel else 1)
    assert quantized.stored["fc/bias"].mean.numel() == 1


def test_parameters_are_stored_as_int8() -> None:
    model, x = ArticleNet().eval(), images()
    quantized = Quantization(model)
    names = dict(model.named_parameters())
    state = quantized.state_dict()
    assert {t.dtype for name, t in state.items() if name.endswith(".q")} == {torch.int8}
    assert sum(t.numel() for name, t in state.items() if name.endswith(".q")) == sum(p.numel() for p in names.values())
    assert max(t.numel() for name, t in state.items() if not name.endswith(".q")) == 1  # no float weights beside them
    assert not list(quantized.parameters())
    other = Quantization(ArticleNet().eval())
    assert not torch.equal(other(x), quantized(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), quantized(x))
    clone = copy.deepcopy(quantized)
    assert torch.equal(clone(x), quantized(x))


def test_one_ratio_for_all() -> None:
    model = ArticleNet().eval()
    quantized = Quantization(model, 0.01)
    assert all(s.ratio == torch.tensor(0.01) for s in quantized.stored.values())
    coarse = Quantization(model, 0.1)
    x = images()
    with torch.no_grad():
        assert (coarse(x) - model(x)).norm() > (quantized(x) - model(x)).norm() > 0
    assert "quantization_ratio=0.01" in repr(quantized)


def test_dimensions_count_from_the_end_too() -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    for channel in range(3):
        a, b = mean_shift(x, per_channel=channel), mean_shift(x, per_channel=channel - 3)
        assert a.mean.numel() == x.shape[channel] and torch.equal(a.mean, b.mean) and torch.equal(a.q, b.q)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        ([1.0, 2.0], {}, "x: got list"),
        (torch.zeros(2, dtype=torch.complex64), {}, "x: got torch.complex64"),
        (torch.zeros(0, 3), {}, r"x: got an empty tensor, \(0, 3\)"),
        (torch.ones(3), {"ratio": "a"}, "quantization_ratio: got 'a'"),
        (torch.ones(3), {"ratio": True}, "quantization_ratio: got True"),
        (torch.ones(3), {"per_channel": 5}, "per_channel: got 5"),
        (torch.ones(3), {"per_channel": -2}, "per_channel: got -2"),
        (torch.ones(3), {"per_channel": False}, "per_channel: got False"),
        (torch.tensor(1.0), {"per_channel": 0}, "per_channel: got 0"),
    ],
)
def test_arguments_of_the_formula(x: object, arguments: dict[str, object], message: str) -> None:
    error = DtypeError if message.startswith(("x: got list", "x: got torch")) else ArgumentError
    with pytest.raises(error, match=message):
        mean_shift(x, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", ["a", True])
def test_a_ratio_that_is_no_number(ratio: object) -> None:
    with pytest.raises(ArgumentError, match="quantization_ratio"):
        Quantization(nn.Linear(2, 2), ratio)  # type: ignore[arg-type]


def test_normalised_parameters() -> None:
    model = ArticleNet()
    by_name = Quantization(model, 0.05, normalized=True).parameters_by_name()
    plain = Quantization(model, 0.05).parameters_by_name()
    assert all(torch.equal(value, plain[name] / torch.tensor(0.05)) for name, value in by_name.items())


@pytest.mark.parametrize("per_channel", [False, True])
def test_outputs_on_request(per_channel: bool) -> None:
    model, x = ArticleNet().eval(), images()
    plain = Quantization(model, per_channel=per_channel)(x)
    got = Quantization(model, per_channel=per_channel, outputs=True)(x)
    assert torch.equal(got, mean_shift(plain, None, 1 if per_channel else None).value()) and not torch.equal(got, plain)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ArticleNet()

        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, object]:
            return {"a": self.net(x * scale), "b": (x.sum((1, 2, 3)), 3)}

    result = Quantization(Two().eval(), outputs=True)(x, scale=0.5)
    assert result["b"][1] == 3 and result["a"].unique().numel() <= 40
    with pytest.raises(ArgumentError, match="at least"):
        Quantization(Two().eval(), 0.02, outputs=True)(100 * x)


def test_shared_parameters_are_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model, x = Tied(), torch.randn(3, 6)
    quantized = Quantization(model)
    assert len(quantized.stored) == 3
    w, biases = mean_shift(model.a.weight).value(), [mean_shift(m.bias).value() for m in (model.a, model.b)]
    torch.testing.assert_close(quantized(x), (x @ w.T + biases[0]) @ w.T + biases[1])


def test_dtypes_and_single_layers() -> None:
    layer = nn.Linear(4, 3).half()
    x = torch.randn(2, 4).half()
    assert Quantization(layer)(x).dtype == torch.float16
    assert Quantization(nn.Linear(4, 3))(torch.randn(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_class_runs_on_the_int8_kernels(per_channel: bool) -> None:
    model, x = randomize_norms(DigitsNet().eval()), torch.rand(16, 1, 8, 8)
    quantized = Quantization(model, per_channel=per_channel)
    simulated = quantized.to_int8(x)
    assert torch.equal(integer_weight(simulated.conv2[0]), quantized.stored["conv2/0/weight"].q)
    fast = cnncomp.convert(simulated, x, measure=False)
    layers = {n: m for n, m in fast.named_modules() if isinstance(m, (QuantConv2d, QuantLinear))}
    assert len(layers) == 5
    assert torch.equal(layers["network.fc"].weight_int8(), quantized.stored["fc/weight"].q)
    with torch.no_grad():
        expected = quantized(x)
    assert (fast(x) - expected).norm() < 0.03 * expected.norm()
    with pytest.raises(ArgumentError, match="normalized"):
        Quantization(model, normalized=True).to_int8(x)


# --- layers ---


def shifted_conv(geometry: Geometry, dtype: torch.dtype, output: QuantSpec | None, activation: Clamp) -> QuantConv2d:
    weight = torch.randn(geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel_size) + 0.5
    shift = weight.flatten(1).mean(1)
    q, scale = quantize_weight(weight, None, shift)
    bias = torch.randn(geometry.out_channels)
    return QuantConv2d(geometry, q, scale, bias, QuantSpec(0.02, dtype), activation, output, 0.5, weight_shift=shift)


@pytest.mark.parametrize("output", [None, QuantSpec(0.3, torch.int8), QuantSpec(0.2, torch.uint8)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(3, 20, (3, 3), (2, 2), (1, 1)),
        Geometry(40, 40, (3, 3), padding=(1, 1), groups=40),
        Geometry(12, 18, (1, 1), groups=3),
        Geometry(5, 7, (1, 3), padding=(0, 2), conv1d=True),
    ],
    ids=str,
)
def test_layers_are_the_reference_bit_for_bit(geometry: Geometry, dtype: torch.dtype, output: QuantSpec | None) -> None:
    layer = shifted_conv(geometry, dtype, output, Clamp(-1.0, 30.0))
    shape = (2, geometry.in_channels, 9, 8)
    x = random_8bit(shape, dtype)
    x = x[:, :, :1] if geometry.conv1d else x
    got = layer(x.squeeze(2)).unsqueeze(2) if geometry.conv1d else layer(x)
    expected = reference_conv(layer, x)
    assert torch.equal(got, expected)
    residual = torch.randn(expected.shape)
    if not geometry.conv1d:
        assert torch.equal(layer(x, residual), reference_conv(layer, x, residual))
    if output is None:  # and the reference is the convolution with α·q + μ
        g = geometry
        y = nn.functional.conv2d(x.double() * 0.02, layer._dequantized().double(), layer.bias.double(), g.stride, g.padding,
                                 g.dilation, g.groups)  # fmt: skip
        torch.testing.assert_close(got.double(), y.clamp(-1, 30), rtol=1e-4, atol=1e-4)


def test_linear_layers_and_their_files() -> None:
    weight = torch.randn(31, 130) + 1
    shift = weight.mean(1)
    q, scale = quantize_weight(weight, None, shift)
    layer = QuantLinear(q, scale, None, QuantSpec(0.03, torch.int8), weight_shift=shift)
    x = random_8bit((5, 130), torch.int8)
    assert layer.constants.shape == (4, 31)
    args = (layer.constants, None, 1.0, layer.lo, torch.float32)
    assert torch.equal(layer(x), reference.linear_int8(x, q, *args))
    torch.testing.assert_close(layer(x), (x.float() * 0.03) @ layer.to_dense().weight.T, rtol=1e-4, atol=1e-3)
    rebuilt = QuantLinear.build(layer.config(), layer.tensors())
    assert torch.equal(rebuilt(x), layer(x))
    other = QuantLinear(q, scale, None, QuantSpec(0.03, torch.int8), weight_shift=torch.zeros(31))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    with pytest.raises(ArgumentError, match="weight_shift"):
        QuantLinear(q, scale, None, QuantSpec(0.03, torch.int8), weight_shift=torch.full((31,), float("nan")))


def test_constants_have_three_or_four_rows() -> None:
    layer = shifted_conv(Geometry(3, 4, (1, 1)), torch.uint8, None, Clamp())
    x = random_8bit((1, 3, 2, 2), torch.uint8)
    for rows in (2, 5):
        layer.constants = torch.zeros(rows, 4)
        with pytest.raises(ArgumentError, match=r"constants: got shape \(., 4\), expected \(3, K\), or \(4, K\)"):
            layer(x)


# --- quantize(scheme="mean-shift") ---


def test_predictions_are_those_of_shifted_integers() -> None:
    model, x = ArticleNet().eval(), images()
    with torch.no_grad():
        model.features[3].weight.add_(0.3)
    quantize(model, x, scheme="mean-shift")
    layer = model.features[3]
    found = quantization_of(layer)
    assert found.weight_shift.shape == (128,)
    original = layer.parametrizations.weight.original
    torch.testing.assert_close(found.weight_shift, original.flatten(1).mean(1))
    per_row = (-1, 1, 1, 1)
    q = ((original - found.weight_shift.view(per_row)) / found.weight_scale.view(per_row)).round().clamp(-127, 127)
    assert torch.equal(integer_weight(layer).float(), q)
    expected = q * found.weight_scale.view(per_row) + found.weight_shift.view(per_row)
    torch.testing.assert_close(layer.weight, expected)


@pytest.mark.parametrize("name", ["mobilenet", "digits"])
def test_models_convert_and_are_saved(name: str, tmp_path: Path) -> None:
    model = randomize_norms((mobilenet_v2(10, 0.35) if name == "mobilenet" else DigitsNet()).eval())
    x = torch.randn(2, 3, 32, 32) if name == "mobilenet" else torch.rand(4, 1, 8, 8)
    quantize(model, x, scheme="mean-shift", exclude="features.4.conv.0.0" if name == "mobilenet" else "conv3")
    expected = model(x)
    fast = cnncomp.convert(model, x, measure=False)
    assert (fast(x) - expected).norm() < 0.03 * expected.norm()
    assert sum(isinstance(m, (QuantConv2d, QuantLinear)) and m.weight_shift is not None for m in fast.modules()) > 3
    cnncomp.save(fast, tmp_path / "net.cnncomp")
    loaded = cnncomp.load(tmp_path / "net.cnncomp", replan=False)
    assert torch.equal(loaded(x), fast(x))
    again = cnncomp.convert(loaded, x, measure=False)  # from what the layers hold
    assert torch.equal(again(x), fast(x))


def test_a_dense_plan_keeps_the_scheme() -> None:
    model, x = DigitsNet().eval(), torch.rand(4, 1, 8, 8)
    fast = cnncomp.convert(quantize(model, x, scheme="mean-shift"), x, measure=False)
    plan = copy.deepcopy(fast.plan)
    for layer in plan.layers.values():
        layer.kernel = "dense.nchw" if layer.kernel == "conv2d_int8" else "dense.linear"
    dense = cnncomp.convert(model, x, plan=plan)
    assert not any(isinstance(m, QuantConv2d) for m in dense.modules())
    assert torch.equal(cnncomp.convert(dense, x, measure=False)(x), fast(x))


def test_pruned_weights_have_no_mean_shift() -> None:
    with pytest.raises(ArgumentError, match="scheme: got 'mean-shift' for layer .*pruned.*expected 'symmetric'"):
        quantize(prune(DigitsNet(), 0.5), torch.rand(4, 1, 8, 8), scheme="mean-shift")


def test_half_precision_keeps_scale_and_shift() -> None:
    model = quantize(ArticleNet().eval(), images(), scheme="mean-shift").half()
    found = quantization_of(model.features[0])
    assert found.weight_scale.dtype == found.weight_shift.dtype == torch.float32
    assert model(images().half()).dtype == torch.float16
