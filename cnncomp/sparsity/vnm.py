"""V:2:M, V = 64: of each M input channels 64 output channels keep four, and of those each output channel two.

The hierarchy of VENOM (Castro et al., "VENOM: A Vectorized N:M Format for Unleashing the Power of Sparse Tensor Cores", SC
2023): 1 - 2/M zeros, on tensor cores that know 2:4 alone. The output channels of a group are cut into KB runs of 64. What a
run keeps are fours of input channels at one tap, in ascending order; fours of zeros alone are left out. They are cut into
pieces as deep as one ``mma.sp``, 64 bytes of dense elements, the last one filled up with zeros. Runs lie in the order of their
lengths, the longest first, behind the same table as in :mod:`cnncomp.sparsity.vectors`. A piece is

- 2,048 bytes of values, half a step of :mod:`cnncomp.sparsity.two_four`, and its metadata: 512 bytes, for each lane and tile
  one word; 16-bit weights: 256 bytes, for lanes 0 and 1 of each quad;
- an int32 for each of its input channels: ``channel * 256 + r * 16 + s``; -1 where it is filled up or has no non-zero. For 8
  bits the first channels of all fours come first, then the second ones, and so on: so they lie in shared memory.

The kernels gather activations that lie channel by channel in units of images (:func:`to_units`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cnncomp.errors import ArgumentError, PatternError
from cnncomp.sparsity import two_four, vectors
from cnncomp.sparsity.blocks import as_blocks
from cnncomp.sparsity.places import check_pieces, check_taps
from cnncomp.sparsity.vectors import table_bytes
from cnncomp.sparsity.weights import DTYPES, SLICE, check_weight, place

RUN = SLICE  # V
VECTOR = RUN // 8  # of them, neighbours that a thread has
COLUMNS = 4  # that are kept of M
KEPT_BYTES = RUN * 32  # of a piece
#: M of which :func:`find_m` knows: 75 to 95 % zeros.
SIZES = (8, 10, 12, 16, 20, 24, 32, 40)


def unit(dtype: torch.dtype, images: int) -> int:
    """Images whose pixels lie next to each other, of so many."""
    return vectors.UNIT if dtype.itemsize == 2 or images <= vectors.UNIT else 16


def columns(dtype: torch.dtype) -> int:
    """Input channels that are gathered as one."""
    return 1


def depth(dtype: torch.dtype) -> int:
    """Input channels of a piece."""
    return 64 // dtype.itemsize


def value_bytes(dtype: torch.dtype) -> int:
    """Bytes of a piece's values and metadata."""
    return KEPT_BYTES + KEPT_BYTES // (4 * dtype.itemsize)


def piece_bytes(dtype: torch.dtype) -> int:
    """Bytes of a piece: its values, metadata and places."""
    return value_bytes(dtype) + 4 * depth(dtype)


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


