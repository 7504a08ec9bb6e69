"""Kept blocks as steps of a matrix product, each with its own places: what the Triton kernels walk.

Blocks of ``rows`` outputs by ``cols`` inputs at one tap, as :mod:`cnncomp.sparsity.blocks` cuts them: long runs with few
inputs (1xV), or rectangles. A row of blocks has its kept ones in ascending position, cut into steps of 64 bytes of inputs, the
last one filled up with zeros. The buffer begins with int32: 128 times the sum of each output's weights (zeros if they are
floats), which unsigned activations lack once their sign bit is flipped; then where the steps of each row of blocks begin, and
where the last one's end; filled up to 16 bytes. Then come

- the values of all steps, each ``rows`` outputs by 64 bytes of inputs;
- the places of all steps (:mod:`cnncomp.sparsity.places`), an int32 for each of a step's blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.sparsity.blocks import PackedBlocks, unpack_blocks
from cnncomp.sparsity.places import check_pieces, fill_pieces, gathered_blocks, positions_of
from cnncomp.sparsity.weights import CHUNK_BYTES, round_up

DEPTH_BYTES = 64  # of a step's inputs


class Steps(NamedTuple):
    """Views into a buffer: ``sums`` (B * rows,) and ``first`` (B + 1,) int32, ``values`` (steps, rows, depth) of the weight's
    dtype, ``places`` (steps, depth / cols) int32, for B rows of blocks of all groups."""

    sums: Tensor
    first: Tensor
    values: Tensor
    places: Tensor


def _rows_of_blocks(shape: Sequence[int], rows: int, groups: int) -> int:
    return groups * -(-(shape[0] // groups) // rows)


def _table_bytes(blocks: int, rows: int) -> int:
    """Bytes before the first step."""
    return round_up(4 * (blocks * rows + blocks + 1), CHUNK_BYTES)


def _step_bytes(rows: int, cols: int, itemsize: int) -> int:
    return rows * DEPTH_BYTES + 4 * (DEPTH_BYTES // (cols * itemsize))


def pack_steps(weight: Tensor, rows: int, cols: int, groups: int = 1) -> Tensor:
    """Pack a weight; any zeros are allowed, blocks that are kept or zero as a whole pack tightly.

    Args:
        weight: (K, C/G, R, S) int8, float16 or bfloat16; R and S at most 15.
        rows, cols: Outputs and inputs of a block, powers of two; at most 64 bytes of inputs.
        groups: G.

    Returns:
        int8, one dimension: the buffer as above.

    Raises:
        DtypeError, ArgumentError: as :func:`cnncomp.sparsity.weights.check_weight`; a larger kernel.
    """
    blocks = gathered_blocks(weight, rows, cols, groups)
    depth = DEPTH_BYTES // weight.itemsize
    if depth % cols:
        raise ArgumentError("cols", cols, f"a power of two, at most {depth} inputs of {weight.dtype}")
    pieces = depth // cols
    first = F.pad((-(-blocks.block_ptr.long().diff() // pieces)).cumsum(0), (1, 0))
    steps = int(first[-1])
    values, places = fill_pieces(blocks, first, steps, pieces, weight.shape[2:])
    values = values.reshape(steps, pieces, rows, cols).transpose(1, 2).contiguous()
    count = len(first) - 1
    table = torch.zeros(_table_bytes(count, rows) // 4, dtype=torch.int32, device=weight.device)
    table[count * rows : count * rows + count + 1] = first
    if weight.dtype == torch.int8:
        sums = weight.reshape(groups, len(weight) // groups, -1).sum(2, dtype=torch.int32)
        table[: count * rows] = F.pad(128 * sums, (0, -sums.shape[1] % rows)).flatten()
    return torch.cat([part.flatten().view(torch.int8) for part in (table, values, places)])


def view_steps(packed: Tensor, shape: Sequence[int], dtype: torch.dtype, rows: int, cols: int, groups: int) -> Steps:
    """The parts of what :func:`pack_steps` returns for a weight of ``shape`` (K, C/G, R, S) and ``dtype``."""
    blocks, pieces = _rows_of_blocks(shape, rows, groups), DEPTH_BYTES // (cols * dtype.itemsize)
    start = _table_bytes(blocks, rows)
    steps = (len(packed) - start) // _step_bytes(rows, cols, dtype.itemsize)
    table, end = packed[:start].view(torch.int32), start + steps * rows * DEPTH_BYTES
    values = packed[start:end].view(dtype).view(steps, rows, DEPTH_BYTES // dtype.itemsize)
    places = packed[end:].view(torch.int32).view(steps, pieces)
    return Steps(table[: blocks * rows], table[blocks * rows : blocks * rows + blocks + 1], values, places)


def unpack_steps(packed: Tensor, shape: Sequence[int], dtype: torch.dtype, rows: int, cols: int, groups: int) -> Tensor:
    """The inverse of :func:`pack_steps`: the weight of ``shape`` (K, C/G, R, S) and ``dtype``."""
    _, first, values, places = view_steps(packed, shape, dtype, rows, cols, groups)
    pieces = places.shape[1]
    blocks = values.reshape(-1, rows, pieces, cols).transpose(1, 2).reshape(-1, rows, cols)
    kept = (places.flatten() >= 0).nonzero().flatten()
    ends = torch.searchsorted(kept, first.long() * pieces)
    positions = positions_of(places.flatten()[kept], shape[2:])
    return unpack_blocks(PackedBlocks(blocks[kept], positions, ends.to(torch.int32)), shape, groups)


def check_steps(packed: Tensor, shape: Sequence[int], dtype: torch.dtype, rows: int, cols: int, groups: int) -> None:
    """Raise :class:`ArgumentError` unless a buffer can be the packed weight of ``shape``; its content is not looked at."""
    start = _table_bytes(_rows_of_blocks(shape, rows, groups), rows)
    check_pieces(packed, start, _step_bytes(rows, cols, dtype.itemsize), "steps", shape, groups)
