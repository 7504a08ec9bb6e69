"""Packed weight formats, machine independent. The layouts are specified in docs/design.md ("Packed weights")."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cnncomp.errors import ArgumentError

OUT_BLOCK = 16  # output channels that meet one broadcast quad of inputs
QUAD = 4  # inputs multiplied by one 8-bit dot-product lane
MOST_OF_PAIR = 128  # the largest sum of two weights that stays within 16 bits with any two inputs of 8 bits


def is_depthwise(in_channels: int, out_channels: int, groups: int) -> bool:
    """Whether a convolution has one input and one output channel per group (and more than one group)."""
    return groups > 1 and groups == in_channels == out_channels


def depthwise_columns(kernel_size: tuple[int, int]) -> tuple[int, int]:
    """How many columns a depthwise window (R, S) is packed by, and the taps of each; a window of one row is one column."""
    r, s = kernel_size
    return (1, s) if r == 1 else (s, r)


def _pad_to(x: Tensor, dim: int, multiple: int) -> Tensor:
    missing = -x.shape[dim] % multiple
    if not missing:
        return x
    pad = [0, 0] * (x.dim() - dim - 1) + [0, missing]
    return F.pad(x, pad)


def pack_int8(weight: Tensor, groups: int = 1) -> Tensor:
    """Pack an int8 weight for the CPU kernels.

    Args:
        weight: ``(K, C/G, R, S)`` int8.
        groups: G.

    Returns:
        ``(G, KB, R*S, CQ, 16, 4)`` int8; for a depthwise convolution ``(CB, S*RQ, 16, 4)``.
    """
    k, cg, r, s = weight.shape
    if is_depthwise(groups * cg, k, groups):
        columns, length = depthwise_columns((r, s))
        taps = _pad_to(_pad_to(weight.reshape(k, length, columns), 0, OUT_BLOCK), 1, QUAD)
        taps = taps.reshape(-1, OUT_BLOCK, taps.shape[1] // QUAD, QUAD, columns)
        return taps.permute(0, 4, 2, 1, 3).flatten(1, 2).contiguous()
    w = _pad_to(_pad_to(weight.reshape(groups, k // groups, cg, r * s), 1, OUT_BLOCK), 2, QUAD)
    w = w.reshape(groups, w.shape[1] // OUT_BLOCK, OUT_BLOCK, w.shape[2] // QUAD, QUAD, r * s)
    return w.permute(0, 1, 5, 3, 2, 4).contiguous()


def unpack_int8(
    packed: Tensor, in_channels: int, out_channels: int, kernel_size: tuple[int, int], groups: int = 1
) -> Tensor:
    """The inverse of :func:`pack_int8`: ``(K, C/G, R, S)`` int8."""
    r, s = kernel_size
    if is_depthwise(in_channels, out_channels, groups):
        columns, length = depthwise_columns(kernel_size)
        taps = packed.unflatten(1, (columns, -1)).permute(0, 3, 2, 4, 1)
        taps = taps.reshape(packed.shape[0] * OUT_BLOCK, -1, columns)
        return taps[:out_channels, :length].reshape(out_channels, 1, r, s).contiguous()
    kg, cg = out_channels // groups, in_channels // groups
    w = packed.permute(0, 1, 4, 3, 5, 2).reshape(groups, packed.shape[1] * OUT_BLOCK, -1, r * s)
    return w[:, :kg, :cg].reshape(out_channels, cg, r, s).contiguous()


class PackedSparse(NamedTuple):
    """A sparse weight: ``values`` float32 (nnz,) or int8 (nnz, 4), ``positions`` int16 holding uint16 (nnz,), ``row_ptr``
    int32, ``block``."""

    values: Tensor
    positions: Tensor
    row_ptr: Tensor
    block: int


DENSE_ROWS = 8  # output channels whose dense fp32 weights lie next to each other


def dense_block(kernel_size: tuple[int, int], channels_per_group: int) -> int:
    """Input channels per block of a dense weight, so that what a tile reads of the image stays in the first-level cache."""
    taps = kernel_size[0] * kernel_size[1]
    return _even_block(channels_per_group, 128 if taps == 1 else max(1, 216 // taps))


def pack_dense(weight: Tensor, groups: int, block: int) -> Tensor:
    """Pack a float32 weight for the dense CPU kernel.

    Args:
        weight: ``(K, C/G, R, S)``.
        groups: G.
        block: input channels per block.

    Returns:
        ``(G, NB, KB, block, R, S, 8)``, zeros outside.
    """
    k, cg, r, s = weight.shape
    w = _pad_to(_pad_to(weight.reshape(groups, k // groups, cg, r, s), 1, DENSE_ROWS), 2, block)
    w = w.reshape(groups, w.shape[1] // DENSE_ROWS, DENSE_ROWS, w.shape[2] // block, block, r, s)
    return w.permute(0, 3, 1, 4, 5, 6, 2).contiguous()


def unpack_dense(packed: Tensor, in_channels: int, out_channels: int) -> Tensor:
    """The inverse of :func:`pack_dense`: ``(K, C/G, R, S)``; ``in_channels``: C."""
    groups, blocks, rows, block, r, s, _ = packed.shape
    w = packed.permute(0, 2, 6, 1, 3, 4, 5).reshape(groups, rows * DENSE_ROWS, blocks * block, r, s)
    return w[:, : out_channels // groups, : in_channels // groups].reshape(out_channels, -1, r, s).contiguous()


def _even_block(channels: int, most: int) -> int:
    """Of blocks of at most ``most`` channels, as few as will do, all of one size but for the last."""
    return -(-channels // -(-channels // most)) if channels else 1


def default_block(weight: Tensor, linear: bool = False) -> int:
    """Input channels per block of a sparse weight (K, C/G, R, S).

    The inputs of a large block fall out of the first-level cache, and more non-zeros read them more often; with a small block
    there is little to add between loading the sums of a row and storing them. Measured on a Zen 4 core (32 KiB) over
    ResNet-50's layers with 65 to 98 % zeros; a linear layer reads one float per channel.
    """
    taps = weight.shape[2] * weight.shape[3]
    density = int(torch.count_nonzero(weight)) / max(1, weight.numel())
    # Inputs, inputs, and non-zeros in a row of a block.
    fewest, most, wanted = (80, 512, 13) if taps == 1 else (144, 288, 20)
    inputs = 256 if linear else min(max(fewest, wanted / max(density, 1e-3)), most)
    return _even_block(weight.shape[1], max(1, round(inputs / taps)))


def _from_blocks(
    rows: Tensor, in_channels: int, out_channels: int, kernel_size: tuple[int, int], groups: int, block: int
) -> Tensor:
    """Rows (G·NB·K/G, block·R·S), by group, block of channels and output channel, as (K, C', R, S); ``in_channels``: C' of a
    group."""
    (r, s), kg = kernel_size, out_channels // groups
    blocks = -(-in_channels // block)
    w = rows.reshape(groups, blocks, kg, block, r * s).transpose(1, 2)
    w = w.reshape(groups, kg, blocks * block, r, s)[:, :, :in_channels]
    return w.reshape(out_channels, in_channels, r, s).contiguous()


def _pack_non_zeros(weight: Tensor, groups: int, block: int) -> PackedSparse:
    """The non-zeros of ``weight`` (K, C', R, S), block by block: packing should not take several times a model's memory.

    Raises:
        ArgumentError: a block whose positions do not fit 16 bits.
    """
    k, _, r, s = weight.shape
    if block < 1 or block * r * s > 65536:
        raise ArgumentError("block", block, f"1 <= block and block*R*S <= 65536 (R*S = {r * s})")
    values, positions, counts = [weight.new_empty(0)], [], [torch.zeros(1, dtype=torch.int64)]
    for group in weight.unflatten(0, (groups, k // groups)):
        for part in group.split(block, 1):
            rows = part.flatten(1)
            row, position = rows.nonzero(as_tuple=True)
            values.append(rows[row, position])
            positions.append(torch.where(position >= 32768, position - 65536, position).to(torch.int16))
            counts.append(torch.bincount(row, minlength=rows.shape[0]))
    index = torch.cat(positions) if positions else torch.empty(0, dtype=torch.int16)
    return PackedSparse(torch.cat(values), index, torch.cat(counts).cumsum(0).int(), block)


def _unpack_rows(packed: PackedSparse, width: int) -> Tensor:
    """The rows that :func:`_pack_non_zeros` packed, ``width`` wide, with their zeros."""
    row_ptr = packed.row_ptr.long()
    row = torch.repeat_interleave(torch.arange(row_ptr.numel() - 1, device=row_ptr.device), row_ptr.diff())
    rows = packed.values.new_zeros(row_ptr.numel() - 1, width)
    return rows.index_put_((row, packed.positions.long() & 0xFFFF), packed.values, accumulate=True)


def pack_sparse(weight: Tensor, groups: int = 1, block: int | None = None) -> PackedSparse:
    """Pack the non-zeros of a float32 weight ``(K, C/G, R, S)`` for the sparse CPU kernels.

    Raises:
        ArgumentError: a block whose positions do not fit 16 bits.
    """
    block = default_block(weight) if block is None else block
    return _pack_non_zeros(weight.detach().float(), groups, block)


def unpack_sparse(
    packed: PackedSparse, in_channels: int, out_channels: int, kernel_size: tuple[int, int], groups: int = 1
) -> Tensor:
    """The inverse of :func:`pack_sparse`: ``(K, C/G, R, S)`` float32."""
    rows = _unpack_rows(packed, packed.block * kernel_size[0] * kernel_size[1])
    return _from_blocks(rows, in_channels // groups, out_channels, kernel_size, groups, packed.block)


def default_quad_block(kernel_size: tuple[int, int], quads: int) -> int:
    """Quads of input channels per block of a sparse int8 weight, so that what a tile of pixels reads of a block stays in the
    first-level cache. Measured on a Zen 4 core (32 KiB) over ResNet-50's layers at 75 and 90 % zeros."""
    return _even_block(quads, max(1, 128 // (kernel_size[0] * kernel_size[1])))


def _quads(weight: Tensor) -> Tensor:
    """An int8 weight (K, C/G, R, S) as int32 (K, CQ, R, S): four input channels each, the first in the lowest byte."""
    w = _pad_to(weight, 1, QUAD)
    w = w.reshape(w.shape[0], -1, QUAD, *w.shape[2:]).permute(0, 1, 3, 4, 2)
    # A copy, for 32-bit views need bytes from a multiple of four on.
    return w.clone(memory_format=torch.contiguous_format).flatten().view(torch.int32).reshape(w.shape[:-1])


def quad_sparsity(weight: Tensor) -> float:
    """Fraction of quads of input channels without a non-zero, of a weight (K, C/G, ...) of any dtype."""
    filled = _pad_to(weight != 0, 1, QUAD).unflatten(1, (-1, QUAD)).any(2)
    return 1 - int(torch.count_nonzero(filled)) / max(1, filled.numel())


def pack_sparse_int8(weight: Tensor, groups: int = 1, block: int | None = None) -> PackedSparse:
    """Pack an int8 weight ``(K, C/G, R, S)`` for the sparse int8 CPU kernels: every quad of four input channels with any
    non-zero is kept. ``values`` is int8 (T, 4), ``block`` counts quads.

    Raises:
        ArgumentError: a block whose positions do not fit 16 bits.
    """
    quads = _quads(weight)
    _, cq, r, s = quads.shape
    block = default_quad_block((r, s), cq) if block is None else block
    packed = _pack_non_zeros(quads, groups, block)
    return packed._replace(values=packed.values.view(torch.int8).reshape(-1, QUAD))


def unpack_sparse_int8(
    packed: PackedSparse, in_channels: int, out_channels: int, kernel_size: tuple[int, int], groups: int = 1
) -> Tensor:
    """The inverse of :func:`pack_sparse_int8`: ``(K, C/G, R, S)`` int8."""
    cg, k = in_channels // groups, out_channels
    words = packed._replace(values=packed.values.flatten().view(torch.int32))
    rows = _unpack_rows(words, packed.block * kernel_size[0] * kernel_size[1])
    quads = _from_blocks(rows, -(-cg // QUAD), k, kernel_size, groups, packed.block)
    w = quads.flatten().view(torch.int8).reshape(*quads.shape, QUAD).permute(0, 1, 4, 2, 3)
    return w.reshape(k, -1, *kernel_size)[:, :cg].contiguous()


def _alternate_signs(packed: PackedSparse) -> PackedSparse:
    """The same non-zeros, in each row one of each sign in turn as long as there are both, in ascending position."""
    counts = packed.row_ptr.long().diff()
    row = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    negative = packed.values < 0
    order = torch.zeros_like(row)
    for sign, which in enumerate((~negative, negative)):
        before = F.pad(which.long(), (1, 0)).cumsum(0)
        rank = before[1:] - before[packed.row_ptr.long()[row]]
        order = torch.where(which, 2 * rank + sign, order)
    at = torch.argsort(row * (2 * packed.values.numel() + 4) + order)
    return packed._replace(values=packed.values[at], positions=packed.positions[at])


def _bound_pairs(packed: PackedSparse) -> PackedSparse:
    """Groups of four weights, those in two parts in which two next to each other could make sums beyond 16 bits."""
    beyond = (packed.values.reshape(-1, 2, 2).int().sum(2).abs() > MOST_OF_PAIR).any(1)
    again = torch.repeat_interleave(torch.arange(beyond.numel()), 1 + beyond.long())
    second = F.pad(again[1:] == again[:-1], (1, 0))
    half = torch.div(packed.values, 2, rounding_mode="floor")
    first = torch.where(beyond[:, None], packed.values - half, packed.values)
    values = torch.where(second[:, None], half[again], first[again])
    row_ptr = F.pad((1 + beyond.long()).cumsum(0), (1, 0))[packed.row_ptr.long()]
    return packed._replace(values=values, positions=packed.positions[again], row_ptr=row_ptr.int())


def pack_scattered_int8(
    weight: Tensor, groups: int = 1, block: int | None = None, bounded: bool | None = None
) -> PackedSparse:
    """Pack the non-zeros of an int8 weight ``(K, C/G, R, S)`` four at a time, whatever their channels and taps. ``values`` is
    int8 (T, 4), ``positions`` (T, 4), ``row_ptr`` counts groups of four, ``block`` input channels.

    Args:
        bounded: Order them so that no two next to each other can make a sum beyond 16 bits, and put weights that have no such
            order in two parts: kernels of instruction sets whose products of bytes saturate are faster then, others slower. By
            default as the instruction set in use needs it.

    Raises:
        ArgumentError: a block whose positions do not fit 16 bits.
    """
    from cnncomp import _cpu

    _, cg, r, s = weight.shape
    # What a tile of 128 pixels reads of a block stays in the second-level cache. Measured on a Zen 4 core at 90 % zeros.
    most = 2048 if r * s == 1 else max(1, 1152 // (r * s))
    block = _even_block(cg, most) if block is None else block
    bounded = _cpu.int8_saturates() if bounded is None else bounded
    packed = _pack_non_zeros(weight, groups, block)
    if bounded:
        packed = _alternate_signs(packed)
    old = packed.row_ptr.long()
    counts = old.diff()
    row_ptr = F.pad(-(-counts // QUAD), (1, 0)).cumsum(0)
    shift = torch.repeat_interleave(QUAD * row_ptr[:-1] - old[:-1], counts)
    at = torch.arange(packed.values.numel()) + shift
    values, positions = (x.new_zeros(QUAD * int(row_ptr[-1])) for x in (packed.values, packed.positions))
    values[at], positions[at] = packed.values, packed.positions
    packed = PackedSparse(values.reshape(-1, QUAD), positions.reshape(-1, QUAD), row_ptr.int(), block)
    return _bound_pairs(packed) if bounded else packed


def unpack_scattered_int8(
    packed: PackedSparse, in_channels: int, out_channels: int, kernel_size: tuple[int, int], groups: int = 1
) -> Tensor:
    """The inverse of :func:`pack_scattered_int8`: ``(K, C/G, R, S)`` int8."""
    kept = packed.values.flatten() != 0
    before = F.pad(kept.long(), (1, 0)).cumsum(0)
    row_ptr = before[QUAD * packed.row_ptr.long()]
    flat = PackedSparse(packed.values.flatten()[kept], packed.positions.flatten()[kept], row_ptr, packed.block)
    rows = _unpack_rows(flat, packed.block * kernel_size[0] * kernel_size[1])
    return _from_blocks(rows, in_channels // groups, out_channels, kernel_size, groups, packed.block)
