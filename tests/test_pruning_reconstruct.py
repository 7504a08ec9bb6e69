"""Reconstruction: the numbers against brute force, and networks that survive."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cnncomp.errors import ArgumentError, CalibrationError
from cnncomp.models import ConcatNet, mobilenet_v2
from cnncomp.pruning import mask_of, prune, sparsity_of
from cnncomp.pruning.moments import columns_of, from_columns, to_columns
from cnncomp.pruning.obs import Problem
from cnncomp.pruning.patterns import NM, Blocks
from cnncomp.quantization import quantize
from tests.helpers import randomize_norms


def correlated(g: int, d: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(g, d, d, generator=generator, dtype=torch.float64)
    return mix @ torch.randn(g, d, n, generator=generator, dtype=torch.float64)


def problem(x: Tensor, w: Tensor, free: Tensor | None = None, damping: float = 0.01) -> Problem:
    h = x @ x.transpose(1, 2)
    return Problem.of(w, h, h, torch.ones_like(w, dtype=torch.bool) if free is None else free, damping)


@settings(max_examples=20)
@given(st.data())
def test_columns_are_what_the_layer_multiplies(data: st.DataObject) -> None:
    draw = data.draw
    groups, cg, kg = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["zeros", "reflect", "circular"]))
    options = dict(stride=draw(st.integers(1, 2)), dilation=draw(st.integers(1, 2)), padding_mode=mode)
    options["padding"] = draw(st.sampled_from([0, 1, 2]))
    kind, image = draw(st.sampled_from([(nn.Conv2d, (7, 9)), (nn.Conv1d, (9,))]))
    layer = kind(groups * cg, groups * kg, draw(st.sampled_from([1, 3])), groups=groups, bias=False, **options)
    x = torch.randn(2, groups * cg, *image)
    columns = torch.cat(columns_of(layer, x), 2)
    weight = to_columns(layer.weight.detach(), groups)
    assert torch.equal(from_columns(weight, layer.weight.shape), layer.weight)
    y = layer(x).detach()
    got = (weight @ columns).reshape(groups * kg, 2, -1).transpose(0, 1).reshape(y.shape)
    torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-5)


def test_columns_with_padding_in_words_and_of_linear_layers() -> None:
    conv = nn.Conv2d(2, 3, 3, padding="same", bias=False)
    x = torch.randn(1, 2, 5, 6)
    got = to_columns(conv.weight.detach(), 1) @ torch.cat(columns_of(conv, x), 2)
    torch.testing.assert_close(got.view(1, 3, 5, 6), conv(x).detach())
    assert torch.equal(columns_of(conv, x[0])[0], columns_of(conv, x)[0])
    linear = nn.Linear(4, 3, bias=False)
    y = torch.randn(2, 5, 4)
    got = to_columns(linear.weight.detach(), 1) @ columns_of(linear, y)[0]
    torch.testing.assert_close(got[0].t().reshape(2, 5, 3), linear(y).detach())


def test_refine_is_least_squares_on_what_is_kept() -> None:
    x, w = correlated(2, 6, 40), torch.randn(2, 3, 6, dtype=torch.float64)
    keep = torch.rand(2, 3, 6) > 0.5
    p = problem(x, w)
    got = p.refine(torch.zeros_like(w), keep, 100)
    for g, r in itertools.product(range(2), range(3)):
        at = keep[g, r].nonzero().flatten()
        expected = torch.linalg.solve(p.hessian[g][at][:, at], p.linear[g, r, at])
        torch.testing.assert_close(got[g, r, at], expected, rtol=1e-3, atol=1e-4)
        assert not got[g, r][~keep[g, r]].any()


@pytest.mark.parametrize("pattern", [Blocks(), NM(2, 4), NM(1, 4), Blocks(1, 2), Blocks(2, 1), Blocks(2, 2)])
@pytest.mark.parametrize(("channels", "taps", "block"), [(8, 1, 128), (4, 3, 4), (6, 3, 4), (6, 2, 128)])
def test_beats_magnitude_and_keeps_to_the_pattern(pattern: Blocks | NM, channels: int, taps: int, block: int) -> None:
    d = channels * taps
    x, w = correlated(2, d, 200), torch.randn(2, 4, d, dtype=torch.float64)
    p = problem(x, w)
    v, keep = p.solve(pattern, channels, w.numel() // 2, block)
    grouped = w.abs().unflatten(2, (taps, channels)).transpose(2, 3)
    plain = pattern.keep(grouped) if isinstance(pattern, NM) else pattern.keep([grouped], w.numel() // 2)[0]
    plain = plain.transpose(2, 3).flatten(2)
    assert not v[~keep].any()
    zeros, wanted = int((~keep).sum()), int((~plain).sum())
    assert wanted - 4 * len(range(0, d, block)) <= zeros <= wanted  # blocks of a piece may not use up its share
    if not isinstance(pattern, Blocks) or pattern == Blocks():
        assert zeros == wanted
    units = keep.unflatten(2, (taps, channels))  # (G, R, T, C)
    if isinstance(pattern, NM):
        padded = F.pad(units.int(), (0, -channels % pattern.m)).unflatten(3, (-1, pattern.m))
        assert int(padded.sum(4).max()) <= pattern.n
    else:
        first = units[:, :: pattern.rows, :, :: pattern.cols]
        whole = first.repeat_interleave(pattern.rows, 1).repeat_interleave(pattern.cols, 3)[:, :, :, :channels]
        assert torch.equal(whole, units)
    assert p.loss(v) < p.loss(torch.where(plain, w, 0.0))
    assert p.loss(v) <= p.loss(p.refine(torch.where(keep, w, 0.0), keep, 200)) + 1e-6 * abs(p.loss(v))


@pytest.mark.parametrize(("channels", "taps"), [(8, 2), (6, 3)])
def test_the_sweep_does_not_depend_on_how_its_updates_are_put_together(channels: int, taps: int) -> None:
    x, w = correlated(2, channels * taps, 100), torch.randn(2, 3, channels * taps, dtype=torch.float64)
    p = problem(x, w)
    inverse = torch.linalg.inv(p.hessian)
    results = [p._sweep(w, inverse, NM(2, 4), channels, 0, block) for block in (1, 4, 9, 128)]
    for weight, keep in results[1:]:
        torch.testing.assert_close(weight, results[0][0])
        assert torch.equal(keep, results[0][1])
    # Each step is the surgeon's: with only the last columns left to move, they are least squares given the others.
    weight, keep = results[0]
    last = keep[:, :, -1]
    residual = (p.linear - weight @ p.hessian)[:, :, -1]
    torch.testing.assert_close(
        residual[last], torch.zeros_like(residual[last]), rtol=0, atol=1e-6 * float(p.linear.abs().max())
    )


@pytest.mark.parametrize("pattern", [Blocks(), NM(2, 4)])
def test_the_better_of_two_masks_is_taken(pattern: Blocks | NM) -> None:
    wins = 0
    for seed in range(8):
        x, w = correlated(1, 16, 100, seed), torch.randn(1, 8, 16, dtype=torch.float64)
        p = problem(x, w)
        v, _ = p.solve(pattern, 16, 64)
        swept = p._sweep(w, torch.linalg.inv(p.hessian), pattern, 16, 64, 128)[1]
        losses = [p.loss(p.refine(w * m, m, 200)) for m in (swept, p._alternate(w, pattern, 16, 64))]
        assert p.loss(v) <= min(losses) + 1e-6 * abs(min(losses))
        wins += losses[1] < losses[0]
    assert wins >= 6  # what the second way is there for


def test_close_to_the_best_of_all_masks() -> None:
    worse = []
    for seed in range(5):
        x, w = correlated(1, 8, 100, seed), torch.randn(1, 1, 8, dtype=torch.float64)
        p = problem(x, w)
        best = min(
            p.loss(p.refine(torch.zeros_like(w), mask, 100))
            for kept in itertools.combinations(range(8), 4)
            for mask in [torch.isin(torch.arange(8), torch.tensor(kept))[None, None]]
        )
        v, _ = p.solve(Blocks(), 8, 4)
        plain = w.where(w.abs() > w.abs().flatten().kthvalue(4).values, 0.0)
        floor = p.loss(torch.linalg.solve(p.hessian, p.linear.transpose(1, 2)).transpose(1, 2))
        worse.append((p.loss(v) - best) / (p.loss(plain) - floor))
    assert sum(worse) / len(worse) < 0.2


def test_what_is_masked_stays_masked_and_dead_inputs_do_no_harm() -> None:
    x, w = correlated(1, 8, 50), torch.randn(1, 4, 8, dtype=torch.float64)
    x[:, 3] = 0
    free = torch.rand(1, 4, 8) > 0.3
    v, keep = problem(x, w * free, free).solve(Blocks(), 8, 20)
    assert not (keep & ~free).any() and int((~keep).sum()) == 20 and torch.isfinite(v).all()
    v, keep = problem(0 * x, w).solve(NM(2, 4), 8, 0)
    torch.testing.assert_close(v, torch.where(keep, w, 0.0))  # nothing known of the inputs: plain magnitude
    assert torch.equal(keep[0], (w[0].abs().unflatten(1, (2, 4)).argsort(2).argsort(2) >= 2).flatten(1))


def smooth(seed: int, n: int = 32) -> Tensor:
    """Smooth random images (n, 1, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.randn(n, 1, 3, 3, generator=generator), size=(8, 8), mode="bilinear")


