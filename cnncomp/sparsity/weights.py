"""What the formats of sparse weights share: checks, and a weight as rows of blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError, DtypeError


def check_weight(weight: Tensor, groups: int, dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless ``weight`` (K, C/G, R, S) is finite, of one of ``dtypes``, and splits into ``groups``.

    Raises:
        DtypeError: another dtype.
        ArgumentError: other dimensions, channels that are no multiple of the groups, NaN or infinite values.
    """
    if weight.dtype not in dtypes:
        raise DtypeError("weight", weight.dtype, " or ".join(map(str, dtypes)))
    if weight.dim() != 4 or groups < 1 or weight.shape[0] % groups:
        expected = f"(K, C/G, R, S) with K a multiple of groups={groups}"
        raise ArgumentError("weight", f"shape {tuple(weight.shape)}", expected)
    if weight.is_floating_point() and not _finite(weight):
        raise ArgumentError("weight", "NaN or infinite values", "finite weights")


def _finite(weight: Tensor) -> bool:
    """A sum, which NaN and infinity stay in, tells it faster than a look at each; only its own overflow needs one."""
    return bool(torch.isfinite(weight.float().sum())) or bool(torch.isfinite(weight).all())


def round_up(value: int, multiple: int) -> int:
    """The next multiple from ``value`` on."""
    return value + -value % multiple


def place(out: tuple[int, int], channels: tuple[int, int], tap: tuple[int, int]) -> str:
    """Where a group of weights is, in words; ``out``, ``channels``: its first and last."""
    return f"{_range('output channel', out)}, {_range('input channel', channels)}, tap {tap}"


def _range(name: str, ends: tuple[int, int]) -> str:
    first, last = ends
    return f"{name} {first}" if first == last else f"{name}s {first} to {last}"
