"""What the formats of sparse weights share: checks, and a weight as rows of blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError, DtypeError

SLICE = 64  # output channels of a slice, which a warp of the GPU kernels multiplies
CHUNK_BYTES = 16  # what they copy at once: the input channels of a group are whole ones
MOST_TAPS = 15  # rows and columns of a kernel
DTYPES = (torch.int8, torch.float16, torch.bfloat16)


def why_not(in_channels: int, kernel_size: Sequence[int], groups: int, size: int = 1) -> str | None:
    """Why the GPU kernels with packed weights can't run a convolution of elements of ``size`` bytes, None if they can."""
    chunk, channels = CHUNK_BYTES // size, in_channels // groups
    if channels % chunk:
        return (
            f"sparse tensor-core kernels need a multiple of {chunk} input channels, the layer has {channels} in a group"
        )
    if max(kernel_size) > MOST_TAPS:
        taps = f"at most {MOST_TAPS} rows and columns of taps"
        return f"sparse tensor-core kernels take {taps}, the layer has {tuple(kernel_size)}"
    return None


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
