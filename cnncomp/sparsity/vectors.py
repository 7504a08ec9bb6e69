"""Runs of 32 outputs that share one list of positions (1xV, V = 32), in the order in which dense ``mma`` reads them.

A position is an input channel, for 8 bits four neighbouring ones, at one tap. The output channels of a group are cut into KB
runs of 32. A run's kept positions, ascending, are cut into pieces as deep as one instruction: 16 channels of 2 bytes, or 8
fours of bytes, the last piece filled up with zeros. A run has as many pieces as it needs; runs lie in the order of their
lengths, the longest first, so that those that take longest begin first. The buffer begins with int32: where the pieces of each
run begin, and where the last one's end; then the number ``group * KB + run`` of each run; filled up to 16 bytes. Then come the
pieces, each of

- 1,024 bytes of values: for each tile ``i`` of 16 rows and each lane, the four registers of the left operand, PTX ISA 8.8,
  9.7.14.5 (m16n8k32 for 8 bits, m16n8k16 for 16). Row ``r`` of tile ``i`` is channel ``4 * (r % 8) + 2 * i + r // 8`` of the
  run: a thread gets back 4 neighbouring channels;
- an int32 for each position: ``channel * 256 + r * 16 + s``, for 8 bits ``channel`` counts fours; -1 where it is filled up.

The kernels gather activations that lie channel by channel in units of eight images (:func:`to_units`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cnncomp.sparsity.blocks import PackedBlocks, unpack_blocks
from cnncomp.sparsity.places import check_pieces, fill_pieces, gathered_blocks, positions_of
from cnncomp.sparsity.weights import CHUNK_BYTES, round_up

RUN = 32  # output channels
VECTOR = RUN // 8  # of them, neighbours that a thread has
UNIT = 8  # images whose pixels lie next to each other
QUAD = 4  # input channels of 8 bits that stay or go together
VALUE_BYTES = RUN * 32  # of a piece


def columns(dtype: torch.dtype) -> int:
    """Input channels of a position."""
    return QUAD if dtype.itemsize == 1 else 1


def unit(dtype: torch.dtype, images: int) -> int:
    """Images whose pixels lie next to each other, of so many."""
    return UNIT


def depth(dtype: torch.dtype) -> int:
    """Positions of a piece."""
    return 32 // (columns(dtype) * dtype.itemsize)


def piece_bytes(dtype: torch.dtype) -> int:
    """Bytes of a piece: its values and positions."""
    return VALUE_BYTES + 4 * depth(dtype)


def table_bytes(runs: int) -> int:
    """Bytes before the first piece, for so many runs of all groups."""
    return round_up(4 * (2 * runs + 1), CHUNK_BYTES)


def pack_vectors(weight: Tensor, groups: int = 1) -> Tensor:
    """Pack a weight; any zeros are allowed, runs of 32 outputs (int8: by 4 inputs) kept or zero as a whole pack tightly.

    Args:
        weight: (K, C/G, R, S) int8, float16 or bfloat16; R and S at most 15.
        groups: G.

    Returns:
        int8, one dimension: the buffer as above.

    Raises:
        DtypeError, ArgumentError: as :func:`cnncomp.sparsity.weights.check_weight`; a larger kernel.
    """
    rows = depth(weight.dtype)
    blocks = gathered_blocks(weight, RUN, columns(weight.dtype), groups)
    pieces = -(-blocks.block_ptr.long().diff() // rows)
    order = pieces.argsort(descending=True, stable=True)
    first = F.pad(pieces[order].cumsum(0), (1, 0))
    start = torch.empty_like(pieces)
    start[order] = first[:-1]
    total, runs = int(first[-1]), len(pieces)
    values, places = fill_pieces(blocks, start, total, rows, weight.shape[2:])
    table = torch.zeros(table_bytes(runs) // 4, dtype=torch.int32, device=weight.device)
    table[: runs + 1], table[runs + 1 : 2 * runs + 1] = first, order
    body = torch.cat([_to_registers(values, rows), places.view(torch.int8).reshape(total, 4 * rows)], 1)
    return torch.cat([table.view(torch.int8), body.flatten()])


def _to_registers(values: Tensor, rows: int) -> Tensor:
    """Values (pieces * rows, 32, columns) to (pieces, 1024) bytes."""
    deep = values.reshape(-1, rows, *values.shape[1:]).transpose(1, 2).contiguous()
    words = deep.view(torch.int8).flatten().view(torch.int32)
    words = words.reshape(-1, 8, 2, 2, 2, 4)  # piece, row % 8, tile, row // 8, half of the depth, lane % 4
    return words.permute(0, 2, 1, 5, 4, 3).flatten().view(torch.int8).reshape(-1, VALUE_BYTES)


def _from_registers(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_to_registers`."""
    words = packed.flatten().view(torch.int32).reshape(-1, 2, 8, 4, 2, 2)
    deep = words.permute(0, 2, 1, 5, 4, 3).flatten().view(dtype)
    deep = deep.reshape(-1, RUN, depth(dtype), columns(dtype))
    return deep.transpose(1, 2).flatten(0, 1)


