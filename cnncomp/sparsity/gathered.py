"""Blocks of 64 outputs x 16 bytes of inputs in the order in which dense ``mma`` reads them, each with its own place.

A block is 64 outputs by 16 int8 inputs or 8 fp16 ones at one tap; those of a coarser pattern, such as 64 x 64, are whole
numbers of it. The output channels of a group are cut into KB slices of 64. A slice's kept blocks, in ascending position, are
cut into steps of eight, the last one filled up with blocks of zeros; a slice has as many steps as it needs. The buffer begins
with where the steps of each slice begin, int32 (G * KB + 1), filled up to 16 bytes; then come the steps, each of

- 8,192 bytes of values: for each quarter of the step (two blocks, the depth of one instruction), each tile ``i`` of 16 rows and
  each lane, the four registers of the left operand, PTX ISA 8.8, 9.7.14.5 (m16n8k32 for 8 bits, m16n8k16 for 16). Row ``r`` of
  tile ``i`` is channel ``8 * (r % 8) + 2 * i + r // 8`` of the slice: a thread gets back 8 neighbouring channels;
- eight int32, the places of its blocks: ``chunk * 256 + r * 16 + s``, chunk the number of the 16 bytes within the group's
  channels; -1 where it is filled up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cnncomp.sparsity.blocks import PackedBlocks, unpack_blocks
from cnncomp.sparsity.places import check_pieces, fill_pieces, gathered_blocks, positions_of
from cnncomp.sparsity.weights import CHUNK_BYTES, SLICE, round_up

BLOCKS = 8  # of a step
VALUE_BYTES = BLOCKS * SLICE * CHUNK_BYTES
STEP_BYTES = VALUE_BYTES + 4 * BLOCKS


def table_bytes(slices: int) -> int:
    """Bytes before the first step, for so many slices of all groups."""
    return round_up(4 * (slices + 1), CHUNK_BYTES)


def pack_gathered(weight: Tensor, groups: int = 1) -> Tensor:
    """Pack a weight; any zeros are allowed, blocks that are kept or zero as a whole pack tightly.

    Args:
        weight: (K, C/G, R, S) int8, float16 or bfloat16; R and S at most 15.
        groups: G.

    Returns:
        int8, one dimension: the buffer as above.

    Raises:
        DtypeError, ArgumentError: as :func:`cnncomp.sparsity.weights.check_weight`; a larger kernel.
    """
    blocks = gathered_blocks(weight, SLICE, CHUNK_BYTES // weight.itemsize, groups)
    first = F.pad((-(-blocks.block_ptr.long().diff() // BLOCKS)).cumsum(0), (1, 0))
    steps = int(first[-1])
    values, places = fill_pieces(blocks, first, steps, BLOCKS, weight.shape[2:])
    table = torch.zeros(table_bytes(len(first) - 1) // 4, dtype=torch.int32, device=weight.device)
    table[: len(first)] = first
    body = torch.cat([_to_registers(values), places.view(torch.int8).reshape(steps, 4 * BLOCKS)], 1)
    return torch.cat([table.view(torch.int8), body.flatten()])


def _to_registers(values: Tensor) -> Tensor:
    """Blocks (steps * 8, 64, channels) to (steps, 8192) bytes."""
    words = values.contiguous().view(torch.int8).flatten().view(torch.int32)
    words = words.reshape(-1, 4, 2, 8, 4, 2, 4)  # step, quarter, block of it, row % 8, tile, row // 8, lane % 4
    return words.permute(0, 1, 4, 3, 6, 2, 5).flatten().view(torch.int8).reshape(-1, VALUE_BYTES)


def _from_registers(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_to_registers`."""
    words = packed.flatten().view(torch.int32).reshape(-1, 4, 4, 8, 4, 2, 2)
    back = words.permute(0, 1, 5, 3, 2, 6, 4)
    return back.flatten().view(dtype).reshape(-1, SLICE, CHUNK_BYTES // dtype.itemsize)


def unpack_gathered(packed: Tensor, shape: Sequence[int], dtype: torch.dtype, groups: int = 1) -> Tensor:
    """The inverse of :func:`pack_gathered`: the weight of ``shape`` (K, C/G, R, S) and ``dtype``."""
    slices = groups * -(-(shape[0] // groups) // SLICE)
    first = packed[: 4 * (slices + 1)].view(torch.int32).long()
    steps = packed[table_bytes(slices) :].reshape(-1, STEP_BYTES)
    values = _from_registers(steps[:, :VALUE_BYTES], dtype)
    places = steps[:, VALUE_BYTES:].flatten().view(torch.int32)
    kept = (places >= 0).nonzero().flatten()
    positions = positions_of(places[kept], shape[2:])
    ends = torch.searchsorted(kept, first * BLOCKS)
    return unpack_blocks(PackedBlocks(values[kept], positions, ends.to(torch.int32)), shape, groups)


def check_packed(packed: Tensor, shape: Sequence[int], dtype: torch.dtype, groups: int) -> None:
    """Raise :class:`ArgumentError` unless a buffer can be the packed weight of ``shape``; its content is not looked at."""
    start = table_bytes(groups * -(-(shape[0] // groups) // SLICE))
    check_pieces(packed, start, STEP_BYTES, "steps", shape, groups)
