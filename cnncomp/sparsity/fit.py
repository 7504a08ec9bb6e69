"""Which patterns a weight has already, and how far it is from those that it doesn't.

So a model that was pruned elsewhere finds its kernels, and one that was not learns what a pattern would cost it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cnncomp.errors import PatternError
from cnncomp.sparsity.blocks import DTYPES, as_blocks, first_partial, kept_fraction
from cnncomp.sparsity.two_four import first_violation
from cnncomp.sparsity.vnm import COLUMNS, check_sizes, first_violation_vnm
from cnncomp.sparsity.weights import check_weight

#: Patterns that the GPU kernels and their formats are for.
PATTERNS = ("2:4", "64:2:8", "64:2:16", "16x1", "32x1", "64x1", "16x16", "32x32", "64x64")


class Fit(NamedTuple):
    """How a weight fits a pattern.

    Attributes:
        pattern: As it was asked for.
        satisfied: Whether the weight has it.
        first: The first group of weights that breaks it, in words; "" if none.
        error: Of a near weight that has it, ‖w − ŵ‖² / ‖w‖²: 0 if satisfied. For n:m it is the nearest; for V:2:M the columns
            of most energy, and of these the largest; for blocks those of most energy, just enough to hold as many weights as
            are not zero.
        work: Multiplications left of the dense ones: n/m, 2/M, or the blocks with any non-zero, for in blocks every weight can
            be packed as it is.
    """

    pattern: str
    satisfied: bool
    first: str
    error: float
    work: float


def fits(weight: Tensor, groups: int = 1, patterns: Sequence[str] = PATTERNS) -> list[Fit]:
    """How a weight fits each of ``patterns``.

    Args:
        weight: (K, C/G, R, S) int8, float16, bfloat16 or float32.
        groups: G.
        patterns: "n:m"; "V:2:M"; "RxC", blocks of R output and C input channels at one tap, so that "32x1" are runs of 32
            outputs.

    Raises:
        PatternError: another form of a pattern.
        DtypeError, ArgumentError: as :func:`cnncomp.sparsity.weights.check_weight`; an empty block, M out of 4..256.
    """
    check_weight(weight, groups, DTYPES)
    energy = weight.float().square()
    return [_fit(weight, energy, groups, pattern) for pattern in patterns]


def _fit(weight: Tensor, energy: Tensor, groups: int, pattern: str) -> Fit:
    if match := re.fullmatch(r"(\d+):(\d+)", pattern):
        n, m = map(int, match.groups())
        if 1 <= n < m:
            first = first_violation(weight, n, m)
            return Fit(pattern, not first, first or "", _lost(energy, _best_nm(energy, n, m)) if first else 0.0, n / m)
    elif match := re.fullmatch(r"(\d+):2:(\d+)", pattern):
        v, m = map(int, match.groups())
        check_sizes(v, m)
        first = first_violation_vnm(weight, v, m, groups)
        error = _lost(energy, _best_vnm(energy, v, m, groups)) if first else 0.0
        return Fit(pattern, not first, first or "", error, 2 / m)
    elif match := re.fullmatch(r"(\d+)x(\d+)", pattern):
        rows, cols = map(int, match.groups())
        first = first_partial(weight, rows, cols, groups)
        error = _lost(energy, _best_blocks(weight, energy, rows, cols, groups)) if first else 0.0
        return Fit(pattern, not first, first or "", error, kept_fraction(weight, rows, cols, groups))
    raise PatternError("patterns", repr(pattern), "'n:m' with 1 <= n < m, 'V:2:M' or 'RxC'")


def _lost(energy: Tensor, kept: Tensor) -> float:
    """The part of the energy that is not kept."""
    total = float(energy.sum(dtype=torch.float64))
    return max(0.0, 1 - float(kept) / total) if total else 0.0


def _best_nm(energy: Tensor, n: int, m: int) -> Tensor:
    """Energy of the n largest of each m input channels."""
    k, c, *taps = energy.shape
    groups = F.pad(energy, (0, 0, 0, 0, 0, -c % m)).reshape(k, -1, m, *taps)
    return groups.topk(n, 2).values.sum(dtype=torch.float64)


def _best_vnm(energy: Tensor, v: int, m: int, groups: int) -> Tensor:
    """Energy of the two largest, of each output channel, among the four input channels of most energy of each V x M."""
    blocks = as_blocks(energy, v, m, groups)
    columns = blocks.sum(1, keepdim=True).topk(COLUMNS, 3).indices.expand(-1, v, -1, -1, -1)
    return blocks.gather(3, columns).topk(2, 3).values.sum(dtype=torch.float64)


def _best_blocks(weight: Tensor, energy: Tensor, rows: int, cols: int, groups: int) -> Tensor:
    """Energy of the blocks of most energy, as many as hold the weight's non-zeros."""
    blocks = as_blocks(energy, rows, cols, groups).sum((1, 3)).flatten()
    count = -(-int(torch.count_nonzero(weight)) // (rows * cols))
    return blocks.topk(min(count, len(blocks))).values.sum(dtype=torch.float64)
