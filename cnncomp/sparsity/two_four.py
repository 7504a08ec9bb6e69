"""2:4 weights in the order in which ``mma.sp`` reads them.

At most two of four neighbouring input channels are kept, for each output channel and tap. The reduction runs over (r, s, c), c
fastest, so that four neighbours stay together; it is cut into steps of 128 bytes of dense elements (128 int8 or 64 fp16), and
the output channels of a group into slices of 64. A step of a slice is one run of bytes, which a thread block copies as it is:

- 4,096 bytes of values: for each half ``f`` of the step (the depth of one instruction), each tile ``i`` of 16 rows and each
  lane, the four registers of the left operand. Row ``r`` of tile ``i`` is channel ``8 * (r % 8) + 2 * i + r // 8`` of the
  slice, so that what a thread gets back is 8 neighbouring channels;
- metadata, two bits for each kept element: its place among its four. int8: 1,024 bytes, for each half, lane and tile one
  word; fp16: 512 bytes, for each lane and tile one word, of which lanes 0 and 1 of a quad hold the first half of the step.

Fragments and metadata: PTX ISA 8.8, 9.7.14.6 (m16n8k64 for 8 bits, m16n8k32 for 16). Pairs of places ascend, as
``mma.sp::ordered_metadata`` wants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cnncomp.errors import ArgumentError, PatternError
from cnncomp.sparsity.weights import CHUNK_BYTES, DTYPES, SLICE, check_weight, place, round_up

STEP_BYTES = 128  # dense bytes of the reduction in a step
VALUE_BYTES = SLICE * STEP_BYTES // 2

#: For each set of non-zeros among four (bit i: element i), the places kept, ascending. Sets of more than two are not used.
_FIRST = [0, 0, 1, 0, 2, 0, 1, 0, 0, 0, 1, 0, 2, 0, 0, 0]
_SECOND = [1, 1, 2, 1, 3, 2, 2, 0, 3, 3, 3, 0, 3, 0, 0, 0]


def step_bytes(dtype: torch.dtype) -> int:
    """Bytes of one step of a slice, values and metadata."""
    return VALUE_BYTES + VALUE_BYTES // (4 * dtype.itemsize)


def _rows(weight: Tensor, groups: int) -> Tensor:
    """The weight as rows (G * KB * 64, steps * elements of a step), channels innermost, zeros where it is padded."""
    k, c, r, s = weight.shape
    per_chunk, per_step = CHUNK_BYTES // weight.itemsize, STEP_BYTES // weight.itemsize
    kg, padded = k // groups, c + -c % per_chunk
    taps = F.pad(weight.reshape(k, c, r * s).transpose(1, 2), (0, padded - c))
    rows = taps.reshape(groups, kg, r * s * padded)
    return F.pad(rows, (0, -rows.shape[2] % per_step, 0, -kg % SLICE)).flatten(0, 1)


def first_violation(weight: Tensor, n: int = 2, m: int = 4) -> str | None:
    """The first group of ``m`` input channels of ``weight`` (K, C/G, R, S) with more than ``n`` non-zeros, in words."""
    k, c, r, s = weight.shape
    count = F.pad(weight != 0, (0, 0, 0, 0, 0, -c % m)).reshape(k, -1, m, r, s).sum(2)
    wrong = (count > n).nonzero()
    if not len(wrong):
        return None
    out, group, row, column = wrong[0].tolist()
    number = int(count[out, group, row, column])
    return f"{number} non-zeros at " + place((out, out), (m * group, min(c, m * group + m) - 1), (row, column))


def check_2to4(weight: Tensor, groups: int = 1) -> None:
    """Raise unless a weight can be packed; errors as :func:`pack_2to4`."""
    check_weight(weight, groups, DTYPES)
    if where := first_violation(weight):
        raise PatternError("weight", where, "2:4, at most 2 non-zeros in each 4 input channels")


def pack_2to4(weight: Tensor, groups: int = 1) -> Tensor:
    """Pack a 2:4 weight.

    Args:
        weight: (K, C/G, R, S) int8, float16 or bfloat16. C/G is padded to 16 bytes with zeros, K/G to 64.
        groups: G.

    Returns:
        int8 (G, KB, T, 5120), or (G, KB, T, 4608) for 16-bit weights: KB slices of 64 output channels, T steps of the
        reduction, and the bytes of each as above.

    Raises:
        PatternError: more than two non-zeros in four neighbouring input channels; it names the first such four.
        DtypeError, ArgumentError: as :func:`cnncomp.sparsity.weights.check_weight`.
    """
    check_weight(weight, groups, DTYPES)
    fours = _rows(weight, groups).unflatten(1, (-1, 4))
    if bool(((fours != 0).sum(2, dtype=torch.uint8) > 2).any()):
        check_2to4(weight, groups)
    values, nibble = compress(fours)
    kept = pack_values(values, weight.dtype)
    meta = pack_metadata(nibble, weight.dtype)
    return torch.cat([kept, meta], 2).unflatten(0, (groups, -1))


def compress(fours: Tensor) -> tuple[Tensor, Tensor]:
    """Fours (rows, n, 4) of at most two non-zeros each: what is kept (rows, n, 2), and their places (rows, n), 4 bits each."""
    bits = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=fours.device)
    code = ((fours != 0).to(torch.uint8) * bits).sum(2, dtype=torch.uint8).long()
    place = torch.tensor([_FIRST, _SECOND], device=fours.device).t()[code]
    return fours.gather(2, place), (place[..., 0] + 4 * place[..., 1]).to(torch.uint8)


def decompress(values: Tensor, nibble: Tensor) -> Tensor:
    """The inverse of :func:`compress`."""
    places = torch.stack([nibble & 3, nibble >> 2], 2).long()
    return values.new_zeros(*nibble.shape, 4).scatter_(2, places, values)


# Axes of what follows: slice, g (row % 8), tile i, half (row // 8), step, half f of the step, then what lies within it.


def pack_values(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Kept values (rows, fours, 2) to (slices, steps, 4096) bytes."""
    words = values.contiguous().view(torch.int8).reshape(-1).view(torch.int32)
    words = words.reshape(
        -1, 8, 4, 2, values.shape[1] * 2 * dtype.itemsize // 64, 2, 2, 4
    )  # ..., 16-byte half q, lane t
    ordered = words.permute(0, 4, 5, 2, 1, 7, 6, 3).contiguous()
    return ordered.view(torch.int8).reshape(words.shape[0], words.shape[4], VALUE_BYTES)


