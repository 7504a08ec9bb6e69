"""Quantisation: scales, simulated arithmetic, calibration and its errors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cnncomp.errors import ArgumentError, CalibrationError, DeviceError, OverflowRiskError
from cnncomp.models import ArticleNet, DigitsNet, mobilenet_v2
from cnncomp.pruning import mask_of, prune, remove_masks, sparsity_of
from cnncomp.quantization import (
    FakeQuantizeInput,
    FakeQuantizeWeight,
    QuantizeInputHook,
    integer_weight,
    quantization_of,
    quantize,
    remove_quantization,
)
from cnncomp.quantization.fake import fake_quantize
from cnncomp.quantization.scales import RangeObserver, weight_scales


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Many tiny operations: on busy machines a second thread costs more than all the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


NAN, INF = float("nan"), float("inf")


def images(n: int = 8) -> Tensor:
    return torch.randn(n, 3, 32, 32)


def quantized_article_net(**arguments: Any) -> ArticleNet:
    return quantize(ArticleNet().eval(), images(), **arguments)  # type: ignore[return-value]


# --- arithmetic ---


@given(seed=st.integers(0, 10_000), exponent=st.integers(-30, 30), signed=st.booleans())
def test_fake_quantize_is_quantize_then_scale(seed: int, exponent: int, signed: bool) -> None:
    rng = np.random.default_rng(seed)
    scale = np.float32(rng.uniform(1, 2) * 2.0**exponent)
    x = (rng.uniform(-300, 300, 500) * scale).astype(np.float32)
    x[:100] = (np.arange(100) - 50.5) * scale  # ties, as near as float32 gets
    lo, hi = (-128, 127) if signed else (0, 255)
    inv_scale = np.float32(1 / np.float64(scale))
    q = np.rint(np.clip(x * inv_scale, np.float32(lo), np.float32(hi)))
    quantizer = FakeQuantizeInput(float(scale), torch.int8 if signed else torch.uint8)
    got = quantizer(torch.from_numpy(x)).numpy()
    assert np.array_equal(got, q * scale), np.flatnonzero(got != q * scale)


def test_ties_go_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997, 253.5, 254.5])
    got = fake_quantize(x, torch.tensor(1.0), -300, 300)
    assert got.tolist() == [0, 2, 2, 0, -2, -2, 0, 254, 254]


def test_gradient_is_that_of_the_clamp() -> None:
    x = torch.tensor([-1.0, 0.3, 100.2, 255.4, 256.0], requires_grad=True)
    FakeQuantizeInput(1.0, torch.uint8)(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_keep_theirs(dtype: torch.dtype) -> None:
    model = quantized_article_net().to(dtype)
    assert model(images(2).to(dtype)).dtype == dtype
    assert quantization_of(model.classifier).weight_scale.dtype == torch.float32
    assert model.classifier.input_quantizer.scale.dtype == torch.float32


# --- scales ---


@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_weight_scales_per_output_channel(method: str) -> None:
    weight = torch.randn(6, 4, 3, 3) * torch.tensor([1e-3, 1.0, 50.0, 1e-25, 0.0, 7.0]).view(-1, 1, 1, 1)
    scale = weight_scales(weight, method)
    largest = weight.flatten(1).abs().amax(1)
    assert scale.shape == (6,)
    assert scale[3] == scale[4] == 1  # all zero, or as good as
    live = [0, 1, 2, 5]
    assert (scale[live] <= largest[live] / 127).all()
    if method == "minmax":
        assert torch.equal(scale[live], largest[live] / 127)


def test_mse_clips_outliers_where_that_pays() -> None:
    weight = torch.randn(2, 100_000).clamp(-3, 3)
    weight[0, 0] = 5.0

    def error(scale: Tensor) -> Tensor:
        return (fake_quantize(weight, scale[:, None], -127, 127) - weight).square().sum(1)

    mse, minmax = weight_scales(weight, "mse"), weight_scales(weight, "minmax")
    assert (error(mse) <= error(minmax)).all()
    assert mse[0] < 0.8 * minmax[0]
    observer = RangeObserver()
    observer.update(weight[0], histogram=True)
    assert observer.scale("mse") < 0.8 * observer.scale("minmax")


@given(seed=st.integers(0, 1000), batches=st.integers(1, 6))
def test_histogram_of_batches_is_that_of_all(seed: int, batches: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(200, generator=generator) * 3.0**i for i in range(batches)]
    observer = RangeObserver(bins=64)
    for part in parts:
        observer.update(part, histogram=True)
    x = torch.cat(parts).abs()
    assert observer.counts.sum() == observer.seen == len(x)
    assert observer.largest == x.max() and x.max() <= observer.limit
    # Merged bins are those of the final range, but for values that rounding puts on an edge.
    direct = torch.histc(x, 64, 0.0, observer.limit).double()
    assert (observer.counts - direct).abs().sum() <= 2


def test_uint8_only_where_nothing_was_negative() -> None:
    observer = RangeObserver()
    observer.update(torch.tensor([0.0, 5.1]), histogram=True)
    assert observer.dtype == torch.uint8
    assert observer.scale("minmax") == np.float32(np.float32(5.1) / np.float64(255))
    observer.update(torch.tensor([-0.001]), histogram=True)
    assert observer.dtype == torch.int8
    assert observer.scale("minmax") == np.float32(np.float32(5.1) / np.float64(127))


def test_a_dead_input_gets_scale_1() -> None:
    observer = RangeObserver()
    observer.update(torch.zeros(4), histogram=True)
    assert observer.scale("mse") == observer.scale("minmax") == 1.0


# --- the whole ---


def test_dtypes_follow_the_activations() -> None:
    model = quantized_article_net()
    found = {name: quantization_of(m) for name, m in model.named_modules() if quantization_of(m) is not None}
    assert {name: q.input_dtype for name, q in found.items()} == {
        "features.0": torch.int8,
        "features.3": torch.uint8,
        "classifier": torch.uint8,
    }
    assert found["features.3"].weight_scale.shape == (128,)
    assert isinstance(found["features.3"].input_scale, float)


@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_prediction_is_that_of_integers(method: str) -> None:
    """The layer's output is, up to float summation, that of its integer weight and its integer input."""
    model = quantized_article_net(method=method)
    layer = model.features[3]
    found = quantization_of(layer)
    x = torch.rand(2, 64, 8, 8) * 3
    q = (x / found.input_scale).round().clamp(0, 255).double()
    w = integer_weight(layer)
    assert w.dtype == torch.int8 and w.abs().max() == 127
    acc = nn.functional.conv2d(q, w.double(), padding=1)
    expected = acc * found.input_scale * found.weight_scale.double().view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_outputs_stay_close(method: str) -> None:
    model = DigitsNet().eval()
    x = torch.rand(64, 1, 8, 8)
    expected = model(x)
    got = quantize(model, x.split(16), method=method)(x)
    noise = (got - expected).square().mean() / expected.square().mean()
    assert 0 < noise < 1e-2  # 20 dB


