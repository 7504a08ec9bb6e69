"""WeightPruning: each point in which the article's formula or code is corrected."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnncomp import WeightPruning, remove_masks
from cnncomp.errors import ArgumentError
from cnncomp.models import ArticleNet, ConcatNet
from cnncomp.pruning import mask_of, prune


def batch(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 32, 32, generator=generator), torch.randint(0, 10, (n,), generator=generator)


def loss_of(model: nn.Module, n: int = 8) -> Tensor:
    images, labels = batch(n)
    return F.cross_entropy(model(images), labels)


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def gradients(model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(model), [m.weight for m in layers(model)]))


def test_the_formula_alone_never_makes_a_weight_zero() -> None:
    model = ArticleNet()
    epsilon, alpha = 0.1, 0.1
    for _ in range(3):
        for m, g in zip(layers(model), gradients(model), strict=True):
            smallest = g.abs().flatten().kthvalue(round((1 - epsilon) * g.numel())).values
            g = g.where(g.abs() > smallest, 0.0)  # step 2: the gradient is pruned
            bound = float(epsilon / g.abs().sum())
            m.weight.data -= alpha * g.clip(-bound, bound)  # step 3
    assert all((m.weight != 0).all() for m in layers(model))


@pytest.mark.parametrize("clip", ["l1", "mean"])
@pytest.mark.parametrize("sparsity", [0.0, 0.013, 0.1, 0.5, 1.0])
def test_the_fraction_that_stays_is_reached_at_the_first_step(sparsity: float, clip: str) -> None:
    pruner = WeightPruning(ArticleNet(), sparsity, clip=clip)
    pruner.step(loss_of(pruner))
    for m in layers(pruner):
        assert int(m.weight.count_nonzero()) == int(mask_of(m).sum()) == round(sparsity * m.weight.numel())
    # biases move, but for ε = 0, where the bound is 0
    assert all(bool(p.any()) == (sparsity > 0) for name, p in pruner.named_parameters() if name.endswith("bias"))


def test_all_prunable_layers_and_only_they() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 28 * 28, 10)
    )
    model[1].weight.data.uniform_(1, 2)
    pruner = WeightPruning(model, 0.25)
    pruner.step(loss_of(pruner))
    assert [int(m.weight.count_nonzero()) for m in layers(model)] == [54, 18, 15680]
    assert model[1].weight.all() and model[0].bias.any()


def test_those_with_the_largest_product_of_weight_and_gradient_stay() -> None:
    model = ArticleNet()
    before = [m.weight.detach().clone() for m in layers(model)]
    expected = []
    for w, g in zip(before, gradients(model), strict=True):
        order = (w * g).abs().flatten().argsort(stable=True)
        keep = torch.ones(w.numel(), dtype=torch.bool)
        keep[order[: w.numel() - round(0.2 * w.numel())]] = False
        expected.append(keep.view(w.shape))
    pruner = WeightPruning(model, 0.2)
    pruner.step(loss_of(pruner))
    assert all(torch.equal(mask_of(m), keep) for m, keep in zip(layers(model), expected, strict=True))


def test_magnitude_decides_where_the_gradient_is_all_zero_and_the_first_of_equal_ones_go() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -3.0, 2.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
    pruner = WeightPruning(model, 0.5)
    pruner.step(model[1].weight.square().sum())  # does not depend on the first layer
    assert torch.equal(model[0].weight, torch.tensor([[0.0, -3.0, 2.0, 0.0], [0.0, 0.0, 1.0, 1.0]]))
    pruner.step(0 * pruner(torch.ones(1, 4)).sum())  # zero everywhere: nothing moves
    assert torch.equal(model[0].weight, torch.tensor([[0.0, -3.0, 2.0, 0.0], [0.0, 0.0, 1.0, 1.0]]))


@pytest.mark.parametrize("alpha", [None, 0.5])
@pytest.mark.parametrize("clip", ["l1", "mean"])
def test_the_update_of_what_stays(clip: str, alpha: float | None) -> None:
    model = ArticleNet()
    before = [m.weight.detach().clone() for m in layers(model)]
    bias, bias_gradient = model.classifier.bias.detach().clone(), gradients_of_bias(model)
    found = gradients(model)
    pruner = WeightPruning(model, 0.3, alpha, clip)
    pruner.step(loss_of(pruner))
    clipped = 0
    for m, w, g in zip(layers(model), before, found, strict=True):
        keep = mask_of(m)
        g = torch.where(keep, g, 0.0)
        bound = 0.3 / g.abs().sum() if clip == "l1" else 0.3 * g.abs().mean()
        step = (0.1 if clip == "l1" else 1 / g.numel()) if alpha is None else alpha
        expected = torch.where(keep, w - step * g.clip(-float(bound), float(bound)), 0.0)
        torch.testing.assert_close(m.weight.detach(), expected, rtol=1e-6, atol=1e-9)
        clipped += int((g.abs() > bound).sum())
    assert clipped > 0 or clip == "l1"
    size = bias_gradient.abs()
    bound = float(0.3 / size.sum() if clip == "l1" else 0.3 * size.mean())
    step = (0.1 if clip == "l1" else 0.1) if alpha is None else alpha  # 10 biases: 1/numel is 0.1 too
    torch.testing.assert_close(model.classifier.bias.detach(), bias - step * bias_gradient.clip(-bound, bound))


def gradients_of_bias(model: ArticleNet) -> Tensor:
    return torch.autograd.grad(loss_of(model), model.classifier.bias)[0]


def test_l1_clips_large_gradients() -> None:
    model = nn.Linear(4, 4, bias=False)
    before = model.weight.detach().clone()
    pruner = WeightPruning(model, 1.0, alpha=1.0)
    pruner.step(100 * model.weight.sum())
    # ‖∇J‖₁ = 1600, so each weight moves by 1/1600, though its gradient is 100
    torch.testing.assert_close(before - model.weight.detach(), torch.full((4, 4), 1 / 1600), rtol=1e-3, atol=0)


def test_pruned_entries_never_return() -> None:
    pruner = WeightPruning(ArticleNet(), 0.2, alpha=0.5)
    pruner.step(loss_of(pruner))
    first = [mask_of(m).clone() for m in layers(pruner)]
    optimiser = torch.optim.SGD(pruner.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        loss_of(pruner).backward()
        optimiser.step()
        pruner.step(loss_of(pruner))
    for m, keep in zip(layers(pruner), first, strict=True):
        assert torch.equal(m.weight != 0, keep) and torch.equal(mask_of(m), keep)


def test_steps_alone_train() -> None:
    pruner = WeightPruning(ArticleNet(), 0.5, alpha=1.0)
    pruner.step(loss_of(pruner))
    start = float(loss_of(pruner).detach())
    for _ in range(10):
        pruner.step(loss_of(pruner))
    assert float(loss_of(pruner).detach()) < start


def test_forward_is_the_model_and_changes_nothing() -> None:
    model = ArticleNet()
    images, _ = batch()
    expected = model(images)
    pruner = WeightPruning(model, 0.1)
    state = copy.deepcopy(pruner.state_dict())
    with torch.no_grad():
        assert torch.equal(pruner(images), expected)
    assert torch.equal(pruner(images), expected)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), pruner.state_dict().values(), strict=True))


def test_state_dict_and_deepcopy() -> None:
    pruner = WeightPruning(ArticleNet(), 0.2)
    fresh = copy.deepcopy(pruner)
    pruner.step(loss_of(pruner))
    clone = copy.deepcopy(pruner)
    fresh.load_state_dict(pruner.state_dict())
    images, _ = batch()
    for other in (clone, fresh):
        assert torch.equal(other(images), pruner(images))
        other.step(loss_of(other))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(layers(clone), layers(fresh), strict=True))
    plain = remove_masks(clone.model)
    assert list(plain.state_dict()) == list(ArticleNet().state_dict())


def test_gradients_of_others_stay() -> None:
    pruner = WeightPruning(ArticleNet(), 0.2)
    pruner.step(loss_of(pruner))
    assert all(p.grad is None for p in pruner.parameters())


def test_branches_shared_weights_and_frozen_ones() -> None:
    model = ConcatNet()
    model.wide.weight.requires_grad_(False)
    pruner = WeightPruning(model, 0.1)
    pruner.step(loss_of(pruner))
    assert int(model.wide.weight.count_nonzero()) == 640
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    pruner = WeightPruning(tied, 0.25)
    pruner.step(pruner(torch.randn(2, 6)).square().sum())
    assert int(tied[0].weight.count_nonzero()) == 9 and torch.equal(tied[0].weight, tied[1].weight)


def test_bad_losses_change_nothing() -> None:
    pruner = WeightPruning(ArticleNet(), 0.2)
    images, _ = batch()
    with pytest.raises(ArgumentError, match=r"loss: got shape \(8, 10\), expected a scalar"):
        pruner.step(pruner(images))
    with pytest.raises(ArgumentError, match="without gradient"), torch.no_grad():
        pruner.step(loss_of(pruner))
    with pytest.raises(ArgumentError, match="got nan"):
        pruner.step(loss_of(pruner) * float("nan"))
    with pytest.raises(ArgumentError, match="got float"):
        pruner.step(0.5)  # type: ignore[arg-type]
    root = pruner.model.classifier.bias.sum() * 0
    with pytest.raises(ArgumentError, match="gradient with NaN or infinity at 'classifier.bias'"):
        pruner.step(root.sqrt())
    assert all(m.weight.all() for m in layers(pruner))


def test_bad_arguments() -> None:
    for sparsity in (-0.1, 1.5, float("nan"), True, "half"):
        with pytest.raises(ArgumentError, match="sparsity"):
            WeightPruning(ArticleNet(), sparsity)  # type: ignore[arg-type]
    for alpha in (0, -1.0, float("nan"), float("inf"), "a"):
        with pytest.raises(ArgumentError, match="alpha"):
            WeightPruning(ArticleNet(), 0.1, alpha)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="clip: got 'l2', expected one of 'l1', 'mean'"):
        WeightPruning(ArticleNet(), 0.1, clip="l2")
    with pytest.raises(ArgumentError, match="at least one"):
        WeightPruning(nn.ReLU(), 0.1)
    with pytest.raises(ArgumentError, match="weights left in layer"):
        WeightPruning(prune(ArticleNet(), 0.9, scope="layer", include_first_last=True), 0.2)
