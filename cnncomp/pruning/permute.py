"""Channel permutation for n:m: an order of the input channels in which the pattern keeps more of the weights' magnitude.

After Pool and Yu, "Channel Permutations for N:M Sparsity" (2021), whose search this one follows in spirit: pairs of channels
in different groups are swapped while that gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp._batches import evaluating
from cnncomp.errors import ArgumentError, PatternError
from cnncomp.graph import graph_of
from cnncomp.progress import track
from cnncomp.pruning.criteria import as_float
from cnncomp.pruning.patterns import NM, parse_pattern
from cnncomp.pruning.spaces import reorder, spaces_of
from cnncomp.pruning.targets import Target


@dataclass(frozen=True)
class Permutation:
    """A reordering: ``layers`` whose input channels it concerns, ``order`` (C,) int64, and the sum of the magnitudes that n:m
    keeps in these layers, before and after."""

    layers: tuple[str, ...]
    order: Tensor
    kept_before: float
    kept: float


def permute_channels(
    model: nn.Module, targets: Sequence[Target], pattern: str, example_inputs: tuple[Any, ...], progress: bool = True
) -> list[Permutation]:
    """Reorder channels in place so that n:m pruning of ``targets`` keeps more magnitude; the model computes the same.

    A layer's input channels are reordered together with the output channels of the layers that produce them, with
    BatchNorm and depthwise layers in between, and with the inputs of all other layers that read them; through activations,
    pooling and sums, as tracing finds. Nothing is left to be done at run time. Where something else reads the channels (a
    concatenation, a grouped convolution, a view, the caller), they stay in order. The state of an optimiser that was made
    before does not follow.

    Args:
        targets: what is going to be pruned (:func:`cnncomp.pruning.targets_of`).
        pattern: "n:m".
        example_inputs: positional arguments of the model's forward, on its device.

    Returns:
        What was reordered. Layers not named in any of them stay in order.

    Raises:
        PatternError: another pattern.
        ArgumentError: the model can't be traced.
    """
    parsed = parse_pattern(pattern)
    if not isinstance(parsed, NM):
        raise PatternError("pattern", repr(pattern), "an n:m pattern, which an order of channels matters to")
    by_name = {layer_name: t for t in targets for layer_name in [t.name] if len(t.layers) == 1}
    found = []
    with evaluating(model):
        gm = graph_of(model, example_inputs)
        if gm is None:
            raise ArgumentError("model", "a model that can't be traced", "one that torch.fx can trace")
        spaces = [s for s in spaces_of(gm, example_inputs) if any(name in by_name for name in s.consumers)]
    with track("permuting channels", len(spaces), progress) as advance:
        for space in spaces:
            names = [name for name in space.consumers if name in by_name]
            score = torch.cat([_rows(by_name[name]) for name in names])
            order, before, kept = find_order(score, parsed)
            if kept > before:
                reorder(model, space, order)
                found.append(Permutation(tuple(names), order, before, kept))
            advance(names[0])
    return found


def _rows(target: Target) -> Tensor:
    """Magnitudes (K·T, C)."""
    weight = as_float(target.value).abs()
    return weight.flatten(2).transpose(1, 2).flatten(0, 1) if weight.dim() > 2 else weight


def find_order(score: Tensor, pattern: NM, rounds: int = 200) -> tuple[Tensor, float, float]:
    """An order of the columns of ``score`` (rows, C; non-negative) in which n of each m consecutive ones add up to more.

    From the present order, the swaps of two columns that gain the most are made, in each round at most one per group of m,
    until none gains. Deterministic.

    Returns:
        order (C,) int64, what n:m keeps now, and what it keeps of ``score[:, order]``.
    """
    n, m, c = pattern.n, pattern.m, score.shape[1]
    padded = torch.nn.functional.pad(score, (0, -c % m))
    order = torch.arange(padded.shape[1], device=score.device)
    kept = _kept(padded, n, m)
    before = float(kept.sum())
    gain = padded.new_zeros(
        len(order), len(order)
    )  # [i, j]: what i's group keeps with j in the place of i, by position
    changed = torch.arange(len(kept), device=score.device)
    for _ in range(rounds):
        gain = _gains(padded, order, kept, changed, gain, n, m)
        swaps = _best_swaps(gain, c, m, order, tolerance=1e-6 * before)
        if not swaps:
            break
        for i, j in swaps:
            order[[i, j]] = order[[j, i]]
            gain[:, [i, j]] = gain[:, [j, i]]
        changed = torch.tensor(sorted({p // m for swap in swaps for p in swap}), device=score.device)
        kept[changed] = _kept(padded[:, order.view(-1, m)[changed].flatten()], n, m)
    real = order[order < c]
    return real, before, float(kept.sum())


def _kept(columns: Tensor, n: int, m: int) -> Tensor:
    """What is kept of each group of m columns, as float64."""
    return columns.unflatten(1, (-1, m)).topk(n, dim=2).values.sum((0, 2), dtype=torch.float64)


def _gains(padded: Tensor, order: Tensor, kept: Tensor, changed: Tensor, gain: Tensor, n: int, m: int) -> Tensor:
    """Rows of ``gain`` anew for the positions in the ``changed`` groups.

    With the others of the group in descending order a₁ ≥ … ≥ aₘ₋₁, x in the place of i keeps a₁ + … + aₙ + max(0, x − aₙ).
    """
    columns = padded[:, order]
    for i in (changed[:, None] * m + torch.arange(m, device=changed.device)).flatten().tolist():
        group = i // m
        others = [p for p in range(group * m, group * m + m) if p != i]
        top = columns[:, others].topk(n, dim=1).values
        base = top.sum(dtype=torch.float64) - kept[group]
        gain[i] = (columns - top[:, -1:]).clamp_(min=0).sum(0) + base
    return gain


def _best_swaps(gain: Tensor, c: int, m: int, order: Tensor, tolerance: float) -> list[tuple[int, int]]:
    """Swaps that gain more than ``tolerance``, the best first, no group in two of them."""
    total = gain + gain.t()
    group = torch.arange(len(total), device=total.device) // m
    total.masked_fill_(group[:, None] == group, 0)
    padding = order >= c
    total.masked_fill_(padding[:, None] | padding, 0)
    total = total.triu()
    best = total.flatten().topk(min(total.numel(), 16 * len(total)))
    swaps, used = [], set()
    for value, at in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        i, j = divmod(at, len(total))
        if value <= tolerance:
            break
        if i // m not in used and j // m not in used:
            used |= {i // m, j // m}
            swaps.append((i, j))
    return swaps
