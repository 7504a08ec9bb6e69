"""Channel pruning: the smaller model computes exactly what the masked one does; what can't be followed stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cnncomp
from cnncomp.errors import ArgumentError, CalibrationError
from cnncomp.models import ConcatNet, DigitsNet, mobilenet_v2, resnet18, resnet50, vgg16
from cnncomp.pruning import mask_of
from cnncomp.structured import Group, channels_of, prune_channels, remove, score_groups
from tests.channel_nets import (
    BranchingNet,
    Conv1dNet,
    FlattenNet,
    GatedNet,
    GroupedNet,
    RandomNet,
    ReadsItsWidth,
    ShuffleNet,
    ViewNet,
)
from tests.helpers import randomize_norms

Removed = dict[Group, Tensor]


def random_units(groups: list[Group], seed: int, share: float = 0.4) -> Removed:
    """Units to remove: about ``share`` of each group, never all."""
    generator = torch.Generator().manual_seed(seed)
    removed = {}
    for group in groups:
        gone = torch.rand(len(group), generator=generator) < share
        gone[torch.randint(len(group), (1,), generator=generator)] = False
        removed[group] = gone
    return removed


def outputs_with_activations_zeroed(model: nn.Module, removed: Removed, x: Tensor) -> Tensor:
    """What the whole model gives when hooks zero every removed channel before each layer that reads it and behind each
    layer that gives it: independent of how weights are masked or cut."""
    handles = []
    for group, gone in removed.items():
        for d in group.dependencies:
            index = d.index[gone].flatten()
            if d.axis == "out":
                handles.append(d.node.module.register_forward_hook(lambda m, a, y, i=index: cleared(m, y, i)))
            else:
                handles.append(d.node.module.register_forward_pre_hook(lambda m, a, i=index: (cleared(m, a[0], i),)))
    try:
        with torch.no_grad():
            return model(x)
    finally:
        for handle in handles:
            handle.remove()


def cleared(module: nn.Module, x: Tensor, index: Tensor) -> Tensor:
    return x.index_fill(x.dim() - 1 if isinstance(module, nn.Linear) else 1, index, 0.0)


def check_exact(model: nn.Module, x: Tensor, seed: int = 0) -> Removed:
    """Remove random units of every group; what is left gives what the hooked model gives, to double precision."""
    model = randomize_norms(model).double().eval()
    x = x.double()
    groups = channels_of(model, x).groups
    removed = random_units(groups, seed)
    expected = outputs_with_activations_zeroed(model, removed, x)
    before = {id(d): d.node.size(d.axis) for g in groups for d in g.dependencies}
    assert remove(model, removed, (x,))
    with torch.no_grad():
        got = model(x)
    scale = expected.abs().max().clamp_min(1e-6)
    assert torch.allclose(got / scale, expected / scale, rtol=0, atol=1e-9)
    lost: dict[tuple[Any, str], int] = {}
    for g in groups:
        for d in g.dependencies:
            lost[d.node, d.axis] = lost.get((d.node, d.axis), 0) + d.index[removed[g]].numel()
    for g in groups:
        for d in g.dependencies:
            assert d.node.size(d.axis) == before[id(d)] - lost[d.node, d.axis], d
    return removed


SMALL: dict[str, Callable[[], nn.Module]] = {
    "concat": ConcatNet,
    "grouped": GroupedNet,
    "flatten": FlattenNet,
    "gated": GatedNet,
    "view": ViewNet,
    "shuffle": ShuffleNet,
    "branching": BranchingNet,
    "mobilenet_v2": lambda: mobilenet_v2(10, width_mult=0.35),
    "resnet18": lambda: resnet18(10),
}


@pytest.mark.parametrize("name", SMALL)
def test_the_smaller_model_equals_the_masked_one(name: str) -> None:
    size = 32 if name in ("mobilenet_v2", "resnet18") else 8
    removed = check_exact(SMALL[name](), torch.randn(2, 3, size, size))
    assert sum(int(gone.sum()) for gone in removed.values()) > 0
    if name == "view":
        assert [g.name for g in removed] == ["stem", "last", "back", "merge"]
    if name == "gated":
        assert [g.name for g in removed] == ["stem", "down", "pair", "head"]


def test_one_dimension() -> None:
    model = Conv1dNet()
    check_exact(model, torch.randn(2, 3, 20))
    assert model.norm.num_channels == 3 * model.norm.num_groups == model.conv1.out_channels < 12


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_random_networks(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = RandomNet(seed), torch.randn(2, 3, 8, 8)
    kept = channels_of(model, x).kept.values()
    assert set(kept) <= {"is the model's output", "has one unit only, which can't go"}
    check_exact(model, x, seed)


def small_vgg16(num_classes: int) -> nn.Module:
    """VGG-16 with another classifier, for its own of 120 million weights takes long."""
    model = vgg16(num_classes)
    model.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 32), nn.ReLU(), nn.Linear(32, num_classes))
    return model


@pytest.mark.parametrize("make", [resnet50, small_vgg16, mobilenet_v2])
def test_known_networks_shrink_everywhere(make: Callable[[int], nn.Module]) -> None:
    model = make(10).eval()
    x = torch.randn(1, 3, 32, 32)
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    graph = channels_of(model, x)
    last = list(shapes)[-1].rpartition(".")[0]
    assert graph.kept == {last: "is the model's output"}
    assert prune_channels(model, 0.5, x, scope="layer", graph=graph) is model
    assert graph.kept.keys() == {last}
    after = {name: t.shape for name, t in model.state_dict().items()}
    assert list(after) == list(shapes)
    for name, shape in shapes.items():
        if name.endswith("weight"):  # halves of even numbers
            own = (10 if name.startswith(last) else shape[0] // 2,)
            assert after[name][:1] == own, name
            if len(shape) > 1:
                assert after[name][1] == (shape[1] if shape[1] in (1, 3) else shape[1] // 2), (
                    name
                )  # 3 colours, depthwise
    assert model(x).shape == (1, 10)


def test_a_grouped_convolution_loses_groups_or_shrinks_them() -> None:
    model = GroupedNet().eval()
    prune_channels(model, 0.5, torch.randn(1, 3, 8, 8), scope="layer")
    assert (model.many.groups, *model.many.weight.shape[:2]) == (4, 16, 2)  # 8 groups of 2 channels: whole ones
    assert (model.few.groups, *model.few.weight.shape[:2]) == (2, 12, 8)  # 2 groups of 16: as many out of each
    assert (model.depthwise.groups, model.depthwise.in_channels, model.depthwise.out_channels) == (12, 12, 24)


def test_a_shuffle_stays_and_is_named() -> None:
    model, x = ShuffleNet().eval(), torch.randn(1, 3, 8, 8)
    graph = channels_of(model, x)
    assert [g.name for g in graph.groups] == ["second"]
    assert "'view'" in graph.kept["first"]
    prune_channels(model, 0.5, x)
    assert (model.first.out_channels, model.second.out_channels) == (8, 4)


def test_what_cannot_be_traced_is_named_and_its_parts_shrink() -> None:
    model, x = BranchingNet().eval(), torch.randn(1, 3, 8, 8)
    graph = channels_of(model, x)
    assert graph.kept[""] == "can't be traced"
    assert graph.kept["body.3"] == graph.kept["head.2"] == "is the traced part's output"
    prune_channels(model, 0.5, x, scope="layer")
    assert (model.body[0].out_channels, model.body[3].out_channels) == (4, 6)
    assert (model.head[0].out_features, model.head[2].in_features) == (5, 5)


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers, nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 3))


class Squares(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * x)


class Softmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(1)


class FixedView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 8, 8, 8)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Softmax(), "'softmax'"),
        (FixedView(), "fixed size"),
        (nn.LayerNorm([8, 8, 8]), "channels are not followed"),
        (nn.GroupNorm(1, 8), "one unit only"),
        (Squares(8, 8, 1), "channels are not followed"),
    ],
)
def test_layers_that_mix_channels_keep_them(layer: nn.Module, why: str) -> None:
    model, x = chain(layer).eval(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model[1].state_dict())
    graph = channels_of(model, x)
    assert why in graph.kept["0"]
    prune_channels(model, 0.5, x)
    assert model[0].out_channels == 8
    assert all(torch.equal(t, before[name]) for name, t in model[1].state_dict().items())
    assert model[2].out_channels == 4
    model(x)


def test_shared_hooked_quantised_and_borrowed_weights_stay() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = chain()
    model.insert(2, nn.Conv2d(8, 8, 3, padding=1))
    model[2].weight = model[1].weight
    assert channels_of(model, x).kept["1"] == "shares its weights with another layer"
    model = chain()
    model[1].register_forward_hook(lambda m, a, y: y)
    graph = channels_of(model, x)
    assert not graph.groups and graph.kept["1"] == "has hooks"
    model = cnncomp.quantize(chain().eval(), [x], progress=False)
    assert not channels_of(model, x).groups
    model = chain()
    nn.utils.parametrizations.weight_norm(model[1])
    assert "parametrised" in channels_of(model, x).kept["1"]

    class Borrows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.b(self.a(x)), self.b.weight)

    borrowing = Borrows()
    assert not channels_of(borrowing, x).groups
    prune_channels(borrowing, 0.5, x)
    borrowing(x)


def test_a_model_that_would_compute_something_else_is_left_as_it_was() -> None:
    model, x = ReadsItsWidth().eval(), torch.randn(1, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    graph = channels_of(model, x)
    expected = model(x)
    prune_channels(model, 0.5, x, graph=graph)
    assert "was left as it is" in graph.kept[""]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert (model.a.out_channels, model.b.in_channels) == (8, 8)
    assert torch.equal(model(x), expected)
    assert channels_of(model, x).groups[0].before == 8


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_pruning_again_does_nothing_and_more_goes_on(scope: str, round_to: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(1, 3, 32, 32)
    model = mobilenet_v2(10, width_mult=0.5).eval()

    def prune(sparsity: float) -> tuple[list[torch.Size], int, int]:
        prune_channels(model, sparsity, x, scope=scope, round_to=round_to)
        groups = channels_of(model, x).groups
        shapes = [t.shape for t in model.state_dict().values()]
        return shapes, sum(map(len, groups)), sum(g.before for g in groups)

    first, left, total = prune(0.4)
    slack = sum(8 for _ in channels_of(model, x).groups) if scope == "layer" else 8
    assert total - round(0.4 * total) <= left <= total - round(0.4 * total) + (slack if round_to > 1 else 25)
    again, *_ = prune(0.4)
    assert again == first
    _, more_left, more_total = prune(0.6)
    assert more_total == total and more_left < left
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels % round_to == 0, module


def test_an_odd_width_is_rounded_down_to_a_multiple_first() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 20, 3), nn.Conv2d(20, 2, 1)), torch.randn(1, 3, 8, 8)
    for sparsity, left in ((0.1, 20), (0.3, 16), (0.5, 16), (0.6, 8), (1.0, 8)):
        prune_channels(model, sparsity, x, round_to=8)
        assert model[0].out_channels == model[1].in_channels == left


def test_the_count_is_exact_and_the_same_model_gives_the_same() -> None:
    x = torch.randn(1, 1, 8, 8)
    model = DigitsNet().eval()
    twin = copy.deepcopy(model)
    total = sum(map(len, channels_of(model, x).groups))
    prune_channels(model, 0.3, x)
    assert sum(map(len, channels_of(model, x).groups)) == total - round(0.3 * total)
    prune_channels(twin, 0.3, x)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


@given(sparsity=st.floats(0, 1), round_to=st.sampled_from([1, 3, 8]), limit=st.floats(0, 1))
@settings(max_examples=15)
def test_no_group_loses_all(sparsity: float, round_to: int, limit: float) -> None:
    model, x = ConcatNet().eval(), torch.randn(1, 3, 8, 8)
    prune_channels(model, sparsity, x, round_to=round_to, limit=limit)
    groups = channels_of(model, x).groups
    assert len(groups) == 4
    for group in groups:
        assert len(group) >= 1
        assert 1 - len(group) / group.before <= max(limit, sparsity) + 1e-9
    assert sum(map(len, groups)) >= 80 - round(sparsity * 80)
    model(x)


def test_dead_channels_go_first() -> None:
    torch.manual_seed(1)
    model, x = ConcatNet().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for layer in (model.stem, model.narrow, model.wide, model.merge):
            layer.weight[1::2] = 0
            layer.bias[1::2] = 0
        for layer in (model.narrow, model.wide, model.merge, model.fc):
            layer.weight[:, 1::2] = 0
    expected = model(x)
    prune_channels(model, 0.5, x)
    assert model.stem.out_channels == model.narrow.out_channels == model.wide.out_channels == 8
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_taylor_is_the_derivative_by_a_gate_on_the_channel() -> None:
    torch.manual_seed(2)
    model = randomize_norms(DigitsNet()).double().eval()
    x, labels = torch.randn(6, 1, 8, 8).double(), torch.arange(6)
    batches = [(x[:4], labels[:4]), (x[4:], labels[4:])]
    groups = channels_of(model, x).groups
    scores = score_groups(groups, model, "taylor", batches)
    readers = [(model.conv2,), (model.conv3, model.conv4), (model.fc,)]
    for group, score, modules in zip(groups, scores, readers, strict=True):
        expected = torch.zeros(len(group), dtype=torch.float64)
        for images, classes in batches:
            gate = torch.ones(len(group), dtype=torch.float64, requires_grad=True)
            shape = (1, -1) if model.fc in modules else (1, -1, 1, 1)
            handles = [m.register_forward_pre_hook(lambda m, a, g=gate, s=shape: (a[0] * g.view(s),)) for m in modules]
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(images), classes), gate)
            for handle in handles:
                handle.remove()
            expected += gradient.square() / 2
        assert torch.allclose(score, expected / expected.mean(), rtol=1e-9)
    assert all(p.grad is None for p in model.parameters())


def test_groups_can_be_ranked_together() -> None:
    torch.manual_seed(0)
    model, x = DigitsNet().eval(), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        model.conv2[0].weight *= 100  # does not change what its channels are worth beside each other
    groups = channels_of(model, x).groups
    for criterion in ("magnitude", "taylor"):
        for score in score_groups(groups, model, criterion, [x]):
            assert score.mean() == pytest.approx(1.0)
            assert score.min() >= 0
    prune_channels(model, 0.5, x)
    assert all(0.3 < len(g) / g.before < 0.7 for g in channels_of(model, x).groups)


def test_bn_ranks_by_gamma_and_leaves_groups_without_norms() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
    ).eval()
    gamma = torch.tensor([0.5, -0.1, 0.9, 0.2, -0.8, 0.3, 0.05, 0.7])
    model[1].weight.data = gamma.clone()
    prune_channels(model, 0.5, torch.randn(1, 3, 8, 8), criterion="bn")
    assert torch.equal(model[1].weight.detach(), gamma[gamma.abs() > 0.3])
    assert model[2].out_channels == 8


def test_trains_on_with_the_same_optimiser_and_converts() -> None:
    torch.manual_seed(0)
    model, x = DigitsNet(), torch.randn(8, 1, 8, 8)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2)
    F.cross_entropy(model(x), torch.arange(8)).backward()
    prune_channels(model, 0.5, x)
    assert model.training
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(8))
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    cnncomp.prune(model, 0.5)
    cnncomp.quantize(model, [x], progress=False)
    fast = cnncomp.convert(model, x, measure=False)
    expected = model(x)
    assert (fast(x) - expected).abs().max() < 0.05 * expected.abs().max()


def test_masks_shrink_along() -> None:
    torch.manual_seed(0)
    model, x = ConcatNet().eval(), torch.randn(2, 3, 8, 8)
    cnncomp.prune(model, 0.6)
    groups = channels_of(model, x).groups
    removed = random_units(groups, 1)
    expected = outputs_with_activations_zeroed(model, removed, x)
    assert remove(model, removed, (x,))
    assert torch.allclose(model(x), expected, atol=1e-6)
    mask = mask_of(model.merge)
    assert mask is not None and mask.shape == model.merge.weight.shape
    assert not model.merge.weight[~mask].any()
    cnncomp.remove_masks(model)
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_prune_takes_the_pattern() -> None:
    model, x = ConcatNet(), torch.randn(1, 3, 8, 8)
    assert cnncomp.prune(model, 0.5, pattern="channel", example_inputs=x, scope="layer", exclude="stem") is model
    assert model.training
    assert (model.stem.out_channels, model.narrow.out_channels, model.merge.out_channels) == (16, 8, 16)
    with pytest.raises(ArgumentError, match="pattern"):
        cnncomp.prune(model, 0.5, pattern="channel", example_inputs=x, allocation="uniform")


def test_groups_print_themselves() -> None:
    model, x = FlattenNet().eval(), torch.randn(1, 3, 8, 8)
    prune_channels(model, 0.5, x, scope="layer")
    lines = str(channels_of(model, x)).splitlines()
    assert lines[0] == "2 groups of channels"
    assert lines[1] == "  conv: 5 of 10 channels, with act.out, fc1.in"
    assert lines[2] == "  fc1: 10 of 20 channels, with norm.out, fc2.in"
    assert lines[3] == "  fc2 stays: is the model's output"
    clone = copy.deepcopy(model)
    assert str(channels_of(clone, x)).splitlines() == lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sparsity=1.5), "sparsity: got 1.5"),
        (dict(sparsity=True), "sparsity"),
        (dict(limit=-1), "limit"),
        (dict(scope="net"), "scope: got 'net'"),
        (dict(round_to=0), "round_to: got 0"),
        (dict(criterion="size"), "criterion: got 'size'"),
        (dict(criterion="taylor"), "data: got None"),
        (dict(exclude="nosuch"), "exclude: got 'nosuch'"),
        (dict(example_inputs=3), "example_inputs"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    model = ConcatNet()
    with pytest.raises(ArgumentError, match=message):
        prune_channels(model, **{"example_inputs": torch.randn(1, 3, 8, 8), **arguments})
    assert model.stem.out_channels == 16


def test_other_bad_input() -> None:
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(ArgumentError, match="torch.nn.Module"):
        prune_channels({"a": 1}, 0.5, x)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="no batches"):
        prune_channels(ConcatNet(), 0.5, x, criterion="taylor", data=[])
    with pytest.raises(ArgumentError, match="before cnncomp.convert"):
        prune_channels(cnncomp.convert(ConcatNet().eval(), x, measure=False), 0.5, x)
    model = ConcatNet()
    model.stem.weight.data[0] = float("nan")
    with pytest.raises(ArgumentError, match="NaN in the weights of 'stem'"):
        prune_channels(model, 0.5, x)
    assert channels_of(nn.Sequential(nn.ReLU()), x).groups == []
    prune_channels(nn.Sequential(nn.ReLU()), 0.5, x)