def error(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y = dense.eval()(x)
        return float((model.eval()(x) - y).square().sum() / (y - y.mean(0)).square().sum())


def small() -> nn.Sequential:
    """Three convolutions with norms, one of them grouped, and a linear layer, on (N, 1, 8, 8)."""
    return randomize_norms(nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(), nn.MaxPool2d(2),
        nn.Conv2d(24, 24, 3, groups=2), nn.BatchNorm2d(24), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(96, 10),
    )).eval()  # fmt: skip


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x4", "4x1"])
def test_a_network_survives_on_images_it_has_not_seen(pattern: str) -> None:
    dense = small()
    plain = prune(copy.deepcopy(dense), 0.5, pattern, scope="layer")
    data = list(smooth(0).split(16))
    model = prune(copy.deepcopy(dense), 0.5, pattern, scope="layer", data=data, reconstruct=True)
    assert error(model, dense, smooth(1)) < 0.4 * error(plain, dense, smooth(1))
    zeros = [(x.zeros, y.zeros) for x, y in zip(sparsity_of(model).layers, sparsity_of(plain).layers, strict=True)]
    assert all(abs(x - y) <= 0.02 * y for x, y in zeros) and sum(x for x, _ in zeros) > 0
    if pattern in ("unstructured", "2:4"):
        assert all(x == y for x, y in zeros)
    again = prune(copy.deepcopy(dense), 0.5, pattern, scope="layer", data=data, reconstruct=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_means_are_kept_by_biases_and_norms() -> None:
    dense = randomize_norms(nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3),
    )).eval()  # fmt: skip
    x = torch.randn(16, 3, 12, 12) + 1
    model = prune(copy.deepcopy(dense), 0.6, scope="layer", include_first_last=True, data=x, reconstruct=True)
    for stop in (1, 4, 6):  # behind each convolution, and behind the norm
        means = [net[:stop](x).mean((0, 2, 3)) for net in (model, dense)]
        torch.testing.assert_close(*means, rtol=1e-3, atol=1e-4)
    assert not torch.equal(model[3].running_mean, dense[3].running_mean)