def unpack_values(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`pack_values`."""
    words = packed.contiguous().view(torch.int32).reshape(*packed.shape[:2], 2, 4, 8, 4, 2, 2)
    back = words.permute(0, 4, 3, 7, 1, 2, 6, 5).contiguous()
    return back.view(torch.int8).flatten().view(dtype).reshape(packed.shape[0] * SLICE, -1, 2)


def pack_metadata(nibble: Tensor, dtype: torch.dtype) -> Tensor:
    """Places of the kept (rows, fours), 4 bits each, to (slices, steps, bytes)."""
    pairs = nibble.reshape(nibble.shape[0], -1, 2)
    data = (pairs[..., 0] | pairs[..., 1] << 4).contiguous()
    if dtype.itemsize == 1:  # a word is 8 fours of one row: lane t has row half t % 2 of the fours' half t // 2
        words = data.flatten().view(torch.int32).reshape(-1, 8, 4, 2, data.shape[1] // 16, 2, 2)
        ordered = words.permute(0, 4, 5, 1, 6, 3, 2)
    else:  # half a word is 4 fours of one row: lane t has those of half t // 2 of the step, t % 2 within it, rows g and g + 8
        words = data.flatten().view(torch.int16).reshape(-1, 8, 4, 2, data.shape[1] // 8, 2, 2)
        ordered = words.permute(0, 4, 1, 5, 6, 2, 3)
    return ordered.contiguous().view(torch.int8).reshape(words.shape[0], words.shape[4], -1)


def unpack_metadata(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`pack_metadata`: (rows, fours)."""
    slices, steps, _ = packed.shape
    if dtype.itemsize == 1:
        words = packed.contiguous().view(torch.int32).reshape(slices, steps, 2, 8, 2, 2, 4)
        back = words.permute(0, 3, 6, 5, 1, 2, 4)
    else:
        words = packed.contiguous().view(torch.int16).reshape(slices, steps, 8, 2, 2, 4, 2)
        back = words.permute(0, 2, 5, 6, 1, 3, 4)
    data = back.contiguous().view(torch.uint8).reshape(slices * SLICE, -1)
    return torch.stack([data & 15, data >> 4], 2).flatten(1)


def unpack_2to4(packed: Tensor, shape: Sequence[int], dtype: torch.dtype, groups: int = 1) -> Tensor:
    """The inverse of :func:`pack_2to4`: the weight of ``shape`` (K, C/G, R, S) and ``dtype``."""
    k, c, r, s = shape
    flat = packed.flatten(0, 1)
    values = unpack_values(flat[..., :VALUE_BYTES], dtype)
    fours = decompress(values, unpack_metadata(flat[..., VALUE_BYTES:], dtype))
    padded = round_up(c, CHUNK_BYTES // dtype.itemsize)
    rows = fours.reshape(groups, -1, fours.shape[1] * 4)[:, : k // groups, : r * s * padded]
    return rows.reshape(k, r * s, padded)[:, :, :c].transpose(1, 2).reshape(k, c, r, s).contiguous()


def packed_shape(shape: Sequence[int], dtype: torch.dtype, groups: int = 1) -> tuple[int, int, int, int]:
    """Shape of the packed weight of ``shape`` (K, C/G, R, S)."""
    k, c, r, s = shape
    reduction = math.prod((r, s, round_up(c, CHUNK_BYTES // dtype.itemsize))) * dtype.itemsize
    return groups, -(-(k // groups) // SLICE), -(-reduction // STEP_BYTES), step_bytes(dtype)


def check_packed(packed: Tensor, shape: Sequence[int], dtype: torch.dtype, groups: int) -> None:
    """Raise :class:`ArgumentError` unless a packed weight has the sizes of ``shape``."""
    expected = packed_shape(shape, dtype, groups)
    if tuple(packed.shape) != expected:
        wanted = f"{expected} for {tuple(shape)}, {groups} groups"
        raise ArgumentError("weight", f"packed shape {tuple(packed.shape)}", wanted)
