"""What a unit of a group is worth: the scores by which channels are ranked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp._batches import evaluating, inputs_of
from cnncomp.errors import ArgumentError, CalibrationError
from cnncomp.pruning.criteria import Loss, as_batches, check_scalar, default_loss, gradients_of
from cnncomp.structured.graph import Dependency, Group
from cnncomp.structured.layers import Node, WeightNode, squared

CRITERIA = ("magnitude", "bn", "taylor")

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def score_groups(
    groups: Sequence[Group],
    model: nn.Module,
    criterion: str = "magnitude",
    data: Iterable[Any] | Tensor | None = None,
    loss: Loss | None = None,
) -> list[Tensor]:
    """A score per unit of each group, float64 on the CPU, non-negative; the lowest go first.

    ========= ===================================================================================================
    criterion score of a unit
    ========= ===================================================================================================
    magnitude the sum of squares of all parameters that go with it, over the mean of that in its group; each dependency is
              divided so by itself, and the mean of all dependencies taken, so that neither a wide layer nor one of large
              weights outvotes the others (group norm: Fang et al., "DepGraph", 2023, section 3.3)
    bn        the sum of \\|γ\\| in the BatchNorms behind it (Liu et al., "Network Slimming", 2017); NaN for a group without
    taylor    mean over batches of (Σ w·∂L/∂w)² over the weights that read it, which is Σ a·∂L/∂a over its activations:
              the square of what the loss changes to first order when they become zero (Molchanov et al., "Importance
              Estimation for Neural Network Pruning", 2019, equation 8); over the mean of that in its group
    ========= ===================================================================================================

    Where the scores' mean in a group is 1, groups are ranked together by how far a unit falls short of its own group. Without,
    the groups of a trained network with the least gradients, or the fewest layers, would be all but emptied first.

    The model runs in eval mode; gradients in ``.grad`` stay as they are.

    Raises:
        ArgumentError: an unknown criterion, "taylor" without data, a loss that is no scalar or not finite, weights that
            are NaN.
        CalibrationError: no batch, or one that can't be used.
    """
    if criterion not in CRITERIA:
        raise ArgumentError("criterion", repr(criterion), f"one of {', '.join(map(repr, CRITERIA))}")
    if criterion == "taylor":
        if data is None:
            raise ArgumentError("data", None, "batches to take gradients on, which criterion 'taylor' needs")
        return _taylor(groups, model, data, loss or default_loss)
    scores = [_magnitude(g) if criterion == "magnitude" else _batch_norm(g) for g in groups]
    for group, score in zip(groups, scores, strict=True):
        if criterion == "magnitude" and torch.isnan(score).any():
            raise ArgumentError("model", f"NaN in the weights of {group.name!r} or of layers tied to it", "numbers")
    return scores


def _gather(d: Dependency, per_channel: Tensor) -> Tensor:
    """The sum over the channels of each unit."""
    return per_channel.cpu()[d.index].sum(1)


def _magnitude(group: Group) -> Tensor:
    total = torch.zeros(len(group), dtype=torch.float64)
    for d in group.dependencies:
        squares = _gather(d, squared(d.node, d.axis, _values(d)))
        mean = squares.mean()
        total += squares / mean if mean != 0 else squares
    return total / len(group.dependencies)


def _values(d: Dependency) -> dict[str, Tensor]:
    """The node's parameters, a weight as the model computes with it, that is masked."""
    values = {name: p.detach() for name, p in d.node.parameters().items()}
    if "weight" in values:
        values["weight"] = d.node.module.weight.detach()  # type: ignore[operator]
    return values


def _batch_norm(group: Group) -> Tensor:
    norms = [d for d in group.dependencies if isinstance(d.node.module, _NORMS) and d.node.module.affine]
    if not norms:
        return torch.full((len(group),), float("nan"), dtype=torch.float64)
    gammas = [_gather(d, d.node.parameters()["weight"].detach().double().abs()) for d in norms]
    return torch.stack(gammas).sum(0)


def _readers(group: Group) -> list[Dependency]:
    """The dependencies whose weights sum over the group's channels; not depthwise layers and the like, which go with them."""
    return [d for d in group.dependencies if d.axis == "in" and isinstance(d.node, WeightNode) and not d.node.by_group]


def _taylor(groups: Sequence[Group], model: nn.Module, data: Any, loss: Loss) -> list[Tensor]:
    nodes = list(dict.fromkeys(d.node for g in groups for d in g.dependencies if isinstance(d.node, WeightNode)))
    weights = [node.parameters()["weight"] for node in nodes]
    frozen = [w for w in weights if not w.requires_grad]
    totals = [torch.zeros(len(g), dtype=torch.float64) for g in groups]
    index = -1
    try:
        for w in frozen:
            w.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for index, batch in enumerate(as_batches(data)):
                args, kwargs = inputs_of(batch, index, weights[0].device)
                value = loss(model(*args, **kwargs), batch)
                check_scalar(value, f"batch {index}")
                gradients = gradients_of(value, weights)
                products: dict[Node, Tensor] = {
                    n: w.detach() * g for n, w, g in zip(nodes, weights, gradients, strict=True)
                }
                for group, total in zip(groups, totals, strict=True):
                    changes = torch.zeros_like(total)
                    for d in _readers(group):
                        per_channel = d.node.slices("in", {"weight": products[d.node]})[0].double().sum(1)
                        changes += _gather(d, per_channel)
                    total += changes.square()
    finally:
        for w in frozen:
            w.requires_grad_(False)
    if index < 0:
        raise CalibrationError("data: got no batches, expected at least one (was an iterator used up before?)")
    return [total / mean if (mean := total.mean()) > 0 else total for total in totals]