def test_a_norm_behind_an_activation_in_place_is_not_taken_for_the_layers() -> None:
    dense = randomize_norms(nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(inplace=True), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1),
    )).eval()  # fmt: skip
    model = prune(copy.deepcopy(dense), 0.5, data=torch.randn(8, 3, 8, 8), reconstruct=True)
    assert torch.equal(model[3].running_mean, dense[3].running_mean)


def test_depthwise_layers_too() -> None:
    dense = randomize_norms(mobilenet_v2(10, width_mult=0.1)).eval()
    options = dict(scope="layer", include_depthwise=True)
    x = F.interpolate(torch.randn(24, 3, 6, 6), size=(48, 48), mode="bilinear")
    plain = prune(copy.deepcopy(dense), 0.4, **options)
    model = prune(copy.deepcopy(dense), 0.4, **options, data=x[:16].split(8), reconstruct=True)
    depthwise = model.features[3].conv[1][0]
    assert int((~mask_of(depthwise)).sum()) == round(0.4 * depthwise.weight.numel())
    assert error(model, dense, x[16:]) < 0.5 * error(plain, dense, x[16:])


class Untraceable(nn.Module):
    """One layer that is called twice, and a branch on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        self.other = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.twice(x).relu()
        x = self.twice(x) if float(x.detach().sum()) > -1e9 else self.other(x)
        return self.last(self.other(x).relu())


def test_a_network_that_cannot_be_traced_and_layers_called_twice() -> None:
    dense = Untraceable().eval()
    x = torch.randn(16, 3, 10, 10)
    plain = prune(copy.deepcopy(dense), 0.5, scope="layer")
    model = prune(copy.deepcopy(dense), 0.5, scope="layer", data=[(x[:8], None), (x[8:], None)], reconstruct=True)
    assert error(model, dense, torch.randn(8, 3, 10, 10)) < 0.6 * error(plain, dense, torch.randn(8, 3, 10, 10))


def test_walking_and_running_anew_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, x = ConcatNet().eval(), torch.randn(8, 3, 12, 12)
    models = []
    for traced in (True, False):
        if not traced:
            monkeypatch.setattr("cnncomp.pruning.walk.graph_of", lambda *_: None)
        models.append(prune(copy.deepcopy(dense), 0.5, data=x.split(4), reconstruct=True, scope="layer"))
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x))


def test_layers_that_are_not_reached_stay_as_they_are() -> None:
    model = Unused()
    with pytest.warns(UserWarning, match="never reached stay as they are: b"):
        prune(model, 0.5, include_first_last=True, data=torch.randn(8, 4), reconstruct=True)
    assert mask_of(model.b) is None and mask_of(model.a) is not None


def test_shared_weights_and_training_afterwards() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    model[4].weight = model[2].weight
    prune(model, 0.5, data=torch.randn(32, 8), reconstruct=True)
    assert mask_of(model[2]) is mask_of(model[4]) and torch.equal(model[2].weight, model[4].weight)
    zeros = model[2].weight == 0
    assert int(zeros.sum()) == 32
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.randn(4, 8)).square().sum().backward()
    optimiser.step()
    assert torch.equal(model[2].weight == 0, zeros)


def test_errors_leave_the_model_as_it_was() -> None:
    model = small().train()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match="data: got None"):
        prune(model, 0.5, reconstruct=True)
    with pytest.raises(CalibrationError, match="no batches"):
        prune(model, 0.5, data=[], reconstruct=True)
    with pytest.raises(CalibrationError, match="batch 1: NaN"):
        prune(model, 0.5, data=[smooth(0), smooth(0) * float("nan")], reconstruct=True)
    with pytest.raises(CalibrationError, match="got str"):
        prune(model, 0.5, data="images", reconstruct=True)
    assert model.training and list(state) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    with pytest.raises(ArgumentError, match="quantised already"):
        prune(quantize(model, smooth(0)), 0.5, data=smooth(0), reconstruct=True)
    with pytest.raises(ArgumentError, match="'0', which sums 8,193 products"):
        prune(
            nn.Sequential(nn.Linear(8193, 1)), 0.5, data=torch.ones(2, 8193), reconstruct=True, include_first_last=True
        )
