"""Post-training methods: calibration, bias correction, adaptive rounding, mixed precision; and QAT."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cnncomp
from cnncomp.errors import ArgumentError, CalibrationError
from cnncomp.models import ArticleNet, DigitsNet
from cnncomp.pruning import mask_of, prune
from cnncomp.quantization import integer_weight, quantization_of, quantize
from cnncomp.quantization.qat import fold_norms
from cnncomp.quantization.rounding import DAMPING, choose_rounding, columns_of
from cnncomp.quantization.scales import RangeObserver
from cnncomp.quantization.sensitivity import most_sensitive
from tests.helpers import noise, randomize_norms
from tests.quantized_nets import NETS


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- calibration ---


def observed(x: Tensor) -> RangeObserver:
    observer = RangeObserver()
    observer.update(x, histogram=True)
    return observer


def test_percentile_clips_one_in_ten_thousand() -> None:
    x = torch.rand(1_000_000)
    x[:50] = 50.0
    limit = observed(x).scale("percentile") * 255
    assert 0.98 < limit < 1.03  # the 9,999th of 10,000, in bins of 50/4096
    assert observed(x).scale("minmax") * 255 == pytest.approx(50, rel=1e-6)


def test_entropy_cuts_a_tail_but_not_a_box() -> None:
    box = observed(torch.rand(200_000))
    assert box.scale("entropy") > 0.97 * box.scale("minmax")
    heavy = observed(torch.randn(200_000) * torch.randn(200_000).exp())
    assert heavy.scale("entropy") < 0.5 * heavy.scale("minmax")


def test_entropy_ignores_the_zeros_of_a_relu() -> None:
    x = torch.randn(100_000).abs()
    with_zeros = torch.cat([x, torch.zeros(300_000)])
    assert observed(with_zeros).scale("entropy") == observed(x).scale("entropy")


@given(seed=st.integers(0, 1000), signed=st.booleans())
@settings(max_examples=20, deadline=None)
def test_every_method_stays_within_the_range(seed: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(int(torch.randint(1, 3000, (), generator=generator)), generator=generator) * 10.0 ** (seed % 7 - 3)
    observer = observed(x if signed else x.abs())
    for method in ("mse", "percentile", "entropy"):
        assert 0.09 * observer.scale("minmax") < observer.scale(method) <= observer.scale("minmax"), method


# --- bias correction ---


@pytest.mark.parametrize("batch", [16, 5, 7])
@pytest.mark.parametrize("rounding", ["nearest", "adaptive"])
@pytest.mark.parametrize("bias", ["own", "norm", "none"])
def test_corrected_layers_have_the_means_of_float_weights(bias: str, batch: int, rounding: str) -> None:
    norm = nn.BatchNorm2d(6) if bias == "norm" else nn.Identity()
    first = nn.Conv2d(3, 6, 3, bias=bias == "own")
    net = randomize_norms(
        nn.Sequential(first, norm, nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(180, 4)).eval()
    )
    x = torch.rand(15 if batch == 5 else 16, 3, 10, 10)

    def shifts(model: nn.Module) -> list[float]:
        """Of each layer's mean outputs (behind the norm), against those that its float weights give on its own inputs."""
        found, y = [], x
        for before, module in zip(net, model, strict=True):
            if quantization_of(module) is None:
                y = module(y)
                continue
            inputs = module.input_quantizer(y)
            expected, y = before(inputs), module(y)
            got = y
            if bias == "norm" and module is model[0]:
                expected, got = norm(expected), model[1](got)
            dims = [d for d in range(y.dim()) if d != 1]
            found.append((got - expected).mean(dims).abs().max().item())
        return found

    plain = shifts(quantize(copy.deepcopy(net), x, rounding=rounding))
    corrected_net = quantize(copy.deepcopy(net), x.split(batch), correct_bias=True, rounding=rounding)
    corrected = shifts(corrected_net)
    assert all(c < (0.05 if rounding == "nearest" else 0.3) * p for c, p in zip(corrected, plain, strict=True)), (
        plain,
        corrected,
    )
    assert (corrected_net[0].bias is None) == (bias == "norm")
    kept = torch.equal(corrected_net[0].parametrizations.weight.original, first.weight)
    assert kept == (rounding == "nearest")