def test_the_integer_weight_is_recovered_exactly() -> None:
    for seed in range(20):
        weight = torch.randn(8, 1000, generator=torch.Generator().manual_seed(seed))
        layer = nn.Linear(1000, 8)
        layer.weight.data = weight
        quantize(layer, torch.randn(2, 1000))
        scale = quantization_of(layer).weight_scale[:, None]
        expected = (weight * scale.reciprocal()).clamp(-127, 127).round()
        assert torch.equal(integer_weight(layer).float(), expected)


def test_training_goes_on() -> None:
    model = quantize(prune(DigitsNet(), 0.8), torch.rand(16, 1, 8, 8)).train()
    before = model.conv3[0].parametrizations.weight.original.detach().clone()
    pruned = ~mask_of(model.conv3[0])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert (model.conv3[0].parametrizations.weight.original != before)[~pruned].float().mean() > 0.9
    assert not model.conv3[0].weight[pruned].any()


@pytest.mark.parametrize("order", ["prune first", "quantize first"])
def test_pruned_weights_stay_zero(order: str) -> None:
    model, x = DigitsNet().eval(), torch.rand(4, 1, 8, 8)
    if order == "prune first":
        quantize(prune(model, 0.7), x)
    else:
        prune(quantize(model, x), 0.7)
    for m in (model.conv2[0], model.conv3[0], model.conv4[0]):
        assert not m.weight[~mask_of(m)].any()
        assert not integer_weight(m)[~mask_of(m)].any()
    expected = model(x)
    remove_masks(model)  # the quantisation stays
    assert mask_of(model.conv3[0]) is None and quantization_of(model.conv3[0]) is not None
    assert torch.equal(model(x), expected)
    assert sparsity_of(model).sparsity > 0.6


