"""Pruning in one call: score the weights, share the sparsity out, mask those that go."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cnncomp._batches import inputs_of
from cnncomp._modules import check_fraction
from cnncomp.errors import ArgumentError
from cnncomp.pruning import allocation as alloc
from cnncomp.pruning.criteria import Loss, as_batches, given_scores, score_targets
from cnncomp.pruning.mask import apply_mask
from cnncomp.pruning.patterns import NM, Pattern, grouped, parse_pattern
from cnncomp.pruning.permute import permute_channels
from cnncomp.pruning.targets import Target, targets_of

SCOPES = ("global", "layer")
DEFAULT_SPARSITY = 0.9

Allocation = str | Mapping[str, float]


@dataclass(frozen=True)
class Ranking:
    """Targets with their scores, grouped as patterns see them; −1 where masked already."""

    targets: list[Target]
    scores: list[Tensor]
    pattern: Pattern

    def masks(self, zeros: Sequence[int]) -> list[Tensor]:
        """One mask per target, in the weight's shape, with that many zeros at most."""
        return [self.mask(i, n) for i, n in enumerate(zeros)]

    def mask(self, i: int, zeros: int) -> Tensor:
        """The mask of target ``i`` with at most ``zeros`` zeros (for n:m: with those that the pattern asks for)."""
        score = self.scores[i]
        keep = self.pattern.keep(score) if isinstance(self.pattern, NM) else self.pattern.keep([score], zeros)[0]
        return self._shaped(i, keep)

    def masks_together(self, zeros: int) -> list[Tensor]:
        """The masks when all weights are ranked together."""
        assert not isinstance(self.pattern, NM)
        kept = self.pattern.keep([s.cpu() for s in self.scores], zeros)
        return [self._shaped(i, keep) for i, keep in enumerate(kept)]

    def _shaped(self, i: int, keep: Tensor) -> Tensor:
        parameter = self.targets[i].parameter
        return keep.reshape(parameter.shape).to(parameter.device)

    def note(self, i: int) -> str:
        return self.pattern.note(self.scores[i].shape)


