"""Sparsity patterns: which weights must go together, and which of them go.

Weights are seen as (G, K/G, C/G, T): groups, output and input channels of a group, kernel taps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cnncomp.errors import PatternError

#: The forms that :func:`parse_pattern` takes.
PATTERNS = ("unstructured", "n:m", "V:2:M", "RxC", "blockRxC")

_GONE = -1.0  # the score of a weight that is masked already: below all others


def grouped(weight: Tensor, groups: int) -> Tensor:
    """``weight`` (K, C/G, ...) as (G, K/G, C/G, T), T the kernel's taps."""
    k, cg = weight.shape[:2]
    return weight.reshape(groups, k // groups, cg, math.prod(weight.shape[2:]))


@dataclass(frozen=True)
class Blocks:
    """Rectangles of ``rows`` output and ``cols`` input channels at one kernel tap stay or go together.

    They do not cross groups. Where the channels are no multiple, those at the edge are smaller.
    """

    rows: int = 1
    cols: int = 1

    def __str__(self) -> str:
        return "unstructured" if self.rows == self.cols == 1 else f"{self.rows}x{self.cols}"

    def note(self, shape: Sequence[int]) -> str:
        """What is special about a weight of grouped ``shape``, "" if nothing."""
        edges = []
        for have, block, what in ((shape[1], self.rows, "output"), (shape[2], self.cols, "input")):
            if have % block:
                edges.append(f"{have % block} of {block} {what} channels")
        return f"blocks at the edge have {' and '.join(edges)}" if edges else ""

    def unit_ids(self, shape: Sequence[int], device: torch.device) -> tuple[Tensor, int]:
        """int64 of the grouped ``shape``: the number of the block each weight belongs to, and how many there are."""
        g, kg, cg, t = shape
        down, across = -(-kg // self.rows), -(-cg // self.cols)
        row = torch.arange(g, device=device)[:, None] * down + torch.arange(kg, device=device) // self.rows
        col = torch.arange(cg, device=device) // self.cols
        block = row[:, :, None] * across + col
        return block[..., None] * t + torch.arange(t, device=device), g * down * across * t

    def keep(self, scores: Sequence[Tensor], zeros: int) -> list[Tensor]:
        """The masks that leave ``zeros`` weights out, or as many as whole blocks allow without exceeding it.

        Args:
            scores: grouped scores of the weights that are ranked together, on one device; −1 for what is masked already,
                which stays masked.
            zeros: weights to mask, those masked already included.

        Returns:
            bool tensors in the shapes of ``scores``. Blocks are ranked by the mean score of what is left of them; of
            equal ones the first go.
        """
        if self.rows == self.cols == 1:
            flat = keep_largest(torch.cat([s.flatten() for s in scores]), zeros)
            return [k.view(s.shape) for s, k in zip(scores, flat.split([s.numel() for s in scores]), strict=True)]
        means, sizes, members = [], [], []
        for score in scores:
            ids, units = self.unit_ids(score.shape, score.device)
            live = (score > _GONE).flatten()
            count = torch.bincount(ids.flatten()[live], minlength=units)
            total = score.new_zeros(units).index_add_(0, ids.flatten()[live], score.flatten()[live])
            means.append(torch.where(count > 0, total / count.clamp(min=1), _GONE))
            sizes.append(count)
            members.append(ids)
        size = torch.cat(sizes)
        masked = sum(s.numel() for s in scores) - int(size.sum())
        order = torch.sort(torch.cat(means), stable=True).indices
        fits = masked + size[order].cumsum(0) <= zeros
        kept = torch.empty_like(fits)
        kept[order] = ~fits
        parts = kept.split([len(s) for s in sizes])
        return [k[ids] & (s > _GONE) for k, ids, s in zip(parts, members, scores, strict=True)]


@dataclass(frozen=True)
class NM:
    """At most ``n`` non-zeros in each ``m`` consecutive input channels, for each output channel and kernel tap.

    Where a group's input channels are no multiple of m, the last ones count as if zeros followed.
    """

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def note(self, shape: Sequence[int]) -> str:
        """What is special about a weight of grouped ``shape``, "" if nothing."""
        cg = shape[2]
        if cg <= self.n:
            return f"left dense, {cg} input channel{'s' if cg > 1 else ''} per group"
        return f"last {cg % self.m} input channels as if padded to {self.m}" if cg % self.m else ""

    def keep(self, score: Tensor) -> Tensor:
        """bool in the shape of the grouped ``score``: the n largest of each m; of equal ones the last stay."""
        g, kg, cg, t = score.shape
        padded = torch.nn.functional.pad(score, (0, 0, 0, -cg % self.m), value=2 * _GONE)
        quads = padded.view(g, kg, -1, self.m, t)
        rank = torch.sort(quads, dim=3, stable=True).indices.argsort(dim=3)
        keep = (rank >= self.m - self.n).view(padded.shape)[:, :, :cg]
        return keep & (score > _GONE)


@dataclass(frozen=True)
class VNM(NM):
    """Of each m input channels, ``v`` output channels share four, and each has at most n = 2 non-zeros among them.

    VENOM (Castro et al., SC 2023): the four of the largest summed score stay, then of each row the two largest. Output channels
    at the edge of a group share theirs in a smaller block; input channels as in :class:`NM`.
    """

    v: int
    COLUMNS: ClassVar[int] = 4

    def __str__(self) -> str:
        return f"{self.v}:{self.n}:{self.m}"

    def note(self, shape: Sequence[int]) -> str:
        edge = f"last {shape[1] % self.v} output channels share theirs" if shape[1] % self.v else ""
        return "; ".join(filter(None, (super().note(shape), edge)))

    def keep(self, score: Tensor) -> Tensor:
        """bool in the shape of the grouped ``score``; of equal columns and weights the last stay."""
        g, kg, cg, t = score.shape
        alive = torch.nn.functional.pad(score.clamp(min=0), (0, 0, 0, 0, 0, -kg % self.v))
        columns = alive.view(g, -1, self.v, cg, t).sum(2)
        chosen = NM(self.COLUMNS, self.m).keep(columns).repeat_interleave(self.v, 1)[:, :kg]
        return super().keep(torch.where(chosen, score, _GONE))


Pattern = Blocks | NM


def parse_pattern(pattern: str) -> Pattern:
    """The pattern of that name.

    "unstructured"; "n:m", e.g. "2:4"; "V:2:M", e.g. "64:2:16"; "RxC" or "blockRxC": blocks of R output × C input channels,
    so that "1x4" is runs of four along the input channels and "8x1" runs of eight along the output channels.

    Raises:
        PatternError: another form, n not in 1..m−1, M below 5, or an empty block.
    """
    if isinstance(pattern, str):
        if pattern == "unstructured":
            return Blocks()
        if match := re.fullmatch(r"(\d+):(\d+)", pattern):
            n, m = map(int, match.groups())
            if 1 <= n < m:
                return NM(n, m)
        if match := re.fullmatch(r"(\d+):2:(\d+)", pattern):
            v, m = map(int, match.groups())
            if v >= 1 and m > VNM.COLUMNS:
                return VNM(2, m, v)
        if match := re.fullmatch(r"(?:block)?(\d+)x(\d+)", pattern):
            rows, cols = map(int, match.groups())
            if rows >= 1 and cols >= 1:
                return Blocks(rows, cols)
    nm = "'n:m' with 1 <= n < m such as '2:4', 'V:2:M' with M > 4 such as '64:2:16'"
    forms = f"'unstructured', {nm}, 'RxC' such as '1x4' or '8x1', 'blockRxC'"
    raise PatternError("pattern", repr(pattern), f"one of {forms}")


def keep_largest(score: Tensor, count: int) -> Tensor:
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