def test_biases_of_a_frozen_net_are_frozen() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5))
    net.eval().requires_grad_(False)
    x = torch.rand(4, 3, 10, 10)
    for model in (quantize(copy.deepcopy(net), x, correct_bias=True), quantize(copy.deepcopy(net), x, qat=True)):
        assert not any(p.requires_grad for p in model.parameters())
    corrected, folded = quantize(copy.deepcopy(net), x, correct_bias=True)[0], copy.deepcopy(net)
    fold_norms(folded)
    assert corrected.bias is not None and folded[2].bias is not None
    assert quantize(net.requires_grad_(True), x, correct_bias=True)[0].bias.requires_grad


class Failing(nn.Module):
    """Raises at one of its calls with a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.fails_at = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += isinstance(x, Tensor)  # and no proxy of a tracer
        if self.calls == self.fails_at:
            raise CalibrationError("no more")
        return x


def test_a_net_that_fails_half_way_is_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(), Failing()).eval()
    x, how = torch.rand(4, 3, 10, 10), {"rounding": "adaptive", "correct_bias": True, "float_budget": 0.5}
    done = quantize(copy.deepcopy(net), x, **how)  # type: ignore[arg-type]
    passes = done[4].calls
    assert passes >= 5
    for net[4].fails_at in range(1, passes + 1):
        net[4].calls, before = 0, copy.deepcopy(net.state_dict())
        with pytest.raises(CalibrationError, match="no more"):
            quantize(net, x, **how)  # type: ignore[arg-type]
        assert net.state_dict().keys() == before.keys()
        assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
        assert quantization_of(net[0]) is quantization_of(net[2]) is None


# --- adaptive rounding ---


def error(q: Tensor, w: Tensor, hessian: Tensor) -> Tensor:
    d = q - w
    return ((d @ hessian) * d).sum(-1)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_rounding_against_brute_force(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = 4 * torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 7, 30, generator=generator, dtype=torch.float64) + 2
    hessian = x @ x.transpose(1, 2)
    damped = hessian + DAMPING * hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(7)
    q = choose_rounding(w, hessian)
    assert torch.equal(torch.minimum((q - w.floor()).abs(), (q - w.ceil()).abs()), torch.zeros_like(w))
    found, nearest = error(q, w, damped), error(w.round(), w, damped)
    assert (found <= nearest + 1e-9).all()
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=7)), dtype=torch.float64)
    best = torch.stack([error(w.floor() + c, w, damped) for c in choices]).amin(0)
    assert (found >= best - 1e-9).all()
    for i in range(7):  # no single flip is better
        flipped = q.clone()
        flipped[..., i] += torch.where(q[..., i] > w[..., i], -1.0, 1.0)
        assert (found <= error(flipped, w, damped) + 1e-9).all()


def test_rounding_in_blocks_is_rounding() -> None:
    w = 4 * torch.randn(1, 5, 300)
    x = torch.randn(1, 300, 900) + 1
    hessian = x @ x.transpose(1, 2)
    q = choose_rounding(w, hessian)
    assert error(q, w, hessian).sum() < 0.6 * error(w.round(), w, hessian).sum()
    assert choose_rounding(torch.tensor([[[126.6, 127.9, -300.0, 3.0]]]), torch.eye(4)[None]).tolist() == [
        [[127, 127, -127, 3]]
    ]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False),
        nn.Conv2d(6, 6, (3, 2), padding="same", dilation=(1, 2), groups=6, bias=False),
        nn.Conv2d(6, 4, 3, padding=2, padding_mode="reflect", bias=False),
        nn.Conv1d(6, 4, 3, padding=1, bias=False),
        nn.Linear(6, 5, bias=False),
    ],
)
def test_columns_are_what_the_layer_multiplies(layer: nn.Module) -> None:
    x = torch.randn(3, 4, 6) if isinstance(layer, nn.Linear) else torch.randn(3, 6, 9, 8)
    x = x[:, :, 0] if isinstance(layer, nn.Conv1d) else x
    columns = torch.cat(list(columns_of(layer, x)), 2)  # type: ignore[arg-type]
    weight = layer.weight.reshape(columns.shape[0], -1, columns.shape[1])
    out = layer(x)
    out = out.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
    torch.testing.assert_close((weight @ columns).flatten(0, 1), out, rtol=1e-4, atol=1e-5)


def test_adaptive_rounding_of_a_net() -> None:
    mix = torch.randn(3, 24)  # few images look like noise: neighbouring channels go together
    model = nn.Sequential(nn.Conv2d(24, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 8, 1)).eval()
    x = torch.einsum("nchw,cd->ndhw", torch.rand(8, 3, 16, 16), mix)
    expected = model(x)
    plain, adaptive = (quantize(copy.deepcopy(model), x, rounding=how) for how in ("nearest", "adaptive"))
    assert noise(adaptive(x), expected) < noise(plain(x), expected)
    for layer in (*plain, *adaptive):
        if quantization_of(layer) is not None:
            layer.input_quantizer.enabled = False  # the noise of the weights alone
    assert noise(adaptive(x), expected) < 0.6 * noise(plain(x), expected)
    layer = adaptive[2]
    scale = quantization_of(layer).weight_scale.view(-1, 1, 1, 1)
    assert torch.equal(layer.weight, integer_weight(layer) * scale)


def test_pruned_weights_stay_zero_when_rounded() -> None:
    model, x = prune(DigitsNet().eval(), 0.7), torch.rand(16, 1, 8, 8)
    quantize(model, x, rounding="adaptive", correct_bias=True, equalize="activations")
    for m in (model.conv2[0], model.conv3[0], model.conv4[0]):
        assert not integer_weight(m)[~mask_of(m)].any() and integer_weight(m)[mask_of(m)].any()


# --- mixed precision ---


def test_the_layer_that_suffers_stays_float() -> None:
    model, x = DigitsNet().eval(), torch.rand(16, 1, 8, 8)
    with torch.no_grad():  # one huge weight in each filter leaves one or two steps for all others
        model.conv3[0].weight[:, 0, 0, 0] = 40.0
    expected = model(x)
    eight = noise(quantize(copy.deepcopy(model), x, method="minmax")(x), expected)
    mixed = quantize(copy.deepcopy(model), x, method="minmax", float_budget=0.35)
    assert quantization_of(mixed.conv3[0]) is None
    assert quantization_of(mixed.conv4[0]) is not None
    assert noise(mixed(x), expected) < 0.2 * eight
    none = quantize(copy.deepcopy(model), x, float_budget=1e-4)
    assert all(quantization_of(m) is not None for m in none.modules() if isinstance(m, nn.Conv2d))


def test_the_budget_holds() -> None:
    sensitivity, cost = {"a": 3.0, "b": 2.0, "c": 1.0, "d": 0.5}, {"a": 60, "b": 25, "c": 10, "d": 5}
    assert most_sensitive(sensitivity, cost, 0.3) == ["b", "d"]
    assert most_sensitive(sensitivity, cost, 1.0) == ["a", "b", "c", "d"]
    assert most_sensitive(sensitivity, cost, 0.0) == []


# --- training ---


def test_folding_changes_nothing() -> None:
    for build, shape, _ in NETS.values():
        model, x = randomize_norms(build().eval()), torch.randn(shape)
        expected, norms = model(x), sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert len(fold_norms(model)) == norms
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


def test_scales_follow_training_and_stand_still_in_eval() -> None:
    model = quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.rand(4, 3, 9, 9), qat=True)
    layer, x = model[2], torch.rand(4, 3, 9, 9)
    before, share = quantization_of(layer), layer.parametrizations.weight[0].share
    before_scale = before.weight_scale.clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(3)
    model.eval()(x)
    assert torch.equal(quantization_of(layer).weight_scale, before_scale)
    model.train()(x)
    torch.testing.assert_close(quantization_of(layer).weight_scale, 3 * before_scale)
    assert (share <= 1).all()
    for _ in range(300):
        model(10 * x)
    grown = quantization_of(layer).input_scale / before.input_scale
    assert 5 < grown < 12
    assert quantization_of(layer).input_dtype == torch.uint8


@pytest.mark.parametrize("scheme", ["symmetric", "mean-shift"])
def test_qat_trains_folds_and_converts(scheme: str) -> None:
    torch.manual_seed(1)
    model = randomize_norms(DigitsNet())
    y = torch.arange(60) % 10
    x = 0.2 * torch.rand(60, 1, 8, 8) + torch.rand(10, 1, 8, 8)[y]
    quantize(model, x, qat=True, scheme=scheme, correct_bias=True)
    assert type(model.conv1[1]) is nn.Identity and model.conv1[0].bias is not None
    optimiser = torch.optim.Adam(model.train().parameters(), lr=4e-3)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    fast = cnncomp.convert(model.eval(), x, measure=False)
    assert noise(fast(x), model(x)) < 1e-3
    assert torch.equal(fast.network.conv2.get_submodule("0").weight_int8(), integer_weight(model.conv2[0]))


def test_masks_stay_in_qat() -> None:
    model = quantize(prune(randomize_norms(DigitsNet()), 0.7), torch.rand(16, 1, 8, 8), qat=True).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(model(torch.rand(16, 1, 8, 8)), torch.arange(16) % 10).backward()
        optimiser.step()
    for m in (model.conv2[0], model.conv3[0], model.conv4[0]):
        assert (integer_weight(m) == 0)[~mask_of(m)].all() and integer_weight(m)[mask_of(m)].any()


def test_two_forwards_before_one_backward() -> None:
    model = quantize(DigitsNet(), torch.rand(16, 1, 8, 8), qat=True, scheme="mean-shift").train()
    (model(torch.rand(4, 1, 8, 8)) + model(torch.rand(4, 1, 8, 8))).sum().backward()
    assert model.conv1[0].parametrizations.weight.original.grad.abs().sum() > 0


# --- arguments ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "kl"}, "method: got 'kl', expected one of 'mse', 'minmax', 'percentile', 'entropy'"),
        ({"scheme": "affine"}, "scheme: got 'affine', expected one of 'symmetric', 'mean-shift'"),
        ({"rounding": "up"}, "rounding: got 'up'"),
        ({"equalize": True}, "equalize: got True, expected None or one of 'activations', 'weights'"),
        ({"float_budget": 1.5}, "float_budget: got 1.5, expected a number from 0 to 1"),
        ({"float_budget": "a"}, "float_budget: got 'a'"),
        ({"float_budget": None}, "float_budget: got None"),
    ],
)
def test_choices_are_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        quantize(ArticleNet(), torch.randn(2, 3, 32, 32), **arguments)  # type: ignore[arg-type]


def test_generators_are_enough_for_every_method() -> None:
    x = torch.rand(8, 1, 8, 8)
    arguments = {"equalize": "activations", "rounding": "adaptive", "correct_bias": True, "float_budget": 0.1}
    a = quantize(DigitsNet().eval(), (b for b in x.split(2)), **arguments)  # type: ignore[arg-type]
    assert quantization_of(a.conv2[0]) is not None
    with pytest.raises(CalibrationError, match="no batches"):
        quantize(DigitsNet(), iter(()), **arguments)  # type: ignore[arg-type]


def test_a_net_that_cannot_be_traced_is_quantised_without_links() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) if x.sum() > 0 else -self.a(x))

    with pytest.warns(UserWarning, match="can't be traced"):
        model = quantize(Net().eval(), torch.rand(2, 3, 9, 9), equalize="weights", correct_bias=True)
    assert quantization_of(model.b) is not None
