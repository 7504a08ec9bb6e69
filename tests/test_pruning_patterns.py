"""Patterns, criteria and allocations of prune."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cnncomp.errors import ArgumentError, CalibrationError, PatternError
from cnncomp.models import ArticleNet
from cnncomp.pruning import mask_of, parse_pattern, prune, remove_masks, score_targets, sparsity_of, targets_of
from cnncomp.pruning.allocation import by_sensitivity, erdos_renyi, sensitivity_of
from cnncomp.pruning.patterns import NM, VNM, Blocks, grouped
from cnncomp.sparsity.vnm import first_violation_vnm

shapes = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 9), st.integers(1, 4))


def tied(shape: tuple[int, ...], seed: int) -> Tensor:
    """Scores with few distinct values."""
    return torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def blocks_of(shape: tuple[int, ...], rows: int, cols: int) -> list[tuple[slice, ...]]:
    g, kg, cg, t = shape
    return [
        (slice(a, a + 1), slice(b, b + rows), slice(c, c + cols), slice(d, d + 1))
        for a in range(g) for b in range(0, kg, rows) for c in range(0, cg, cols) for d in range(t)
    ]  # fmt: skip


@given(shape=shapes, rows=st.integers(1, 4), cols=st.integers(1, 4), sparsity=st.floats(0, 1), seed=st.integers(0, 99))
def test_blocks_go_together_the_lowest_first(
    shape: tuple[int, int, int, int], rows: int, cols: int, sparsity: float, seed: int
) -> None:
    score = tied(shape, seed)
    zeros = round(sparsity * score.numel())
    keep = Blocks(rows, cols).keep([score], zeros)[0]
    expected, budget = torch.ones_like(keep), zeros
    for block in sorted(blocks_of(shape, rows, cols), key=lambda b: float(score[b].mean())):  # stable
        if score[block].numel() > budget:
            break
        expected[block] = False
        budget -= score[block].numel()
    assert torch.equal(keep, expected)


@given(shape=shapes, m=st.integers(2, 6), n=st.integers(1, 5), seed=st.integers(0, 99))
def test_n_of_m_along_input_channels(shape: tuple[int, int, int, int], m: int, n: int, seed: int) -> None:
    n = min(n, m - 1)
    score = tied(shape, seed)
    keep = NM(n, m).keep(score)
    expected = torch.ones_like(keep)
    g, kg, cg, t = shape
    for a, b, d in torch.cartesian_prod(torch.arange(g), torch.arange(kg), torch.arange(t)).tolist():
        for c in range(0, cg, m):
            channels = list(range(c, min(c + m, cg)))
            excess = max(0, len(channels) - n)
            for i in sorted(channels, key=lambda i: float(score[a, b, i, d]))[:excess]:
                expected[a, b, i, d] = False
    assert torch.equal(keep, expected)


@given(shape=shapes, v=st.integers(1, 8), m=st.integers(5, 9), seed=st.integers(0, 99))
def test_two_of_four_shared_columns(shape: tuple[int, int, int, int], v: int, m: int, seed: int) -> None:
    """The columns of the largest sums, and of each row the two largest in them."""
    g, kg, cg, t = shape
    score = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    keep = VNM(2, m, v).keep(score)
    for a, k0, c0, d in torch.cartesian_prod(
        *(torch.arange(0, n, s) for n, s in zip(shape, (1, v, m, 1), strict=True))
    ).tolist():
        block = score[a, k0 : k0 + v, c0 : c0 + m, d]
        columns = block.sum(0).argsort(descending=True)[:4]
        best = torch.zeros_like(block, dtype=torch.bool)
        for row in range(len(block)):
            best[row, columns[block[row, columns].argsort(descending=True)[:2]]] = True
        assert torch.equal(keep[a, k0 : k0 + v, c0 : c0 + m, d], best)


@pytest.mark.parametrize("reconstruct", [False, True])
def test_vnm_in_layers(reconstruct: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(24, 20, 3, groups=2), nn.Conv2d(20, 10, 1), nn.Flatten(), nn.Linear(10, 6))
    data = [torch.randn(8, 24, 3, 3)] if reconstruct else None
    prune(model, pattern="8:2:6", include_first_last=True, reconstruct=reconstruct, data=data)
    for i, groups in ((0, 2), (1, 1), (3, 1)):
        weight = model[i].weight.detach()
        weight = weight if weight.dim() == 4 else weight[..., None, None]
        assert first_violation_vnm(weight, 8, 6, groups) is None and weight.count_nonzero() > weight.numel() // 5
    assert sparsity_of(model).layers[0].remark == "masked 8:2:6: last 2 output channels share theirs"
    with pytest.raises(ArgumentError, match="expected None or 0.6667, which pattern '8:2:6' gives"):
        prune(model, 0.5, "8:2:6")


@given(
    shape=shapes,
    pattern=st.sampled_from(["unstructured", "2:4", "3:2:5", "1x3", "3x1", "2x2"]),
    seed=st.integers(0, 99),
)
def test_what_is_masked_stays_masked(shape: tuple[int, int, int, int], pattern: str, seed: int) -> None:
    score, parsed = tied(shape, seed), parse_pattern(pattern)
    masked = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    score = score.masked_fill(masked, -1.0)
    if isinstance(parsed, NM):
        keep = parsed.keep(score)
    else:
        zeros = int(masked.sum()) + (score.numel() - int(masked.sum())) // 2
        keep = parsed.keep([score], zeros)[0]
        left = int((~keep).sum())
        assert zeros - parsed.rows * parsed.cols < left <= zeros
    assert not (keep & masked).any()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("pattern", "block"), [("1x4", (1, 4)), ("4x1", (4, 1)), ("block4x8", (4, 8)), ("2x2", (2, 2))]
)
def test_blocks_in_layers(pattern: str, block: tuple[int, int], groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=groups), nn.Conv1d(16, 16, 3, groups=groups), nn.Linear(16, 16))
    prune(model, 0.5, pattern, include_first_last=True, scope="layer")
    for layer in model:
        rows, cols = block
        keep = grouped(mask_of(layer), getattr(layer, "groups", 1))
        sums = keep.float().unfold(1, rows, rows).unfold(2, cols, cols).sum((-1, -2))
        assert set(sums.unique().tolist()) == {0.0, float(rows * cols)}
        assert keep.float().mean() == 0.5
    assert [x.remark for x in sparsity_of(model).layers] == [f"masked {rows}x{cols}"] * 3


def test_patterns_that_do_not_fit_are_padded_or_left_dense_and_said_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 10, 1), nn.Linear(8, 4))
    prune(model, pattern="2:4", include_first_last=True, include_depthwise=True)
    rows = {x.name: x for x in sparsity_of(model).layers}
    assert [rows[n].zeros for n in "0123"] == [6 * 9, 0, 10 * 2, 16]
    assert rows["0"].note == "last 3 input channels as if padded to 4"
    assert rows["1"].note == "left dense, 1 input channel per group"
    assert rows["2"].note == "last 2 input channels as if padded to 4" and rows["3"].note == ""
    assert "masked 2:4: left dense, 1 input channel per group" in str(sparsity_of(model))
    model = prune(nn.Sequential(nn.Linear(5, 7)), 0.5, "block4x4", include_first_last=True)
    assert (
        sparsity_of(model).layers[0].note == "blocks at the edge have 3 of 4 output channels and 1 of 4 input channels"
    )


@pytest.mark.parametrize("pattern", ["2:4", "1x4", "4x1"])
def test_patterns_survive_training_and_copies(pattern: str) -> None:
    model = prune(
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 8)), pattern=pattern, include_first_last=True
    )
    clone = copy.deepcopy(model)
    assert str(sparsity_of(clone)) == str(sparsity_of(model))
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model(torch.randn(4, 8, 3, 3)).square().sum().backward()
        optimiser.step()
    masks = [mask_of(model[i]) for i in (0, 2)]
    assert all(torch.equal(model[i].weight != 0, mask) for i, mask in zip((0, 2), masks, strict=True))
    clone.load_state_dict(model.state_dict())
    assert torch.equal(clone[0].weight, model[0].weight)
    before = [m.clone() for m in masks]
    prune(model, pattern=pattern, include_first_last=True)  # again: nothing left to do
    assert all(torch.equal(a, mask_of(model[i])) for a, i in zip(before, (0, 2), strict=True))
    zeros = sparsity_of(model).zeros
    assert sparsity_of(remove_masks(model)).zeros == zeros > 0


@pytest.mark.parametrize(
    "pattern", ["2:2", "3:2", "0:4", "2:4:8", "0:2:8", "64:2:4", "64:3:8", "0x4", "x4", "4x", "channels", "", None, 3]
)
def test_unknown_patterns(pattern: object) -> None:
    with pytest.raises(PatternError, match="expected one of 'unstructured', 'n:m'"):
        prune(ArticleNet(), 0.5, pattern=pattern)  # type: ignore[arg-type]


def test_the_sparsity_of_n_m_is_its_own() -> None:
    assert sparsity_of(prune(ArticleNet(), 0.75, "1:4", exclude="features.3", include_first_last=True)).zeros > 0
    with pytest.raises(ArgumentError, match="sparsity: got 0.6, expected None or 0.5, which pattern '2:4' gives"):
        prune(ArticleNet(), 0.6, "2:4")
    with pytest.raises(ArgumentError, match="gives each layer the same"):
        prune(ArticleNet(), pattern="2:4", allocation="erdos-renyi")


# Criteria


def tiny() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 4)).eval()


def labelled(n: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 5), torch.randint(0, 4, (n,))) for _ in range(3)]


def gradient(model: nn.Sequential, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(F.cross_entropy(model(x), y), [model[0].weight, model[3].weight]))


def test_criteria_are_their_formulas() -> None:
    model, data = tiny(), labelled()
    weights = [model[0].weight.detach(), model[3].weight.detach()]
    targets = targets_of(model, include_first_last=True)
    batch = [gradient(model, x, y) for x, y in data]
    single = [gradient(model, x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(x))]
    for i, w in enumerate(weights):
        expected = {
            "magnitude": w.abs(),
            "taylor": sum((w * g[i]).abs() for g in batch) / 3,
            "fisher": w**2 / 2 * sum(g[i] ** 2 for g in single) / 18,
            "article": (w * sum(g[i] for g in batch) / 3).abs(),
        }
        for criterion, score in expected.items():
            model.train()
            got = score_targets(targets, model, criterion, data)[i]
            assert model.training
            torch.testing.assert_close(got, score, rtol=1e-4, atol=1e-8)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "article"])
def test_prune_by_gradients(criterion: str) -> None:
    model, data = tiny(), labelled()
    scores = score_targets(targets_of(model, include_first_last=True), model, criterion, data)
    prune(model, 0.5, criterion=criterion, data=iter(data), include_first_last=True)
    flat = torch.cat([s.flatten() for s in scores])
    keep = torch.cat([mask_of(model[i]).flatten() for i in (0, 3)])
    assert int((~keep).sum()) == 27 and flat[keep].min() >= flat[~keep].max()


def test_without_labels_the_models_own_class_counts() -> None:
    model, (x, _) = tiny(), labelled()[0]
    targets = targets_of(model, include_first_last=True)
    own = score_targets(targets, model, "taylor", [x])
    assert torch.equal(own[0], score_targets(targets, model, "taylor", [(x, model(x).argmax(1))])[0])
    squares = score_targets(targets, model, "taylor", [x], lambda out, batch: out.square().mean() * batch.sum())[0]
    g = torch.autograd.grad(model(x).square().mean() * x.sum(), model[0].weight)[0]
    torch.testing.assert_close(squares, (model[0].weight * g).abs().detach())


def test_zero_gradients_fall_back_to_magnitude_and_frozen_weights_count() -> None:
    model, data = tiny(), labelled()
    model[3].weight.requires_grad_(False)
    targets = targets_of(model, include_first_last=True)
    zero = score_targets(targets, model, "fisher", data, lambda out, batch: 0 * out.sum())
    assert all(torch.equal(s, t.value.abs()) for s, t in zip(zero, targets, strict=True))
    assert score_targets(targets, model, "taylor", data)[1].any() and not model[3].weight.requires_grad


def test_given_scores() -> None:
    model = tiny()
    scores = {"0": -torch.arange(30.0).view(6, 5), "3": torch.full((4, 6), 1.0)}
    prune(model, 10 / 54, scores=scores, include_first_last=True)
    assert torch.equal(mask_of(model[0]).flatten(), torch.arange(30) < 20) and mask_of(model[3]).all()
    with pytest.raises(ArgumentError, match="scores: got nothing for layer '3', expected a tensor of shape"):
        prune(tiny(), 0.5, scores={"0": scores["0"]}, include_first_last=True)
    with pytest.raises(ArgumentError, match=r"scores: got shape \(2,\) for layer '0'"):
        prune(tiny(), 0.5, scores={"0": torch.ones(2)}, include_first_last=True)
    with pytest.raises(ArgumentError, match="NaN or infinity for layer '0'"):
        prune(tiny(), 0.5, scores={"0": scores["0"] * float("nan")}, include_first_last=True)


def test_bad_data_and_losses_leave_the_model_as_it_was() -> None:
    model, data = tiny(), labelled()
    options = dict(include_first_last=True, criterion="taylor")
    with pytest.raises(ArgumentError, match="criterion: got 'luck'"):
        prune(model, 0.5, criterion="luck", include_first_last=True)
    with pytest.raises(ArgumentError, match="data: got None, expected batches to take gradients on"):
        prune(model, 0.5, **options)
    with pytest.raises(CalibrationError, match="no batches"):
        prune(model, 0.5, data=[], **options)
    with pytest.raises(CalibrationError, match="batch 0: got str"):
        prune(model, 0.5, data=["a"], **options)
    with pytest.raises(ArgumentError, match=r"loss: got shape \(6, 4\) for batch 0, expected a scalar"):
        prune(model, 0.5, data=data, loss=lambda out, batch: out, **options)
    with pytest.raises(ArgumentError, match="loss: got nan for batch 0"):
        prune(model, 0.5, data=data, loss=lambda out, batch: out.sum() * float("nan"), **options)
    with pytest.raises(ArgumentError, match="no label per image"):
        prune(model, 0.5, data=[(data[0][0], data[0][1][:2])], **options)
    assert mask_of(model[0]) is None


# Allocations


def kept(model: nn.Module) -> list[int]:
    return [x.numel - x.zeros for x in sparsity_of(model).layers]


@pytest.mark.parametrize("allocation", ["erdos-renyi", "erdos-renyi-kernel"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9, 0.99])
def test_erdos_renyi(allocation: str, sparsity: float) -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 1), nn.Conv1d(32, 48, 5, groups=2), nn.Linear(48, 64), nn.Linear(64, 10)
    )
    targets = targets_of(model, include_first_last=True)
    zeros = erdos_renyi(targets, sparsity, kernel=allocation.endswith("kernel"))
    sizes = [t.numel for t in targets]
    assert sum(zeros) == round(sparsity * sum(sizes))
    ratios = []
    for t, z in zip(targets, zeros, strict=True):
        assert 0 <= z <= t.numel
        k, c, *window = t.parameter.shape
        density = (k + c + sum(window)) / t.numel if allocation.endswith("kernel") else (k + c) / (k * c)
        if z > 0:
            ratios.append(((t.numel - z) / t.numel / density, 1 / t.numel / density))
    scale = ratios[-1][0]
    assert all(abs(r - scale) <= 2 * grain + 2 * ratios[-1][1] for r, grain in ratios)
    assert len(ratios) == len(sizes) if sparsity == 0.99 else True
    prune(model, sparsity, allocation=allocation, include_first_last=True)
    assert [x.zeros for x in sparsity_of(model).layers] == zeros


def test_explicit_sparsities() -> None:
    model = prune(ArticleNet(), 0.5, allocation={"features.3": 0.9}, include_first_last=True)
    assert kept(model) == [864, round(0.1 * 64 * 128 * 9), 640]
    with pytest.raises(ArgumentError, match="allocation: got 'feature.3', expected names of layers"):
        prune(ArticleNet(), 0.5, allocation={"feature.3": 0.9}, include_first_last=True)
    with pytest.raises(ArgumentError, match="allocation: got 2 for layer"):
        prune(ArticleNet(), 0.5, allocation={"features.3": 2}, include_first_last=True)
    with pytest.raises(ArgumentError, match="allocation: got 'fair', expected one of 'global'"):
        prune(ArticleNet(), 0.5, allocation="fair")


def test_sensitivity_prunes_most_where_it_costs_least() -> None:
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4)
    )
    with torch.no_grad():
        model[4].weight.copy_(torch.eye(16) + 1e-4 * torch.randn(16, 16))  # all but the diagonal does nothing
    state = copy.deepcopy(model.state_dict())
    data = [(torch.randn(32, 8), torch.zeros(32))]
    pruned = prune(copy.deepcopy(model), 0.45, allocation="sensitivity", data=data)
    zeros = {x.name: x.zeros for x in sparsity_of(pruned).layers}
    assert zeros["2"] + zeros["4"] == round(0.45 * 512) and zeros["4"] > 4 * zeros["2"]
    errors = sensitivity_of(targets_of(model), model, data, lambda i, z: torch.ones(16, 16, dtype=torch.bool))
    assert errors == [[0.0] * 8] * 2  # a mask that keeps all changes nothing
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    with pytest.raises(ArgumentError, match="which allocation 'sensitivity' needs"):
        prune(model, 0.5, allocation="sensitivity")
    with pytest.raises(CalibrationError, match="no batches"):
        prune(model, 0.5, allocation="sensitivity", data=[])


@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=2, max_size=4), st.floats(0, 1))
def test_the_cheapest_pieces_of_the_convex_hulls_come_first(rows: list[list[float]], sparsity: float) -> None:
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in rows))
    targets = targets_of(model, include_first_last=True)
    rows = [sorted(row) for row in rows]
    zeros = by_sensitivity(targets, sparsity, rows, levels=(0.2, 0.5, 1.0))
    assert sum(zeros) == round(sparsity * 100 * len(rows)) and all(0 <= z <= 100 for z in zeros)

    def cost(row: list[float], z: float) -> float:  # the lower convex hull at z
        points = list(zip((0, 20, 50, 100), (0.0, *row), strict=True))
        lines = [
            a[1] + (b[1] - a[1]) * (z - a[0]) / (b[0] - a[0])
            for a in points for b in points if a[0] <= z <= b[0] and a[0] < b[0]
        ]  # fmt: skip
        return min(lines + [p[1] for p in points if p[0] == z])

    total = sum(cost(row, z) for row, z in zip(rows, zeros, strict=True))
    for i in range(len(rows)):  # no exchange of ten weights between two targets is cheaper
        for j in range(len(rows)):
            if i != j and zeros[i] >= 10 and zeros[j] <= 90:
                other = [z + 10 * ((k == j) - (k == i)) for k, z in enumerate(zeros)]
                assert sum(cost(row, z) for row, z in zip(rows, other, strict=True)) >= total - 1e-6
