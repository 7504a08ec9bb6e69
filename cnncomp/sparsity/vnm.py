"""V:2:M: of each M input channels a block of V output channels keeps four, and of those each output channel two.

The hierarchy of VENOM (Castro et al., "VENOM: A Vectorized N:M Format for Unleashing the Power of Sparse Tensor Cores", SC
2023): 1 - 2/M zeros, on tensor cores that know 2:4 alone. What is kept of the columns is a 2:4 weight of 4 * CM input channels,
CM = ceil(C/G / M), which is packed as :mod:`cnncomp.sparsity.two_four` does; beside it stand the columns' numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError, PatternError
from cnncomp.sparsity.blocks import as_blocks
from cnncomp.sparsity.two_four import first_violation, pack_2to4, unpack_2to4
from cnncomp.sparsity.weights import DTYPES, check_weight, place

COLUMNS = 4  # that are kept of M


class PackedVNM(NamedTuple):
    """A V:2:M weight.

    ``values``: the 2:4 weight of what is left, (K, 4 * CM, R, S) before :func:`cnncomp.sparsity.pack_2to4`; ``columns``: uint8
    (G, KB, CM, R * S, 4), KB = ceil(K/G / V): the channels kept of each M, ascending. Where C/G is no multiple of M, the last
    may lie beyond it; their weights are zero.
    """

    values: Tensor
    columns: Tensor


def check_sizes(v: int, m: int) -> None:
    """Raise :class:`ArgumentError` for a V or M that no V:2:M has."""
    if v < 1:
        raise ArgumentError("v", v, "at least 1")
    if not COLUMNS <= m <= 256:
        raise ArgumentError("m", m, "4 to 256")


def first_violation_vnm(weight: Tensor, v: int, m: int, groups: int = 1) -> str | None:
    """The first group of V x M weights of ``weight`` (K, C/G, R, S) that is not V:2:M, in words."""
    k, c, _, s = weight.shape
    blocks = as_blocks(weight != 0, v, m, groups)
    used = blocks.any(1).sum(2)
    most = blocks.sum(3).amax(1)
    wrong = ((used > COLUMNS) | (most > 2)).nonzero()
    if not len(wrong):
        return None
    block, cm, tap = wrong[0].tolist()
    per_group = len(blocks) // groups
    first = block // per_group * (k // groups) + block % per_group * v
    last = min(first + v, (block // per_group + 1) * (k // groups)) - 1
    columns, row = int(used[block, cm, tap]), int(most[block, cm, tap])
    number = f"{columns} channels with non-zeros" if columns > COLUMNS else f"{row} non-zeros of an output channel"
    return f"{number} at " + place((first, last), (cm * m, min(c, (cm + 1) * m) - 1), (tap // s, tap % s))


def pack_vnm(weight: Tensor, v: int, m: int, groups: int = 1) -> PackedVNM:
    """Pack a V:2:M weight.

    Args:
        weight: (K, C/G, R, S) int8, float16 or bfloat16.
        v: Output channels that share their columns.
        m: Input channels of which four are kept, 4 to 256.
        groups: G.

    Raises:
        PatternError: another pattern; it names the first V x M weights that break it.
        DtypeError, ArgumentError: as :func:`cnncomp.sparsity.pack_2to4`; sizes out of range.
    """
    check_weight(weight, groups, DTYPES)
    check_sizes(v, m)
    blocks = as_blocks(weight, v, m, groups)  # (blocks, V, CM, M, taps)
    used = (blocks != 0).any(1).transpose(2, 3)  # (blocks, CM, taps, M)
    if int(used.sum(3).amax()) > COLUMNS or first_violation(weight, 2, m):
        raise PatternError("weight", first_violation_vnm(weight, v, m, groups), f"{v}:2:{m}")
    # The used ones first, then the lowest: all different, and zero where they are not used.
    columns = used.to(torch.uint8).sort(dim=3, descending=True, stable=True).indices[..., :COLUMNS].sort(3).values
    where = columns.transpose(2, 3)[:, None].expand(-1, v, -1, -1, -1)
    compact = _to_weight(blocks.gather(3, where), weight.shape, groups)
    return PackedVNM(pack_2to4(compact, groups), columns.to(torch.uint8).unflatten(0, (groups, -1)))


def _to_weight(blocks: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    """Blocks (G * KB, V, CM, n, taps) to a weight (K, CM * n, R, S), without the rows that were filled up."""
    k, _, r, s = shape
    rows = blocks.reshape(groups, -1, *blocks.shape[2:])[:, : k // groups]
    return rows.reshape(k, -1, r, s)


def unpack_vnm(packed: PackedVNM, shape: Sequence[int], dtype: torch.dtype, v: int, m: int, groups: int = 1) -> Tensor:
    """The inverse of :func:`pack_vnm`: the weight of ``shape`` (K, C/G, R, S) and ``dtype``."""
    k, c, r, s = shape
    columns = packed.columns.flatten(0, 1).long()
    compact = unpack_2to4(packed.values, (k, COLUMNS * columns.shape[1], r, s), dtype, groups)
    blocks = as_blocks(compact, v, COLUMNS, groups)
    where = columns.transpose(2, 3)[:, None].expand(-1, v, -1, -1, -1)
    full = blocks.new_zeros(*blocks.shape[:3], m, r * s).scatter_(3, where, blocks)
    return _to_weight(full, shape, groups)[:, :c].contiguous()
