"""Blocks of weights that stay or go together: runs of V output channels (1xV), and rectangles.

The output channels of each group form KB = ceil(K/G / rows) blocks, its input channels CB = ceil(C/G / cols), filled up with
zeros. A block of output channels keeps the positions at which any of its weights is not zero, ascending; a position is
``(cb * R + r) * S + s``. With ``cols=1``, its outputs share one list of (c, r, s).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.sparsity.weights import check_weight, place

DTYPES = (torch.int8, torch.float16, torch.bfloat16, torch.float32)


class PackedBlocks(NamedTuple):
    """A weight of T kept blocks.

    ``values``: (T, rows, cols), of the weight's dtype; ``positions``: (T,) int32; ``block_ptr``: (G * KB + 1,) int32, block b
    of output channels owns ``positions[block_ptr[b]:block_ptr[b + 1]]``.
    """

    values: Tensor
    positions: Tensor
    block_ptr: Tensor


def as_blocks(weight: Tensor, rows: int, cols: int, groups: int = 1) -> Tensor:
    """``weight`` (K, C/G, R, S) as (G * KB, rows, CB, cols, R * S), zeros where it is filled up."""
    k, c, r, s = weight.shape
    flat = weight.reshape(groups, k // groups, c, r * s)
    if (k // groups) % rows or c % cols:
        flat = F.pad(flat, (0, 0, 0, -c % cols, 0, -(k // groups) % rows))
    return flat.reshape(-1, rows, flat.shape[2] // cols, cols, r * s)


def _check_block(rows: int, cols: int) -> None:
    for name, size in (("rows", rows), ("cols", cols)):
        if size < 1:
            raise ArgumentError(name, size, "at least 1")


def pack_blocks(weight: Tensor, rows: int, cols: int, groups: int = 1) -> PackedBlocks:
    """Pack a weight; any zeros are allowed, blocks that are kept or zero as a whole pack tightly.

    Args:
        weight: (K, C/G, R, S) int8, float16, bfloat16 or float32.
        rows, cols: Output and input channels of a block.
        groups: G.

    Raises:
        DtypeError, ArgumentError: as :func:`cnncomp.sparsity.weights.check_weight`; an empty block.
    """
    check_weight(weight, groups, DTYPES)
    _check_block(rows, cols)
    blocks = as_blocks(weight, rows, cols, groups)
    kept = (blocks != 0).any(1).any(2)  # (blocks, CB, taps)
    block_ptr = torch.zeros(len(kept) + 1, dtype=torch.int32, device=weight.device)
    block_ptr[1:] = kept.flatten(1).sum(1).cumsum(0)
    block, cb, tap = kept.nonzero(as_tuple=True)
    values = blocks.permute(0, 2, 4, 1, 3)[block, cb, tap]
    return PackedBlocks(values.contiguous(), (cb * kept.shape[2] + tap).to(torch.int32), block_ptr)


def unpack_blocks(packed: PackedBlocks, shape: Sequence[int], groups: int = 1) -> Tensor:
    """The inverse of :func:`pack_blocks`: the weight of ``shape`` (K, C/G, R, S)."""
    k, c, r, s = shape
    rows, cols = packed.values.shape[1:]
    counts = packed.block_ptr.long().diff()
    block = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    across = -(-c // cols)
    blocks = packed.values.new_zeros(len(counts), across * r * s, rows, cols)
    blocks[block, packed.positions.long()] = packed.values
    flat = blocks.reshape(groups, -1, across, r * s, rows, cols).permute(0, 1, 4, 2, 5, 3)
    flat = flat.reshape(groups, -1, across * cols, r * s)[:, : k // groups, :c]
    return flat.reshape(k, c, r, s).contiguous()


def first_partial(weight: Tensor, rows: int, cols: int, groups: int = 1) -> str | None:
    """The first block of ``weight`` (K, C/G, R, S) of which a part is zero and a part is not, in words."""
    k, c, _, s = weight.shape
    blocks = as_blocks(weight != 0, rows, cols, groups)
    real = as_blocks(torch.ones_like(weight[..., :1, :1], dtype=torch.bool), rows, cols, groups)
    filled, size = blocks.sum((1, 3)), real.sum((1, 3))
    wrong = ((filled > 0) & (filled < size)).nonzero()
    if not len(wrong):
        return None
    block, cb, tap = wrong[0].tolist()
    per_group = len(blocks) // groups
    group, first = block // per_group, block % per_group * rows
    out = group * (k // groups) + first
    last = out + min(rows, k // groups - first) - 1
    zeros = int(size[block, cb, 0] - filled[block, cb, tap])
    channels = (cb * cols, min(c, (cb + 1) * cols) - 1)
    number = f"{zeros} zeros beside {int(filled[block, cb, tap])} non-zeros"
    return f"{number} at " + place((out, last), channels, (tap // s, tap % s))


def kept_fraction(weight: Tensor, rows: int, cols: int, groups: int = 1) -> float:
    """Blocks with any non-zero over all blocks: what is left of the dense kernel's work."""
    kept = (as_blocks(weight, rows, cols, groups) != 0).any(1).any(2)
    return int(torch.count_nonzero(kept)) / max(1, math.prod(kept.shape))