def test_remove_quantization_restores_the_model() -> None:
    model = ArticleNet().eval()
    names, x = list(model.state_dict()), images()
    expected = model(x)
    parameter = model.classifier.weight
    quantize(model, x)
    assert not torch.equal(model(x), expected)
    assert remove_quantization(model) is model
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == names
    assert type(model.classifier) is nn.Linear and model.classifier.weight is parameter
    assert not model.classifier._forward_pre_hooks and not model.classifier._forward_pre_hooks_with_kwargs
    quantize(model, x)  # and again


def test_remove_quantization_keeps_masks_and_user_hooks() -> None:
    model = prune(ArticleNet(), 0.5, include_first_last=True).eval()
    x = images()
    expected, calls = model(x), []
    model.classifier.register_forward_pre_hook(lambda m, a: calls.append(1))
    remove_quantization(quantize(model, x))
    calls.clear()
    assert torch.equal(model(x), expected)
    assert calls == [1]
    assert mask_of(model.classifier) is not None


def test_copies_and_state_dicts() -> None:
    model, x = quantized_article_net(), images()
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x), model(x))
    hooks = list(clone.classifier._forward_pre_hooks.values())
    assert len(hooks) == 1 and isinstance(hooks[0], QuantizeInputHook)
    clone.classifier.input_quantizer.scale.mul_(3)
    assert not torch.equal(clone(x), model(x))
    other = quantize(ArticleNet().eval(), images().abs())  # its first input is unsigned
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert quantization_of(other.features[0]).input_dtype == torch.int8


def test_biases_and_excluded_layers_are_untouched() -> None:
    model = ArticleNet().eval()
    bias = model.features[0].bias.detach().clone()
    quantize(model, images(), exclude=["features.3", "class*"])
    assert quantization_of(model.features[0]) is not None
    assert type(model.features[3]) is nn.Conv2d and type(model.classifier) is nn.Linear
    assert torch.equal(model.features[0].bias, bias)


def test_conv1d_and_keyword_inputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 6, 3, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    model, x = Net(), torch.randn(2, 4, 9)
    expected = model(x)
    got = quantize(model, x)(x)
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.1)


def test_a_converted_model_traces() -> None:
    model, x = quantized_article_net(), images(2)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


# --- calibration ---


@pytest.mark.parametrize(
    "batches",
    [
        lambda x: x,
        lambda x: [x[:3], x[3:]],
        lambda x: ((part, torch.zeros(4)) for part in x.split(4)),
        lambda x: [{"x": x}],
        lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(len(x))), batch_size=3),
    ],
)
def test_kinds_of_batches_give_the_same_scales(batches: Any) -> None:
    model, x = ArticleNet(), images()
    quantize(model, batches(x), method="minmax")
    assert quantization_of(model.features[0]).input_scale == pytest.approx(x.abs().max().item() / 127, rel=1e-6)