def find_m(weight: Tensor, groups: int = 1) -> int | None:
    """The M of SIZES with which a weight (K, C/G, R, S) packs most tightly, None if it is 64:2:M for none."""
    if int((weight != 0).sum(1).amax()) > 2 * -(-weight.shape[1] // SIZES[0]):  # most weights: told at once
        return None
    found = [m for m in SIZES if not first_violation_vnm(weight, RUN, m, groups)]
    return min(found, key=lambda m: _fours(weight, m, groups), default=None)


def check_m(weight: Tensor, groups: int = 1) -> int:
    """The M of :func:`find_m`.

    Raises:
        PatternError: none; it names what breaks the smallest.
    """
    if (m := find_m(weight, groups)) is None:
        where = first_violation_vnm(weight, RUN, SIZES[0], groups)
        raise PatternError("weight", where, f"{RUN}:2:M, M one of {SIZES}")
    return m


def _fours(weight: Tensor, m: int, groups: int) -> int:
    return int((as_blocks(weight, RUN, m, groups) != 0).any(1).any(2).sum())


def kept_columns(weight: Tensor, m: int, groups: int = 1) -> float:
    """Input channels that the runs keep, in whole fours, of all: what is left of the dense kernel's gathering; the products
    are half of that."""
    _, c, r, s = weight.shape
    runs = groups * -(-(weight.shape[0] // groups) // RUN)
    return COLUMNS * _fours(weight, m, groups) / max(1, runs * c * r * s)


def pack_vnm(weight: Tensor, m: int, groups: int = 1) -> Tensor:
    """Pack a 64:2:M weight.

    Args:
        weight: (K, C/G, R, S) int8, float16 or bfloat16; R and S at most 15.
        m: Input channels of which four are kept, 4 to 256.
        groups: G.

    Returns:
        int8, one dimension: the buffer as above.

    Raises:
        PatternError: another pattern; it names the first 64 x M weights that break it.
        DtypeError, ArgumentError: as :func:`cnncomp.sparsity.pack_2to4`; M out of range, a larger kernel.
    """
    check_weight(weight, groups, DTYPES)
    check_sizes(RUN, m)
    check_taps(weight)
    rows, source, places, counts = _kept(weight, m, groups)
    per_piece = depth(weight.dtype) // COLUMNS
    pieces = -(-counts // per_piece)
    order = pieces.argsort(descending=True, stable=True)
    first = F.pad(pieces[order].cumsum(0), (1, 0))
    start = torch.empty_like(pieces)
    start[order] = first[:-1]
    total, runs, device = int(first[-1]), len(counts), weight.device
    ends = counts.cumsum(0)
    run = torch.repeat_interleave(torch.arange(runs, device=device), counts)
    at = torch.arange(len(run), device=device) + (start * per_piece - ends + counts)[run]
    columns = source.new_full((_in_steps(total) * per_piece, COLUMNS), -1)  # the zeros
    columns[at] = source
    fours = rows[:, columns]
    filled = torch.full((total * per_piece, COLUMNS), -1, dtype=torch.int32, device=device)
    filled[at] = places
    table = torch.zeros(table_bytes(runs) // 4, dtype=torch.int32, device=device)
    table[: runs + 1], table[runs + 1 : 2 * runs + 1] = first, order
    body = torch.cat([_to_pieces(fours, total), _places_to_rows(filled, weight.dtype)], 1)
    return torch.cat([table.view(torch.int8), body.flatten()])


def _kept(weight: Tensor, m: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All runs' columns (64, ...), zeros last; the kept fours' columns (F, 4) and places (F, 4); how many each run has."""
    _, c, _, s = weight.shape
    blocks = as_blocks(weight, RUN, m, groups)  # (runs, 64, CM, M, taps)
    nonzero = blocks != 0
    used = nonzero.any(1).transpose(2, 3)  # (runs, CM, taps, M)
    if int(used.sum(3).amax()) > COLUMNS or int(nonzero.sum(3, dtype=torch.uint8).amax()) > 2:
        raise PatternError("weight", first_violation_vnm(weight, RUN, m, groups), f"{RUN}:2:{m}")
    # The used ones first, then the lowest: all different, and zero where they are not used.
    columns = used.to(torch.uint8).sort(dim=3, descending=True, stable=True).indices[..., :COLUMNS].sort(3).values
    run, cm, tap = used.any(3).nonzero(as_tuple=True)
    columns = columns[run, cm, tap]  # (F, 4)
    real = used[run, cm, tap].gather(1, columns)
    channel = cm[:, None] * m + columns
    places = torch.where(real, channel * 256 + (tap // s * 16 + tap % s)[:, None], -1).to(torch.int32)
    rows = blocks.new_zeros(RUN, blocks[:, 0].numel() + 1)
    rows[:, :-1].unflatten(1, (len(blocks), *blocks.shape[2:])).copy_(blocks.transpose(0, 1))
    at = ((run[:, None] * blocks.shape[2] + cm[:, None]) * m + columns) * blocks.shape[4] + tap[:, None]
    return rows, at, places, torch.bincount(run, minlength=len(blocks))


def _in_steps(pieces: int) -> int:
    """So many pieces filled up to steps of two_four.py, of two pieces each; one at least."""
    return max(2, pieces + pieces % 2)


def _to_pieces(fours: Tensor, pieces: int) -> Tensor:
    """Fours (64, steps, 4) to (pieces, bytes of values and metadata)."""
    dtype = fours.dtype
    values, nibble = two_four.compress(fours)
    kept = two_four.pack_values(values, dtype).reshape(-1, KEPT_BYTES)
    meta = two_four.pack_metadata(nibble, dtype)
    if dtype.itemsize == 2:  # of a step's lanes of four, two have the first half of it, two the second
        meta = meta.reshape(-1, 8, 2, 32).transpose(1, 2)
    return torch.cat([kept, meta.reshape(len(kept), -1)], 1)[:pieces]


def _from_pieces(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_to_pieces`."""
    packed = F.pad(packed, (0, 0, 0, _in_steps(len(packed)) - len(packed)))
    kept, meta = packed[:, :KEPT_BYTES], packed[:, KEPT_BYTES:]
    if dtype.itemsize == 2:
        meta = meta.reshape(-1, 2, 8, 32).transpose(1, 2)
    steps = len(packed) // 2
    values = two_four.unpack_values(kept.reshape(1, steps, -1), dtype)
    return two_four.decompress(values, two_four.unpack_metadata(meta.reshape(1, steps, -1), dtype))


def _places_to_rows(places: Tensor, dtype: torch.dtype) -> Tensor:
    """Places (pieces * fours, 4) to (pieces, bytes)."""
    fours = places.reshape(-1, depth(dtype) // COLUMNS, COLUMNS)
    if dtype.itemsize == 1:
        fours = fours.transpose(1, 2)
    return fours.flatten(1).contiguous().view(torch.int8)


def _rows_to_places(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_places_to_rows`, flat."""
    words = packed.contiguous().view(torch.int32)
    if dtype.itemsize == 1:
        words = words.unflatten(1, (COLUMNS, -1)).transpose(1, 2)
    return words.flatten()


def unpack_vnm(packed: Tensor, shape: Sequence[int], dtype: torch.dtype, groups: int = 1) -> Tensor:
    """The inverse of :func:`pack_vnm`: the weight of ``shape`` (K, C/G, R, S) and ``dtype``. It needs no M."""
    k, c, r, s = shape
    runs = groups * -(-(k // groups) // RUN)
    table = packed[: 4 * (2 * runs + 1)].view(torch.int32).long()
    first, order = table[: runs + 1], table[runs + 1 :]
    pieces = packed[table_bytes(runs) :].reshape(-1, piece_bytes(dtype))
    places = _rows_to_places(pieces[:, value_bytes(dtype) :], dtype).long()
    columns = _from_pieces(pieces[:, : value_bytes(dtype)], dtype).flatten(1)[:, : len(places)]  # (64, columns)
    run = torch.repeat_interleave(order, first.diff() * depth(dtype))
    real = places >= 0
    run, places = run[real], places[real]
    at = ((places >> 8) * r + (places >> 4 & 15)) * s + (places & 15)
    rows = columns.new_zeros(RUN, runs, c * r * s)
    rows[:, run, at] = columns[:, real]
    rows = rows.transpose(0, 1).reshape(groups, -1, c * r * s)[:, : k // groups]
    return rows.reshape(k, c, r, s).contiguous()


def check_packed(packed: Tensor, shape: Sequence[int], dtype: torch.dtype, groups: int) -> None:
    """Raise :class:`ArgumentError` unless a buffer can be the packed weight of ``shape``; its content is not looked at."""
    start = table_bytes(groups * -(-(shape[0] // groups) // RUN))
    check_pieces(packed, start, piece_bytes(dtype), "pieces", shape, groups)


def to_units(x: Tensor, groups: int = 1) -> Tensor:
    """Activations (N, C, H, W) as the kernels gather them, copied.

    Args:
        x: uint8, int8, float16 or bfloat16.
        groups: Not used; other formats' copies depend on it.

    Returns:
        (C, NB, H, W, U), U = 16 images for 8 bits and 8 for 16, or for no more than 8, NB = ceil(N / U); zeros where it is
        filled up.
    """
    if x.itemsize == 2:
        return vectors.to_units(x)
    n, c, h, w = x.shape
    size = unit(x.dtype, n)
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, -n % size))
    return x.reshape(-1, size, c, h, w).permute(2, 0, 3, 4, 1).contiguous()


def units_shape(shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """Of images (N, C, H, W) in units, N whole ones: as :func:`to_units` returns them."""
    n, c, h, w = shape
    size = unit(dtype, n)
    return c, n // size, h, w, size
