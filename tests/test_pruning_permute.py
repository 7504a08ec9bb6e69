"""Channel permutation: the search against brute force, and networks that compute what they did."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cnncomp.errors import ArgumentError, PatternError
from cnncomp.models import ConcatNet, DigitsNet, mobilenet_v2
from cnncomp.models.resnet import BasicBlock
from cnncomp.pruning import mask_of, permute_channels, prune, sparsity_of, targets_of
from cnncomp.pruning.patterns import NM
from cnncomp.pruning.permute import find_order
from cnncomp.quantization import quantize
from tests.helpers import randomize_norms


def kept(score: Tensor, n: int, m: int) -> float:
    padded = nn.functional.pad(score, (0, -score.shape[1] % m))
    return float(padded.unflatten(1, (-1, m)).topk(n, 2).values.sum())


@given(
    channels=st.integers(1, 20), rows=st.integers(1, 12), nm=st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_order_is_one_and_no_single_swap_gains(channels: int, rows: int, nm: tuple[int, int], seed: int) -> None:
    score = torch.rand(rows, channels, generator=torch.Generator().manual_seed(seed)) ** 4
    order, before, after = find_order(score, NM(*nm))
    assert order.sort().values.tolist() == list(range(channels))
    assert before == pytest.approx(kept(score, *nm), rel=1e-5)
    assert after == pytest.approx(kept(score[:, order], *nm), rel=1e-5) and after >= before * (1 - 1e-6)
    for i, j in itertools.combinations(range(channels), 2):
        swapped = order.clone()
        swapped[[i, j]] = order[[j, i]]
        assert kept(score[:, swapped], *nm) <= after * (1 + 1e-5)


def test_an_order_that_keeps_all_is_found() -> None:
    # Two channels of magnitude 1 belong into each group of four, four of them come first.
    score = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]).repeat(3, 1)
    order, before, after = find_order(score, NM(2, 4))
    assert (before, after) == (6.0, 12.0)
    assert score[0, order].view(2, 4).sum(1).tolist() == [2.0, 2.0]


def test_close_to_the_best_of_all_orders() -> None:
    worse = []
    for seed in range(4):
        score = torch.rand(6, 8, generator=torch.Generator().manual_seed(seed)) ** 3
        best = max(
            kept(score[:, [*first, *(c for c in range(8) if c not in first)]], 2, 4)
            for first in itertools.combinations(range(8), 4)
        )
        _, before, after = find_order(score, NM(2, 4))
        worse.append((best - after) / (best - before))
    assert sum(worse) / 4 < 0.35


def no_sums(c: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, c, 3), nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.Conv2d(c, c, 3, groups=c), nn.PReLU(),
        nn.Conv2d(c, c, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, c), nn.BatchNorm1d(c),
        nn.Dropout(), nn.Linear(c, 4),
    )  # fmt: skip


def residual() -> nn.Sequential:
    shortcut = nn.Sequential(nn.Conv2d(16, 24, 1, 2, bias=False), nn.BatchNorm2d(24))
    blocks = BasicBlock(16, 16, 1, None), BasicBlock(16, 24, 2, shortcut), BasicBlock(24, 24, 1, None)
    return nn.Sequential(nn.Conv2d(3, 16, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))


NETWORKS = {
    "digits": (DigitsNet, (1, 8, 8), {"conv2.0", "conv3.0", "conv4.0"}),  # a sum over a shortcut
    "concat": (ConcatNet, (3, 16, 16), {"narrow", "wide", "merge"}),  # merge reads a concatenation
    "mobilenet": (lambda: mobilenet_v2(10, 0.1), (3, 32, 32), None),  # depthwise layers and sums
    "residual": (residual, (3, 16, 16), None),
    "chain": (lambda: no_sums(12), (3, 12, 12), {"5", "9"}),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("masked", [False, True])
def test_networks_compute_the_same(name: str, masked: bool) -> None:
    make, shape, expected = NETWORKS[name]
    model = randomize_norms(make()).eval()
    if masked:
        prune(model, 0.5, include_first_last=True, include_depthwise=True)
    x = torch.randn(4, *shape)
    with torch.no_grad():
        y = model(x)
    targets = targets_of(model)
    before = prune_kept(model)
    zeros = sparsity_of(model).zeros
    found = permute_channels(model, targets, "2:4", (x,))
    with torch.no_grad():
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
    names = {layer for p in found for layer in p.layers}
    assert names == expected if expected is not None else len(names) >= len(targets) - 2
    assert sparsity_of(model).zeros == zeros
    gained = sum(p.kept - p.kept_before for p in found)
    assert gained > 0 and prune_kept(model) - before == pytest.approx(gained, rel=1e-2)


def prune_kept(model: nn.Module) -> float:
    """The magnitude that 2:4 keeps in all layers but the first and last."""
    pruned = prune(copy.deepcopy(model), pattern="2:4")
    return sum(float(t.value.abs().sum()) for t in targets_of(pruned))


class Odd(nn.Module):
    """Channels that something else reads: an output, a view, a constant, the weight itself, a second call."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.offset = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.a(x)
        if self.kind == "output":
            return self.c(self.b(x)), x
        if self.kind == "view":
            return self.c(self.b(x).view(x.shape[0], 8, -1)[..., None])
        if self.kind == "constant":
            return self.c(self.b(x + self.offset))
        if self.kind == "weight":
            return self.c(nn.functional.conv2d(x, self.b.weight) + self.b(x))
        if self.kind == "half":
            return self.c(self.b(x)[:, torch.arange(7, -1, -1)])
        if self.kind == "mean":
            return self.c(self.b(x) - x.mean(1, keepdim=True))
        return self.c(self.b(self.b(x)))


