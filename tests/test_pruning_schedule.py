"""Schedules: what is pruned when, and what RigL lets grow."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnncomp.errors import ArgumentError, PatternError
from cnncomp.models import ArticleNet
from cnncomp.pruning import GradualCubic, Mask, OneShot, RigL, mask_of, prune, sparsity_of


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 16, 3),
    )  # fmt: skip


def iterate(model: nn.Module, optimiser: torch.optim.Optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 2, 8, 8, generator=generator), torch.randint(0, 3, (16,), generator=generator)
    optimiser.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimiser.step()


def masks(model: nn.Module) -> list[Tensor]:
    return [m.mask.clone() for m in model.modules() if isinstance(m, Mask)]


def zeros(model: nn.Module) -> int:
    return sum(int((~m).sum()) for m in masks(model))


def test_one_shot() -> None:
    model = net()
    schedule = OneShot(model, 0.5, at=2, include_first_last=True)
    done = [schedule.step(i) for i in range(5)]
    assert done == [False, False, True, False, False]
    assert zeros(model) == round(0.5 * sparsity_of(model).numel)
    model = net()
    OneShot(model, pattern="2:4").step(0)
    assert sparsity_of(model).layers[2].sparsity == 0.5


def test_gradual_cubic_follows_the_formula() -> None:
    model = net()
    schedule = GradualCubic(model, 0.8, begin=10, end=55, every=10, initial=0.2, include_first_last=True)
    numel, seen = sparsity_of(model).numel, {}
    for i in range(80):
        before = masks(model)
        if schedule.step(i):
            seen[i] = zeros(model)
        assert all(not (new & ~old).any() for new, old in zip(masks(model), before, strict=True))
    expected = {i: round((0.8 - 0.6 * (1 - (i - 10) / 45) ** 3) * numel) for i in (10, 20, 30, 40, 50)}
    assert seen == {**expected, 55: round(0.8 * numel)}
    assert schedule.sparsity(9) == 0 and schedule.sparsity(10) == pytest.approx(0.2) and schedule.sparsity(99) == 0.8


def test_gradual_goes_on_from_a_checkpoint() -> None:
    torch.manual_seed(3)
    models = []
    for stop in (None, 7):
        torch.manual_seed(3)
        model = net()
        schedule = GradualCubic(model, 0.8, begin=2, end=12, every=2)
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        for i in range(15):
            iterate(model, optimiser, i)
            schedule.step(i)
            if i == stop:
                saved = copy.deepcopy((model.state_dict(), optimiser.state_dict()))
                model = net()
                schedule = GradualCubic(model, 0.8, begin=2, end=12, every=2)
                optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
                model.load_state_dict(saved[0])
                optimiser.load_state_dict(saved[1])
        models.append(model)
    states = [m.state_dict() for m in models]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("pattern", ["unstructured", "2x1", "1x3"])
def test_rigl_exchanges_within_layers(pattern: str) -> None:
    model = net()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rigl = RigL(model, 0.5, end=9, every=3, optimizer=optimiser, pattern=pattern)
    start, changed = masks(model), []
    for i in range(12):
        old = masks(model)
        iterate(model, optimiser, i)
        if rigl.step(i):
            changed.append(i)
            assert any(not torch.equal(a, b) for a, b in zip(old, masks(model), strict=True))
        for m in model.modules():
            if mask_of(m) is not None:
                assert not m.weight[~mask_of(m)].any()
    assert changed == [3, 6]
    for a, b in zip(start, masks(model), strict=True):
        if pattern == "1x3":  # 4 input channels in a group: the last block is smaller
            assert int(a.sum()) - 8 <= int(b.sum()) <= int(a.sum())
        else:
            assert int(a.sum()) == int(b.sum())


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients() -> None:
    model = net()
    rigl = RigL(model, 0.6, end=100, every=4, fraction=0.4)
    x, y = torch.randn(16, 2, 8, 8), torch.randint(0, 3, (16,))
    layer = model[2]
    for i in range(4):  # none of their gradients may count
        (1e3 * model(x).sum()).backward()
        assert rigl.step(i) is False
    dense = copy.deepcopy(model)
    plain = dense[2].weight.detach().clone().requires_grad_()
    out = dense[5](dense[4](dense[3](F.conv2d(dense[1](dense[0](x)), plain, dense[2].bias, groups=2))))
    gradient = torch.autograd.grad(F.cross_entropy(dense[7](dense[6](out)), y), plain)[0].flatten()
    weight, old = layer.weight.detach().flatten().clone(), mask_of(layer).flatten().clone()
    for part in (slice(0, 8), slice(8, 16)):  # two backward passes are summed
        (0.5 * F.cross_entropy(model(x[part]), y[part])).backward()
    layer.parametrizations.weight.original.data[~mask_of(layer)] = 7.0  # what momentum may leave under a mask
    assert rigl.step(4)
    count = int(0.4 / 2 * (1 + math.cos(math.pi * 4 / 100)) * int(old.sum()))
    order = weight.abs().masked_fill(~old, math.inf).argsort()
    kept = old.clone()
    kept[order[:count]] = False
    grown = gradient.abs().masked_fill(kept, -1).argsort(descending=True)[:count]
    expected = kept.clone()
    expected[grown] = True
    new = mask_of(layer).flatten()
    assert count > 2 and torch.equal(new, expected)
    assert not layer.weight.flatten()[new & ~old].any()  # what grows starts at zero
    stayed = new & old
    assert torch.equal(layer.weight.detach().flatten()[stayed], weight[stayed])


def test_rigl_clears_the_optimisers_state_and_counts_no_old_gradients() -> None:
    model = net()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    rigl = RigL(model, 0.5, end=100, every=2, optimizer=optimiser)
    for i in range(2):
        iterate(model, optimiser, i)
        rigl.step(i)
    old = mask_of(model[2]).clone()
    iterate(model, optimiser, 2)
    rigl.step(2)
    new, parameter = mask_of(model[2]), model[2].parametrizations.weight.original
    state = optimiser.state[parameter]["exp_avg_sq"]
    assert not state[new != old].any() and state[new & old].any()
    assert all(m.gradient is None for m in model.modules() if isinstance(m, Mask))


def test_rigl_takes_pruned_models_as_they_are_and_copies() -> None:
    model = prune(net(), 0.7)
    before = masks(model)
    RigL(model, 0.5, every=1, end=10)
    assert all(torch.equal(a, b) for a, b in zip(before, masks(model), strict=True))
    clone = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(before, masks(clone), strict=True))
    plain = sparsity_of(prune(ArticleNet(), 0.8, allocation="erdos-renyi-kernel", include_first_last=True))
    rigl = RigL(ArticleNet(), 0.8, include_first_last=True)
    assert [x.zeros for x in plain.layers] == [x.zeros for x in sparsity_of(rigl.model).layers]


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="at: got -1"):
        OneShot(net(), 0.5, at=-1)
    with pytest.raises(ArgumentError, match="end: got 5, expected an integer from 10 on"):
        GradualCubic(net(), 0.5, begin=10, end=5)
    with pytest.raises(ArgumentError, match="initial: got 0.6"):
        GradualCubic(net(), 0.5, initial=0.6)
    with pytest.raises(ArgumentError, match="every: got 0"):
        GradualCubic(net(), 0.5, every=0)
    with pytest.raises(PatternError, match="OneShot"):
        GradualCubic(net(), 0.5, pattern="2:4")
    with pytest.raises(PatternError, match="'2:4'"):
        RigL(net(), pattern="2:4")
    with pytest.raises(ArgumentError, match="fraction: got 2"):
        RigL(net(), 0.5, fraction=2)
    rigl = RigL(net(), 0.5, end=10, every=1)
    with pytest.raises(ArgumentError, match=r"step\(\) after backward"):
        rigl.step(1)