def prune(
    model: nn.Module,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    scope: str = "global",
    include_first_last: bool = False,
    include_depthwise: bool = False,
    exclude: str | Sequence[str] = (),
    *,
    criterion: str = "magnitude",
    allocation: Allocation | None = None,
    scores: Mapping[str, Tensor] | None = None,
    data: Iterable[Any] | Tensor | None = None,
    loss: Loss | None = None,
    permute: bool = False,
    reconstruct: bool = False,
    progress: bool = True,
    example_inputs: Any = None,
    round_to: int = 1,
) -> nn.Module:
    """Mask the least important weights of the Conv1d, Conv2d and Linear layers, in place.

    Unstructured, exactly ``round(sparsity · numel)`` weights become zero (of equal ones, those that come first), and stay
    so while the model trains; in blocks, as many as whole blocks allow without exceeding that. Pruning again with a
    higher sparsity extends the masks. A weight that several layers share is pruned once. The same arguments give the
    same masks.

    Args:
        model: The model to prune; stays trainable. Biases are left alone.
        sparsity: Fraction of zeros, 0 to 1, among the weights of the layers that are pruned. None: 0.9, or what an n:m
            pattern gives, which takes no other.
        pattern: "unstructured": any weight may go. "n:m", e.g. "2:4": at most n non-zeros in each m consecutive input
            channels. "V:2:M", e.g. "64:2:16": of each M input channels, V output channels share four, and each keeps two
            of them (GPU kernels are for V = 64). "RxC" or "blockRxC": R output × C input channels at one kernel tap stay
            or go together, so that "1x4" is runs along the input channels, "8x1" runs along the output channels,
            "block16x16" both. Channels are counted within a group. Where they are no multiple, blocks at the edge are
            smaller, n:m counts as if zeros followed, and a layer with n input channels or fewer stays dense:
            :func:`cnncomp.sparsity_of` says so. "channel" takes whole channels out and masks nothing:
            :func:`cnncomp.prune_channels`, by default half of them.
        scope: "global" ranks all weights together, "layer" prunes each layer to ``sparsity``.
        include_first_last: Prune also the first and the last layer in ``model.named_modules()`` order: they hold few
            weights and cost the most accuracy.
        include_depthwise: Prune also depthwise convolutions, of which the same is true: each of their filters has a
            handful of weights.
        exclude: Names of layers, or of modules that hold them, to leave alone; fnmatch patterns.
        criterion: "magnitude", "taylor", "fisher" or "article" (:func:`cnncomp.pruning.score_targets`).
        allocation: How sparsity is shared out between layers. None: as ``scope`` says. "global" and "uniform" are its two
            values; "erdos-renyi" and "erdos-renyi-kernel" leave small layers denser; "sensitivity" measures on ``data``
            how each layer's sparsity changes the outputs; a mapping from layer names to sparsities, ``sparsity`` for the
            others.
        scores: Importance by layer name, in the weights' shapes, in place of ``criterion``; the lowest go.
        data: Batches for criteria that need gradients, for "sensitivity" and for ``reconstruct``: inputs, or sequences of
            inputs and labels; a tensor is one batch. All are held in memory.
        loss: From the model's output and the batch to a scalar. None: cross-entropy with the labels, or with the model's
            own first class where there are none.
        permute: For n:m: first reorder channels, where tracing on ``data`` shows that their layers can take it, so that more
            magnitude is kept (:func:`cnncomp.pruning.permute_channels`). The model computes the same as before that.
        reconstruct: Choose in each layer, of as many weights as ``allocation`` says, those that its outputs on ``data``
            depend on least, and change the others, the biases and the running means of BatchNorm so that the outputs stay
            what they were (:mod:`cnncomp.pruning.reconstruct`). No labels, no training: a few hundred typical inputs,
            the more varied the better.
        progress: Show a bar on a terminal when it takes more than a second.
        example_inputs, round_to: as in :func:`cnncomp.prune_channels`, for pattern "channel" only.

    Returns:
        ``model``. A layer of which nothing is left is named in a warning; so is the reason why no channel goes.

    Raises:
        ArgumentError: a sparsity outside 0 to 1 or below what is masked already, or not an n:m pattern's own; an unknown
            scope, criterion or allocation, or one that needs data without it; weights that are NaN or parametrised
            otherwise; a pattern in ``exclude`` that matches nothing; nothing left to prune. The model is unchanged then.
        PatternError: an unknown ``pattern``.
        CalibrationError: no batch, or one that can't be used.
    """
    if pattern == "channel":
        from cnncomp.structured import prune_channels  # which stands above this package

        if allocation is not None or scores is not None or reconstruct:
            got = "'channel' with allocation, scores or reconstruct"
            raise ArgumentError("pattern", got, "none of them (scope says how to share out)")
        wanted = 0.5 if sparsity is None else sparsity
        taken = dict(scope=scope, criterion=criterion, data=data, loss=loss, round_to=round_to, exclude=exclude)
        return prune_channels(model, wanted, example_inputs, **taken)  # type: ignore[arg-type]
    parsed = parse_pattern(pattern)
    sparsity = check_sparsity(sparsity, parsed)
    allocation = check_allocation(allocation, scope, parsed)
    targets = targets_of(model, include_first_last, include_depthwise, exclude)
    batches = None if data is None else list(as_batches(data))
    if permute and scores is not None:
        raise ArgumentError("scores", "scores with permute", "one of them: scores would not follow the channels")
    permuted = _permute(model, targets, parsed, batches, progress) if permute else set()
    ranking = rank(targets, model, parsed, criterion, scores, batches, loss)
    masks = choose_masks(ranking, sparsity, allocation, model, batches, progress)
    if sparsity < 1 and (emptied := [t.name for t, m in zip(targets, masks, strict=True) if not m.any()]):
        advice = "lower the sparsity, exclude them, or take scope='layer'"
        warnings.warn(f"nothing is left of {', '.join(emptied)}: {advice}", UserWarning, stacklevel=2)
    if not reconstruct:
        for i, mask in enumerate(masks):
            apply_mask(targets[i].layers, mask, str(parsed), _note(ranking, i, permuted))
        return model
    from cnncomp.pruning.reconstruct import solve_targets  # which traces: cnncomp.graph knows of masks

    if batches is None:
        raise ArgumentError("data", None, "batches to reconstruct on")
    solved = solve_targets(model, targets, [int((~m).sum()) for m in masks], parsed, batches, progress=progress)
    for i, t in enumerate(targets):
        if t.name in solved:
            solved[t.name].write(t.layers, solved[t.name].norm, parsed, _note(ranking, i, permuted))
    return model


def _permute(
    model: nn.Module, targets: list[Target], pattern: Pattern, batches: list[Any] | None, progress: bool
) -> set[str]:
    """Reorder channels; names of the layers whose input channels are in another order now."""
    if not batches:
        raise ArgumentError("data", batches, "batches, one of which permute traces the model on")
    args, kwargs = inputs_of(batches[0], 0, targets[0].parameter.device)
    if kwargs:
        raise ArgumentError("data", "keyword arguments", "positional ones, to trace the model with")
    one = tuple(x[:1] if x.dim() else x for x in args)
    return {name for p in permute_channels(model, targets, str(pattern), one, progress) for name in p.layers}


