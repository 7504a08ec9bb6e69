"""Pruning: exact counts, the right weights, masks that survive training and copying."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from cnncomp.errors import ArgumentError, PatternError
from cnncomp.models import ArticleNet, DigitsNet, mobilenet_v2
from cnncomp.pruning import Mask, mask_of, prune, remove_masks, sparsity_of


def chain(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(c, k) for c, k in zip(sizes, sizes[1:], strict=False)))


def zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


@given(sparsity=st.floats(0, 1), scope=st.sampled_from(["global", "layer"]), seed=st.integers(0, 1000))
def test_exactly_the_smallest_go(sparsity: float, scope: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv1d(4, 6, 3, groups=2), nn.Linear(7, 9))
    weights = [layer.weight for layer in model]
    for w in weights:  # few distinct values: many ties
        w.data = torch.randint(-4, 5, w.shape, generator=generator).float() + 0.5
    before = [w.detach().clone() for w in weights]
    prune(model, sparsity, scope=scope, include_first_last=True)
    groups = [range(3)] if scope == "global" else [[0], [1], [2]]
    for group in groups:
        flat = torch.cat([before[i].flatten() for i in group])
        expected = flat.clone()
        order = torch.sort(flat.abs(), stable=True).indices
        expected[order[: round(sparsity * len(flat))]] = 0
        got = torch.cat([model[i].weight.detach().flatten() for i in group])
        assert torch.equal(got, expected)


def test_first_and_last_stay_unless_asked() -> None:
    model = prune(DigitsNet(), 0.9)
    report = {x.name: x for x in sparsity_of(model).layers}
    assert report["conv1.0"].zeros == report["fc"].zeros == 0
    assert not report["conv1.0"].masked
    inner = [report[n] for n in ("conv2.0", "conv3.0", "conv4.0")]
    assert sum(x.zeros for x in inner) == round(0.9 * sum(x.numel for x in inner))
    model = prune(DigitsNet(), 0.9, include_first_last=True)
    assert sparsity_of(model).zeros == round(0.9 * sparsity_of(model).numel)


def test_depthwise_stay_unless_asked() -> None:
    def depthwise_zeros(model: nn.Module) -> int:
        return sum(zeros(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)

    assert depthwise_zeros(prune(mobilenet_v2(width_mult=0.35), 0.9, scope="layer")) == 0
    assert depthwise_zeros(prune(mobilenet_v2(width_mult=0.35), 0.9, scope="layer", include_depthwise=True)) > 0


@pytest.mark.parametrize("exclude", ["conv3.0", "conv3", ["conv[3]*"], ("conv3.?",)])
def test_exclude(exclude: str | list[str]) -> None:
    model = prune(DigitsNet(), 0.5, exclude=exclude)
    assert mask_of(model.conv3[0]) is None
    assert mask_of(model.conv2[0]) is not None


def test_zeros_stay_zero_in_training_and_the_rest_learns() -> None:
    model = prune(DigitsNet(), 0.8)
    pruned = {n: w == 0 for n, w in ((n, m.weight) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))}
    before = model.conv3[0].weight.detach().clone()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = model.conv3[0].weight.detach()
    for name, was_zero in pruned.items():
        assert torch.equal(model.get_submodule(name).weight == 0, was_zero), name
    assert (after != before)[~pruned["conv3.0"]].float().mean() > 0.99
    assert not model.conv3[0].parametrizations.weight.original.grad[pruned["conv3.0"]].any()


def test_an_optimiser_made_before_goes_on_working() -> None:
    model = chain(4, 4, 4, 4)
    parameter = model[1].weight
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    prune(model, 0.5)
    before = model[1].weight.detach().clone()
    model(torch.randn(8, 4)).square().sum().backward()
    optimiser.step()
    assert not torch.equal(model[1].weight, before)
    remove_masks(model)
    assert model[1].weight is parameter


def test_pruning_again_extends_the_masks() -> None:
    model = prune(ArticleNet(), 0.5, include_first_last=True)
    first = [mask_of(m).clone() for m in model.modules() if mask_of(m) is not None]
    prune(model, 0.9, include_first_last=True)
    second = [mask_of(m) for m in model.modules() if mask_of(m) is not None]
    assert sparsity_of(model).zeros == round(0.9 * sparsity_of(model).numel)
    for old, new in zip(first, second, strict=True):
        assert not (new & ~old).any()  # nothing comes back
    assert sum(isinstance(m, Mask) for m in model.modules()) == 3
    with pytest.raises(ArgumentError, match=r"sparsity: got 0.5, expected at least 0\.9"):
        prune(model, 0.5, include_first_last=True)


def test_masked_weights_count_as_smallest_even_if_trained_since() -> None:
    model = prune(chain(2, 8, 8, 2), 0.5)
    was = mask_of(model[1]).clone()
    with torch.no_grad():
        model[1].parametrizations.weight.original[~was] = 100.0  # an optimiser with momentum may move these
    prune(model, 0.75)
    assert int((~mask_of(model[1])).sum()) == 48
    assert not (mask_of(model[1]) & ~was).any()
    remove_masks(model)
    assert zeros(model[1].weight) == 48


def test_assignment_to_the_weight_is_masked() -> None:
    model = prune(chain(2, 8, 8, 2), 0.5)
    model[1].weight = torch.full((8, 8), -3.0)
    assert zeros(model[1].weight) == zeros(model[1].parametrizations.weight.original) == 32
    assert not torch.signbit(model[1].weight[model[1].weight == 0]).any()  # +0, not −0


def test_remove_masks_gives_plain_layers_and_the_plain_state_dict() -> None:
    model = ArticleNet().eval()
    names = list(model.state_dict())
    prune(model, 0.9, include_first_last=True)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    assert remove_masks(model) is model
    assert type(model.features[0]) is nn.Conv2d
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), expected)
    assert sparsity_of(model).zeros == round(0.9 * sparsity_of(model).numel)
    assert not any(x.masked for x in sparsity_of(model).layers)
    ArticleNet().load_state_dict(model.state_dict())
    assert remove_masks(model) is model  # nothing to do


def test_copies_and_state_dicts_carry_the_masks() -> None:
    model = prune(ArticleNet(), 0.9, include_first_last=True).eval()
    x = torch.randn(2, 3, 32, 32)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x), model(x))
    assert mask_of(clone.classifier).data_ptr() != mask_of(model.classifier).data_ptr()
    other = prune(ArticleNet(), 0.5, include_first_last=True).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert sparsity_of(other).zeros == sparsity_of(model).zeros
    half = copy.deepcopy(model).half()
    assert half.classifier.weight.dtype == torch.half
    assert mask_of(half.classifier).dtype == torch.bool


def test_a_shared_weight_is_counted_and_masked_once() -> None:
    model = chain(8, 8, 8, 8, 8)
    model[2].weight = model[1].weight
    prune(model, 0.5)
    assert zeros(model[1].weight) == 32
    assert torch.equal(model[1].weight, model[2].weight)
    assert mask_of(model[1]) is mask_of(model[2])
    prune(model, 0.75)
    assert zeros(model[1].weight) == zeros(model[2].weight) == 48
    remove_masks(model)
    assert model[1].weight is model[2].weight
    assert zeros(model[1].weight) == 48


def test_a_weight_shared_with_a_protected_layer_is_protected() -> None:
    model = chain(8, 8, 8, 8)
    model[2].weight = model[0].weight = model[1].weight
    with pytest.raises(ArgumentError, match="none to be pruned"):
        prune(model, 0.5)
    assert zeros(model[1].weight) == 0


def test_the_report_is_a_table() -> None:
    text = str(sparsity_of(prune(DigitsNet(), 0.9)))
    lines = text.splitlines()
    assert len(lines) == 7
    assert "conv3.0" in lines[3] and "64×64×3×3" in lines[3] and "masked" in lines[3] and "Conv2d" in lines[3]
    assert "Parametrized" not in text


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan"), float("inf"), "0.5", True])
def test_sparsity_outside_0_to_1(sparsity: object) -> None:
    with pytest.raises(ArgumentError, match="sparsity"):
        prune(ArticleNet(), sparsity)  # type: ignore[arg-type]


def test_other_arguments_are_checked() -> None:
    with pytest.raises(PatternError, match="'2-4'.*'unstructured'"):
        prune(ArticleNet(), 0.5, pattern="2-4")
    with pytest.raises(ArgumentError, match="scope: got 'net', expected one of 'global', 'layer'"):
        prune(ArticleNet(), 0.5, scope="net")
    with pytest.raises(ArgumentError, match="exclude: got 'nosuch'"):
        prune(ArticleNet(), 0.5, exclude="nosuch")
    with pytest.raises(ArgumentError, match="at least one"):
        prune(nn.Sequential(nn.ReLU()), 0.5)
    with pytest.raises(ArgumentError, match="torch.nn.Module"):
        prune({"a": 1}, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="lazy layer '0'"):
        prune(nn.Sequential(nn.LazyLinear(3)), 0.5)


def test_nan_is_named_and_nothing_is_changed() -> None:
    model = chain(3, 3, 3, 3, 3)
    model[2].weight.data[1, 1] = float("nan")
    with pytest.raises(ArgumentError, match="NaN in the weight of layer '2'"):
        prune(model, 0.5)
    assert mask_of(model[1]) is None


def test_weights_that_others_parametrise_are_refused() -> None:
    model = chain(3, 3, 3)
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ArgumentError, match="'0' with a _WeightNorm"):
        prune(model, 0.5, include_first_last=True)
    model = chain(3, 3, 3)
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ArgumentError, match="plain weights"):
        prune(model, 0.5, include_first_last=True)


def test_extremes() -> None:
    model = prune(ArticleNet(), 0.0, include_first_last=True)
    assert sparsity_of(model).zeros == 0
    model = prune(model, 1.0, include_first_last=True)
    assert sparsity_of(model).sparsity == 1.0
    assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()
    bare = prune(nn.Linear(4, 4), 0.5, include_first_last=True)  # the model itself is a layer
    assert zeros(bare.weight) == 8


def test_a_layer_of_which_nothing_is_left_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"nothing is left of 1: lower the sparsity"):
        prune(model, 0.8, include_first_last=True)
