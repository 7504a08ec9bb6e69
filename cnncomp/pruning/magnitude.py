"""Magnitude pruning: the smallest weights go (Han et al., "Learning both Weights and Connections", 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnncomp._modules import Layer, is_depthwise, layers_of, select, weight_parameter
from cnncomp.errors import ArgumentError, PatternError
from cnncomp.pruning.mask import apply_mask, mask_of

PATTERNS = ("unstructured",)
SCOPES = ("global", "layer")


@dataclass
class _Weight:
    """One weight and the layers that share it."""

    name: str
    layers: list[Layer]

    @property
    def value(self) -> Tensor:
        return self.layers[0].weight.detach()

    @property
    def mask(self) -> Tensor | None:
        return next((m for m in map(mask_of, self.layers) if m is not None), None)


def prune(
    model: nn.Module,
    sparsity: float = 0.9,
    pattern: str = "unstructured",
    scope: str = "global",
    include_first_last: bool = False,
    include_depthwise: bool = False,
    exclude: str | Sequence[str] = (),
) -> nn.Module:
    """Mask the smallest weights of the Conv1d, Conv2d and Linear layers, in place.

    Exactly ``round(sparsity · numel)`` weights become zero (of equal ones, those that come first), and stay so while
    the model trains. Pruning again with a higher sparsity extends the masks. A weight that several layers share is
    pruned once.

    Args:
        model: The model to prune; stays trainable. Biases are left alone.
        sparsity: Fraction of zeros, 0 to 1, among the weights of the layers that are pruned.
        pattern: "unstructured": any weight may go.
        scope: "global" ranks all weights together, "layer" prunes each layer to ``sparsity``.
        include_first_last: Prune also the first and the last layer in ``model.named_modules()`` order: they hold few
            weights and cost the most accuracy.
        include_depthwise: Prune also depthwise convolutions, of which the same is true: each of their filters has a
            handful of weights.
        exclude: Names of layers, or of modules that hold them, to leave alone; fnmatch patterns.

    Returns:
        ``model``.

    Raises:
        ArgumentError: a sparsity outside 0 to 1 or below what is masked already, an unknown scope, weights that are
            NaN or parametrised otherwise, a pattern in ``exclude`` that matches nothing, nothing left to prune.
        PatternError: an unknown ``pattern``.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity <= 1:
        raise ArgumentError("sparsity", repr(sparsity), "a number from 0 to 1 (the fraction of zeros)")
    if pattern not in PATTERNS:
        raise PatternError("pattern", repr(pattern), f"one of {', '.join(map(repr, PATTERNS))}")
    if scope not in SCOPES:
        raise ArgumentError("scope", repr(scope), f"one of {', '.join(map(repr, SCOPES))}")
    weights = _prunable(model, include_first_last, include_depthwise, exclude)
    for group in [weights] if scope == "global" else [[w] for w in weights]:
        _prune_group(group, sparsity)
    return model


def _prunable(
    model: nn.Module, include_first_last: bool, include_depthwise: bool, exclude: str | Sequence[str]
) -> list[_Weight]:
    """The weights to prune. One that any protected layer shares is protected too."""
    layers = layers_of(model)
    names = list(layers)
    selected = set(select(names, exclude))
    if not include_first_last:
        selected -= {*names[:1], *names[-1:]}
    if not include_depthwise:
        selected -= {name for name in names if is_depthwise(layers[name])}
    protected = {id(weight_parameter(layers[n], n)) for n in names if n not in selected}
    weights: dict[int, _Weight] = {}
    for name in names:
        key = id(weight_parameter(layers[name], name))
        if key not in protected:
            weights.setdefault(key, _Weight(name, [])).layers.append(layers[name])
    if not weights:
        raise ArgumentError("model", f"{len(names)} Conv and Linear layers, none to be pruned", "at least one")
    for w in weights.values():
        if torch.isnan(w.value).any():
            raise ArgumentError("model", f"NaN in the weight of layer {w.name!r}", "weights that can be ranked")
    return list(weights.values())


def _prune_group(group: list[_Weight], sparsity: float) -> None:
    """Mask the ``round(sparsity · numel)`` smallest weights of ``group``, ranked together."""
    sizes: list[int] = [w.value.numel() for w in group]
    count = round(sparsity * sum(sizes))
    score = torch.cat([_score(w) for w in group])
    masked = int((score < 0).sum())
    if count < masked:
        where = f"layer {group[0].name!r}" if len(group) == 1 else "the model"
        raise ArgumentError("sparsity", sparsity, f"at least {masked / sum(sizes):.4f}, which {where} has already")
    keep = _keep_largest(score, count)
    for w, k in zip(group, torch.split(keep, sizes), strict=True):
        apply_mask(w.layers, k.view(w.value.shape).to(w.value.device))


def _score(w: _Weight) -> Tensor:
    """Magnitudes as a flat float32 or float64 vector on the CPU, −1 where masked already."""
    value = w.value
    score = value.abs() if value.dtype == torch.float64 else value.abs().float()
    if w.mask is not None:
        score = score.masked_fill(~w.mask, -1.0)
    return score.flatten().cpu()


def _keep_largest(score: Tensor, count: int) -> Tensor:
    """bool vector, False at the ``count`` smallest of ``score``; among equal ones the first are taken."""
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = score.kthvalue(count).values
    keep = score > threshold
    ties = (score == threshold).nonzero().flatten()
    surplus = int((~keep).sum()) - count
    if surplus:
        keep[ties[-surplus:]] = True
    return keep