def _note(ranking: Ranking, i: int, permuted: set[str]) -> str:
    notes = [ranking.note(i), "input channels permuted" if ranking.targets[i].name in permuted else ""]
    return "; ".join(note for note in notes if note)


def check_sparsity(sparsity: float | None, pattern: Pattern) -> float:
    """The sparsity to prune to.

    Raises:
        ArgumentError: outside 0 to 1, or not the one that n:m gives.
    """
    if sparsity is None:
        return pattern.sparsity if isinstance(pattern, NM) else DEFAULT_SPARSITY
    check_fraction("sparsity", sparsity, "zeros")
    if isinstance(pattern, NM) and abs(sparsity - pattern.sparsity) > 1e-3:
        raise ArgumentError("sparsity", sparsity, f"None or {pattern.sparsity:.4g}, which pattern '{pattern}' gives")
    return float(sparsity)


def check_allocation(allocation: Allocation | None, scope: str, pattern: Pattern) -> Allocation:
    """The allocation to use.

    Raises:
        ArgumentError: an unknown allocation or scope, or one for n:m, where every layer has the same sparsity.
    """
    if scope not in SCOPES:
        raise ArgumentError("scope", repr(scope), f"one of {', '.join(map(repr, SCOPES))}")
    if isinstance(pattern, NM):
        if allocation not in (None, "uniform"):
            raise ArgumentError("allocation", repr(allocation), f"None: pattern '{pattern}' gives each layer the same")
        return "uniform"
    if allocation is None:
        return "global" if scope == "global" else "uniform"
    if not isinstance(allocation, Mapping) and allocation not in alloc.ALLOCATIONS:
        expected = f"one of {', '.join(map(repr, alloc.ALLOCATIONS))}, or sparsities by layer name"
        raise ArgumentError("allocation", repr(allocation), expected)
    return allocation


def rank(
    targets: list[Target],
    model: nn.Module,
    pattern: Pattern,
    criterion: str = "magnitude",
    scores: Mapping[str, Tensor] | None = None,
    data: Iterable[Any] | Tensor | None = None,
    loss: Loss | None = None,
) -> Ranking:
    """Score the targets, by ``criterion`` or by what the caller gives."""
    found = score_targets(targets, model, criterion, data, loss) if scores is None else given_scores(targets, scores)
    marked = [s if t.mask is None else s.masked_fill(~t.mask, -1.0) for t, s in zip(targets, found, strict=True)]
    return Ranking(targets, [grouped(s, t.groups) for t, s in zip(targets, marked, strict=True)], pattern)


def choose_masks(
    ranking: Ranking,
    sparsity: float,
    allocation: Allocation,
    model: nn.Module,
    data: Iterable[Any] | Tensor | None = None,
    progress: bool = True,
) -> list[Tensor]:
    """A mask for each target of ``ranking``."""
    targets = ranking.targets
    if allocation == "global":
        total = sum(t.numel for t in targets)
        zeros = round(sparsity * total)
        _check_extends(zeros, sum(t.masked for t in targets), total, sparsity, "the model")
        return ranking.masks_together(zeros)
    counts = _zeros_per_target(ranking, sparsity, allocation, model, data, progress)
    if not isinstance(ranking.pattern, NM):
        for t, zeros in zip(targets, counts, strict=True):
            _check_extends(zeros, t.masked, t.numel, zeros / t.numel, f"layer {t.name!r}")
    return ranking.masks(counts)


def _zeros_per_target(
    ranking: Ranking, sparsity: float, allocation: Allocation, model: nn.Module, data: Any, progress: bool
) -> list[int]:
    targets = ranking.targets
    if isinstance(allocation, Mapping):
        return alloc.explicit(targets, sparsity, allocation)
    if allocation == "uniform":
        return alloc.uniform(targets, sparsity)
    if allocation == "sensitivity":
        if data is None:
            raise ArgumentError("data", None, "batches to measure on, which allocation 'sensitivity' needs")
        total = sum(t.numel for t in targets)
        zeros = round(sparsity * total)
        _check_extends(zeros, sum(t.masked for t in targets), total, sparsity, "the model")
        errors = alloc.sensitivity_of(targets, model, data, ranking.mask, progress=progress)
        return alloc.by_sensitivity(targets, sparsity, errors)
    return alloc.erdos_renyi(targets, sparsity, kernel=allocation == "erdos-renyi-kernel")


def _check_extends(zeros: int, masked: int, numel: int, sparsity: float, where: str) -> None:
    if zeros < masked:
        raise ArgumentError("sparsity", sparsity, f"at least {masked / numel:.4f}, which {where} has already")