def unpack_vectors(packed: Tensor, shape: Sequence[int], dtype: torch.dtype, groups: int = 1) -> Tensor:
    """The inverse of :func:`pack_vectors`: the weight of ``shape`` (K, C/G, R, S) and ``dtype``."""
    rows, runs = depth(dtype), groups * -(-(shape[0] // groups) // RUN)
    table = packed[: 4 * (2 * runs + 1)].view(torch.int32).long()
    first, order = table[: runs + 1], table[runs + 1 :]
    pieces = packed[table_bytes(runs) :].reshape(-1, piece_bytes(dtype))
    values = _from_registers(pieces[:, :VALUE_BYTES], dtype)
    places = pieces[:, VALUE_BYTES:].flatten().view(torch.int32)
    run = torch.repeat_interleave(order, first.diff() * rows)
    run = torch.where(places >= 0, run, runs)  # what is filled up comes last
    ascending = run.argsort(stable=True)[: int((places >= 0).sum())]
    run, places = run[ascending], places[ascending]
    ends = torch.searchsorted(run, torch.arange(runs + 1, device=run.device))
    return unpack_blocks(
        PackedBlocks(values[ascending], positions_of(places, shape[2:]), ends.to(torch.int32)), shape, groups
    )


def check_packed(packed: Tensor, shape: Sequence[int], dtype: torch.dtype, groups: int) -> None:
    """Raise :class:`ArgumentError` unless a buffer can be the packed weight of ``shape``; its content is not looked at."""
    start = table_bytes(groups * -(-(shape[0] // groups) // RUN))
    check_pieces(packed, start, piece_bytes(dtype), "pieces", shape, groups)


def to_units(x: Tensor, groups: int = 1) -> Tensor:
    """Activations (N, C, H, W) as the kernels gather them, copied.

    Args:
        x: uint8, int8, float16 or bfloat16.
        groups: G, which the channels of 8 bits are filled up to whole fours in.

    Returns:
        (C, NB, H, W, 8), NB = ceil(N / 8), or for 8 bits (G * ceil(C/G / 4), NB, H, W, 8, 4); zeros where it is filled up.
    """
    n, c, h, w = x.shape
    quad = columns(x.dtype)
    if n % UNIT or c // groups % quad:
        x = x.reshape(n, groups, c // groups, h, w)
        x = F.pad(x, (0, 0, 0, 0, 0, -(c // groups) % quad, 0, 0, 0, -n % UNIT)).flatten(1, 2)
    if quad == 1:
        return x.reshape(-1, UNIT, c, h, w).permute(2, 0, 3, 4, 1).contiguous()
    return x.reshape(-1, UNIT, x.shape[1] // quad, quad, h, w).permute(2, 0, 4, 5, 1, 3).contiguous()


def units_shape(shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """Of images (N, C, H, W) in units, N and the channels of a group whole ones: as :func:`to_units` returns them."""
    n, c, h, w = shape
    quad = columns(dtype)
    return (c // quad, n // UNIT, h, w, UNIT, *[quad] * (quad > 1))


def image_shape(units: Tensor) -> tuple[int, int, int, int]:
    """(N, C, H, W) of the images that lie in units, of this format or of :mod:`cnncomp.sparsity.vnm`, all of them full."""
    c, blocks, h, w, images, *quad = units.shape
    return blocks * images, c * math.prod(quad), h, w


def from_units(units: Tensor) -> Tensor:
    """The inverse of :func:`to_units`, for units that are full, here and in :mod:`cnncomp.sparsity.vnm`: (N, C, H, W),
    channels_last, copied."""
    order = (1, 4, 2, 3, 0) if units.dim() == 5 else (1, 4, 2, 3, 0, 5)
    n, c, h, w = image_shape(units)
    return units.permute(order).contiguous().view(n, h, w, c).permute(0, 3, 1, 2)
