"""Unstructured weights: one bit for each weight, and the non-zeros.

For "load as sparse, compute as dense" (Xia et al., "Flash-LLM", VLDB 2024; the bitmap as in Fan et al., "SpInfer", EuroSys
2025): where a layer waits for its weights, as a linear one does on few rows, it moves fewer bytes, and multiplies on dense
tensor cores.

The reduction runs over (r, s, c), c fastest; a row of weights is W = ceil(R * S * C/G / 64) words of 64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cnncomp.sparsity.blocks import DTYPES
from cnncomp.sparsity.weights import check_weight

WORD = 64


class PackedBitmap(NamedTuple):
    """A weight of T non-zeros.

    ``values``: (T,), row after row; ``bits``: (K, W) int64, bit i of word w says whether weight 64 * w + i of the row is kept;
    ``offsets``: (K * W + 1,) int32, where in ``values`` a word's begin.
    """

    values: Tensor
    bits: Tensor
    offsets: Tensor


def pack_bitmap(weight: Tensor, groups: int = 1) -> PackedBitmap:
    """Pack a weight (K, C/G, R, S) of int8, float16, bfloat16 or float32 with any zeros. It is smaller than the dense one from
    1/8 zeros on for 8 bits (with 64-bit words and their offsets: 3/16), 3/32 for 16.

    Raises:
        DtypeError, ArgumentError: as :func:`cnncomp.sparsity.weights.check_weight`.
    """
    check_weight(weight, groups, DTYPES)
    rows = weight.permute(0, 2, 3, 1).flatten(1)
    rows = F.pad(rows, (0, -rows.shape[1] % WORD))
    kept = rows != 0
    places = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=weight.device)
    octets = (kept.view(torch.uint8).reshape(-1, 8) * places).sum(1, dtype=torch.uint8)
    counts = kept.reshape(-1, WORD).sum(1, dtype=torch.int32)
    offsets = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return PackedBitmap(rows[kept], octets.view(torch.int64).reshape(len(rows), -1), offsets)


def unpack_bitmap(packed: PackedBitmap, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`pack_bitmap`: the weight of ``shape`` (K, C/G, R, S)."""
    k, c, r, s = shape
    octets = packed.bits.contiguous().view(torch.uint8).unsqueeze(2)
    places = torch.arange(8, dtype=torch.uint8, device=octets.device)
    kept = (octets >> places & 1).bool().flatten(1)
    rows = packed.values.new_zeros(kept.shape)
    rows[kept] = packed.values
    return rows[:, : math.prod((c, r, s))].reshape(k, r, s, c).permute(0, 3, 1, 2).contiguous()