@pytest.mark.parametrize(
    ("kind", "movable"),
    [("output", "c"), ("view", "b"), ("constant", "c"), ("weight", ""), ("half", "b"), ("mean", "c"), ("twice", "bc")],
)
def test_what_something_else_reads_stays_in_order(kind: str, movable: str) -> None:
    model = Odd(kind).eval()
    x = torch.randn(2, 3, 4, 4)
    y = model(x)
    found = permute_channels(model, targets_of(model, include_first_last=True), "1:4", (x,))
    assert {name for p in found for name in p.layers} == set(movable)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_prune_permutes_first_and_says_so() -> None:
    dense = randomize_norms(DigitsNet()).eval()
    x = torch.randn(8, 1, 8, 8)
    plain = prune(copy.deepcopy(dense), pattern="2:4")
    model = prune(copy.deepcopy(dense), pattern="2:4", permute=True, data=[x])
    assert sparsity_of(model).zeros == sparsity_of(plain).zeros
    kept_in = [sum(float(t.value.abs().sum()) for t in targets_of(net)) for net in (model, plain)]
    assert kept_in[0] > 1.005 * kept_in[1]
    assert "masked 2:4: input channels permuted" in str(sparsity_of(model))
    assert mask_of(model.conv3[0]).reshape(64, 16, 4, 9).sum(2).unique().tolist() == [2]
    again = prune(copy.deepcopy(dense), pattern="2:4", permute=True, data=[x])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_errors() -> None:
    x = torch.randn(1, 1, 8, 8)
    with pytest.raises(ArgumentError, match="data: got None"):
        prune(DigitsNet(), pattern="2:4", permute=True)
    with pytest.raises(ArgumentError, match="scores would not follow"):
        prune(DigitsNet(), pattern="2:4", permute=True, data=x, scores={})
    with pytest.raises(PatternError, match="n:m pattern, which an order"):
        prune(DigitsNet(), pattern="1x4", permute=True, data=x)
    quantized = quantize(DigitsNet(), torch.randn(4, 1, 8, 8))
    assert permute_channels(quantized, targets_of(quantized), "2:4", (x,)) == []
