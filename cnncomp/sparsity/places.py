"""Kept blocks in pieces of one size, each block with its place: what the formats that gather activations share.

A place is ``chunk * 256 + r * 16 + s``, ``chunk`` the number of the block's input channels within the group; -1 where a
piece is filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.sparsity.blocks import PackedBlocks, pack_blocks
from cnncomp.sparsity.weights import DTYPES, MOST_TAPS, check_weight


def gathered_blocks(weight: Tensor, rows: int, cols: int, groups: int) -> PackedBlocks:
    """:func:`cnncomp.sparsity.blocks.pack_blocks` of a weight (K, C/G, R, S) int8, float16 or bfloat16.

    Raises:
        DtypeError, ArgumentError: as :func:`cnncomp.sparsity.weights.check_weight`; more taps than a place can say.
    """
    check_weight(weight, groups, DTYPES)
    check_taps(weight)
    return pack_blocks(weight, rows, cols, groups)


def check_taps(weight: Tensor) -> None:
    """Raise :class:`ArgumentError` for a weight of more taps than a place can say."""
    r, s = weight.shape[2:]
    if max(r, s) > MOST_TAPS:
        raise ArgumentError("weight", f"a kernel of {r} x {s}", f"at most {MOST_TAPS} rows and columns of taps")


def fill_pieces(
    blocks: PackedBlocks, start: Tensor, pieces: int, depth: int, kernel_size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Values (pieces * depth, rows, cols) and places (pieces * depth,), int32.

    Args:
        start: The first piece of each row of blocks.
        pieces: In all, of ``depth`` blocks each.
    """
    (r, s), device = kernel_size, start.device
    counts = blocks.block_ptr.long().diff()
    row = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
    at = torch.arange(len(row), device=device) - blocks.block_ptr[row] + start[row] * depth
    chunk, tap = blocks.positions // (r * s), blocks.positions % (r * s)
    places = torch.full((pieces * depth,), -1, dtype=torch.int32, device=device)
    places[at] = chunk * 256 + tap // s * 16 + tap % s
    values = blocks.values.new_zeros(pieces * depth, *blocks.values.shape[1:])
    values[at] = blocks.values
    return values, places


def positions_of(places: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """The positions of :class:`cnncomp.sparsity.blocks.PackedBlocks` that places stand for."""
    r, s = kernel_size
    return ((places >> 8) * r + (places >> 4 & 15)) * s + (places & 15)


def check_pieces(packed: Tensor, start: int, size: int, name: str, shape: Sequence[int], groups: int) -> None:
    """Raise :class:`ArgumentError` unless a buffer is ``start`` bytes and whole pieces, called ``name``, of ``size``."""
    if packed.dim() != 1 or len(packed) < start or (len(packed) - start) % size:
        wanted = f"one dimension of {start} bytes and whole {name} of {size} for {tuple(shape)}, {groups} groups"
        raise ArgumentError("weight", f"packed shape {tuple(packed.shape)}", wanted)
