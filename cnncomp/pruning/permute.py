"""Channel permutation for n:m: an order of the input channels in which the pattern keeps more of the weights' magnitude.

After Pool and Yu, "Channel Permutations for N:M Sparsity" (2021), whose search this one follows in spirit: pairs of channels
in different groups are swapped while that gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cnncomp._modules import parametrization_of
from cnncomp.errors import PatternError
from cnncomp.progress import track
from cnncomp.pruning.criteria import as_float
from cnncomp.pruning.mask import Mask
from cnncomp.pruning.patterns import NM, parse_pattern
from cnncomp.pruning.targets import Target

if TYPE_CHECKING:  # channel pruning builds on this package
    from cnncomp.structured.graph import Dependency, Group


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

    A layer's input channels are reordered together with all that depends on them, as :func:`cnncomp.channels_of` finds: the
    output channels of the layers that make them, BatchNorm and depthwise layers in between, the inputs of all other layers
    that read them. Nothing is left to be done at run time. Where something else reads the channels, they stay in order. The
    state of an optimiser that was made before does not follow.

    Args:
        targets: what is going to be pruned (:func:`cnncomp.pruning.targets_of`).
        pattern: "n:m".
        example_inputs: positional arguments of the model's forward, on its device.

    Returns:
        What was reordered. Layers not named in any of them stay in order.

    Raises:
        PatternError: another pattern.
    """
    from cnncomp.structured import channels_of

    parsed = parse_pattern(pattern)
    if type(parsed) is not NM:  # V:2:M chooses its columns
        raise PatternError("pattern", repr(pattern), "an n:m pattern, which an order of channels matters to")
    by_name = {t.name: t for t in targets if len(t.layers) == 1 and t.groups == 1}
    groups = channels_of(model, example_inputs).groups
    found = []
    with track("permuting channels", len(groups), progress) as advance:
        for group in groups:
            readers = [d for d in group.dependencies if d.node.name in by_name and _in_order(d, parsed.m)]
            if readers:
                score = torch.cat([_rows(by_name[d.node.name], d.index[:, 0]) for d in readers])
                order, before, kept = find_order(score, parsed)
                if kept > before:
                    reorder(group, order)
                    found.append(Permutation(tuple(d.node.name for d in readers), order, before, kept))
            advance(group.name)
    return found


def _in_order(d: Dependency, m: int) -> bool:
    """Whether the group's units are consecutive input channels of the layer, in whole groups of m up to its last."""
    if d.axis != "in" or d.index.shape[1] != 1:
        return False
    first, units = int(d.index[0]), len(d.index)
    consecutive = torch.equal(d.index[:, 0], torch.arange(first, first + units))
    return consecutive and first % m == 0 and (units % m == 0 or first + units == d.node.size("in"))


def _rows(target: Target, channels: Tensor) -> Tensor:
    """Magnitudes (K·T, C) of these input channels."""
    weight = as_float(target.value).abs().flatten(2 if target.value.dim() > 2 else 1)
    weight = weight if weight.dim() > 2 else weight[:, :, None]
    return weight.transpose(1, 2).flatten(0, 1)[:, channels.to(weight.device)]


@torch.no_grad()
def reorder(group: Group, order: Tensor) -> None:
    """Put the group's units in ``order`` (int64): the model computes the same as before."""
    for d in group.dependencies:
        node = d.node
        old, new = d.index[order.cpu()].flatten(), d.index.flatten()
        mask = parametrization_of(node.module, Mask)
        tensors = [*(x for _, x in node.tensors()), *([] if mask is None else [mask.mask])]
        if d.axis == "out":
            for x in tensors:
                x[new.to(x.device)] = x[old.to(x.device)]
            continue
        weights = [x for x in tensors if x.dim() > 1]
        per_group = weights[0].shape[1]
        if per_group < node.size("in"):
            if getattr(node, "by_group", False):
                continue  # whole groups move: their inputs with their outputs
            # The same channels of each group move: one column holds them all.
            old, new = old[new < per_group], new[new < per_group]
        for x in weights:
            x[:, new.to(x.device)] = x[:, old.to(x.device)]


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
