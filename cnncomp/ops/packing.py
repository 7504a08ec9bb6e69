"""Packed weight formats, machine independent. The layouts are specified in docs/design.md ("Packed weights")."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cnncomp.errors import ArgumentError

OUT_BLOCK = 16  # output channels that meet one broadcast quad of inputs
QUAD = 4  # inputs multiplied by one 8-bit dot-product lane


def is_depthwise(in_channels: int, out_channels: int, groups: int) -> bool:
    """Whether a convolution has one input and one output channel per group (and more than one group)."""
    return groups > 1 and groups == in_channels == out_channels


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
        ``(G, KB, R*S, CQ, 16, 4)`` int8; for a depthwise convolution ``(CB, TQ, 16, 4)``.
    """
    k, cg, r, s = weight.shape
    if is_depthwise(groups * cg, k, groups):
        taps = _pad_to(_pad_to(weight.reshape(k, r * s), 0, OUT_BLOCK), 1, QUAD)
        return taps.reshape(-1, OUT_BLOCK, taps.shape[1] // QUAD, QUAD).permute(0, 2, 1, 3).contiguous()
    w = _pad_to(_pad_to(weight.reshape(groups, k // groups, cg, r * s), 1, OUT_BLOCK), 2, QUAD)
    w = w.reshape(groups, w.shape[1] // OUT_BLOCK, OUT_BLOCK, w.shape[2] // QUAD, QUAD, r * s)
    return w.permute(0, 1, 5, 3, 2, 4).contiguous()


def unpack_int8(
    packed: Tensor, in_channels: int, out_channels: int, kernel_size: tuple[int, int], groups: int = 1
) -> Tensor:
    """The inverse of :func:`pack_int8`: ``(K, C/G, R, S)`` int8."""
    r, s = kernel_size
    if is_depthwise(in_channels, out_channels, groups):
        taps = packed.permute(0, 2, 1, 3).reshape(packed.shape[0] * OUT_BLOCK, -1)
        return taps[:out_channels, : r * s].reshape(out_channels, 1, r, s).contiguous()
    kg, cg = out_channels // groups, in_channels // groups
    w = packed.permute(0, 1, 4, 3, 5, 2).reshape(groups, packed.shape[1] * OUT_BLOCK, -1, r * s)
    return w[:, :kg, :cg].reshape(out_channels, cg, r, s).contiguous()


class PackedSparse(NamedTuple):
    """A sparse weight: ``values`` float32 (nnz,), ``positions`` int16 holding uint16 (nnz,), ``row_ptr`` int32, ``block``."""

    values: Tensor
    positions: Tensor
    row_ptr: Tensor
    block: int


def default_block(kernel_size: tuple[int, int], channels_per_group: int, linear: bool = False) -> int:
    """Input channels per block, so that the slice of the image that a tile reads stays in the first-level cache.

    Measured on a Zen 4 core (32 KiB) over ResNet-50's layers at 80 to 95 % zeros; a linear layer reads one float per channel.
    """
    taps = kernel_size[0] * kernel_size[1]
    block = (256 if linear else 128) if taps == 1 else 144 // taps
    return max(1, min(block, channels_per_group, 65536 // taps))


def pack_sparse(weight: Tensor, groups: int = 1, block: int | None = None) -> PackedSparse:
    """Pack the non-zeros of a float32 weight ``(K, C/G, R, S)`` for the sparse CPU kernels.

    Raises:
        ArgumentError: a block whose positions do not fit 16 bits.
    """
    k, cg, r, s = weight.shape
    block = default_block((r, s), cg) if block is None else block
    if block < 1 or block * r * s > 65536:
        raise ArgumentError("block", block, f"1 <= block and block*R*S <= 65536 (R*S = {r * s})")
    w = _pad_to(weight.detach().float().reshape(groups, k // groups, cg, r * s), 2, block)
    blocks = w.shape[2] // block
    w = w.reshape(groups, k // groups, blocks, block * r * s).transpose(1, 2)  # (G, NB, K/G, block*R*S)
    w = w.reshape(groups * blocks * (k // groups), block * r * s)
    rows, positions = w.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=w.shape[0])
    row_ptr = torch.zeros(w.shape[0] + 1, dtype=torch.int32)
    row_ptr[1:] = counts.cumsum(0)
    values = w[rows, positions].contiguous()
    del w  # as large as the dense weight; what follows should not add to it
    index = torch.where(positions >= 32768, positions - 65536, positions).to(torch.int16)
    return PackedSparse(values, index, row_ptr, block)


def unpack_sparse(
    packed: PackedSparse, in_channels: int, out_channels: int, kernel_size: tuple[int, int], groups: int = 1
) -> Tensor:
    """The inverse of :func:`pack_sparse`: ``(K, C/G, R, S)`` float32."""
    (r, s), cg, kg = kernel_size, in_channels // groups, out_channels // groups
    blocks = -(-cg // packed.block)
    width = packed.block * r * s
    row_ptr = packed.row_ptr.long()
    rows = torch.repeat_interleave(torch.arange(row_ptr.numel() - 1, device=row_ptr.device), row_ptr.diff())
    w = packed.values.new_zeros(groups * blocks * kg, width)
    w[rows, packed.positions.long() & 0xFFFF] = packed.values
    w = w.reshape(groups, blocks, kg, packed.block, r * s).transpose(1, 2)
    w = w.reshape(groups, kg, blocks * packed.block, r, s)[:, :, :cg]
    return w.reshape(out_channels, cg, r, s).contiguous()