def test_training_flags_and_statistics_survive() -> None:
    model = DigitsNet().train()
    model.conv2[1].eval()
    flags = [m.training for m in model.modules() if not isinstance(m, (FakeQuantizeInput, FakeQuantizeWeight))]
    mean = model.conv1[1].running_mean.clone()
    layers = list(model.modules())
    quantize(model, torch.rand(4, 1, 8, 8))
    assert [m.training for m in layers] == flags
    assert torch.equal(model.conv1[1].running_mean, mean)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batches"),
        (iter(()), "no batches"),
        ([torch.full((1, 3, 32, 32), NAN)], "batch 0: NaN or infinity in the input"),
        ([torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), INF)], "batch 1: NaN or infinity in the input"),
        ([np.zeros((1, 3, 32, 32))], "batch 0: got ndarray, expected a tensor"),
        ([[]], "batch 0: got list, expected a tensor"),
        ([torch.zeros(1, 3, 32, 32), ("label", 1)], "batch 1: got str"),
        (3, "got int, expected batches"),
        ("abc", "got str, expected batches"),
        ({"x": torch.zeros(1, 3, 32, 32)}, "got dict, expected batches"),
        (torch.zeros(0, 3, 32, 32), r"batch 0: got shape \(0, 3, 32, 32\), expected at least one input"),
    ],
)
def test_useless_calibration(batches: Any, message: str) -> None:
    model = ArticleNet().train()
    with pytest.raises(CalibrationError, match=message):
        quantize(model, batches)
    assert model.training and not model.features[0]._forward_pre_hooks
    assert quantization_of(model.features[0]) is None and type(model.features[0]) is nn.Conv2d


def test_overflow_inside_the_model_names_batch_and_layer() -> None:
    model = ArticleNet()
    model.features[0].weight.data.fill_(1e38)
    with pytest.raises(CalibrationError, match=r"batch 1: NaN or infinity in the input of layer 'features\.3'"):
        quantize(model, [torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)])


def test_layers_never_reached_stay_float_with_a_warning() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="stay float: unused"):
        quantize(model, torch.randn(4, 3))
    assert quantization_of(model["used"]) is not None and quantization_of(model["unused"]) is None


def test_models_that_cannot_be_quantised() -> None:
    with pytest.raises(ArgumentError, match="'features.0' quantised already.*remove_quantization"):
        quantize(quantized_article_net(), images())
    with pytest.raises(ArgumentError, match="no Conv1d"):
        quantize(nn.ReLU(), images())
    with pytest.raises(OverflowRiskError, match="'0', which sums 66,312 products, expected at most 66,311"):
        quantize(nn.Sequential(nn.Linear(66_312, 1)), torch.randn(1, 66_312))
    quantize(nn.Sequential(nn.Linear(66_311, 1)), torch.randn(1, 66_311))
    model = ArticleNet()
    model.classifier.weight.data[0, 0] = INF
    with pytest.raises(ArgumentError, match="infinity in the weight of layer 'classifier'"):
        quantize(model, images())


def test_arguments_are_checked() -> None:
    with pytest.raises(ArgumentError, match="method: got 'kl', expected one of 'mse', 'minmax'"):
        quantize(ArticleNet(), images(), method="kl")
    with pytest.raises(ArgumentError, match="exclude: got 'head'"):
        quantize(ArticleNet(), images(), exclude="head")


def test_a_shared_layer_is_observed_at_all_its_calls() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.fc(x * 10)

    x = torch.rand(8, 4)
    model = quantize(Net(), x, method="minmax")
    assert quantization_of(model.fc).input_scale == pytest.approx(x.max().item() * 10 / 255, rel=1e-6)


def test_mobilenet_quantises_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = quantize(mobilenet_v2(10, width_mult=0.35).eval(), torch.randn(2, 3, 32, 32))
    assert sum(quantization_of(m) is not None for m in model.modules()) == 53


def test_a_device_that_is_not_there() -> None:
    model = DigitsNet().eval()
    with pytest.raises(DeviceError, match="device: got 'abacus'"):
        quantize(model, [torch.randn(1, 1, 8, 8)], device="abacus")
    assert not any(len(m._forward_pre_hooks) for m in model.modules())
