"""How many units each group loses."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cnncomp.structured.graph import Group


def step_of(group: Group, round_to: int) -> int:
    """The fewest units that can go at once so that all its layers keep multiples of ``round_to`` channels."""
    step = 1
    for d in group.producers:
        step = math.lcm(step, round_to // math.gcd(round_to, d.index.shape[1]))
    return step


def choose(
    groups: Sequence[Group], scores: Sequence[Tensor], sparsity: float, round_to: int = 1, limit: float = 0.9
) -> list[Tensor]:
    """The units to remove from each group (bool, one per unit), ranked together.

    Of all units that the groups had before any pruning, at most ``round(sparsity · units)`` are gone afterwards. Groups
    give up their lowest units in blocks, as small as ``round_to`` allows; always the block of the lowest mean score is
    next, the first of equal ones; one that would exceed the number ends its group. Choosing again from what is left
    therefore chooses nothing.

    Args:
        limit: no group loses more than this fraction of its units (or than ``sparsity``, if that is more), or its last
            block.
    """
    total = sum(g.before for g in groups)
    left = round(sparsity * total) - sum(g.before - len(g) for g in groups)
    gone = [torch.zeros(len(g), dtype=torch.bool) for g in groups]
    orders = [torch.sort(s, stable=True).indices for s in scores]
    heap: list[tuple[float, int, int]] = []  # mean score, group, units gone before the block

    def push(i: int, start: int) -> None:
        step = step_of(groups[i], round_to)
        block = (len(groups[i]) - start) % step or step
        floor = max(step, math.ceil((1 - max(limit, sparsity)) * groups[i].before - 1e-9))
        if len(groups[i]) - start - block >= floor:
            mean = float(scores[i][orders[i][start : start + block]].mean())
            heapq.heappush(heap, (mean, i, start + block))

    starts = [0] * len(groups)
    for i in range(len(groups)):
        push(i, 0)
    while heap:
        _, i, end = heapq.heappop(heap)
        block = end - starts[i]
        if block > left:
            continue
        gone[i][orders[i][starts[i] : end]] = True
        left -= block
        starts[i] = end
        push(i, end)
    return gone
