"""Which sparse int8 kernel pays on a GPU that nothing can be measured on: a table of modelled times.

``gpu_crossovers.json`` holds, for convolutions of a grid of sizes, the time of the dense int8 kernel over that of each sparse
one, the copy of its input included: from counts in an emulator, modelled, not measured (``python -m bench.gpu_crossover``).
Between the grid's points the worst of the neighbours counts, above its largest sizes the largest, and of channels, whose other
number may be any, all larger ones. Below its smallest sizes, at a stride, which makes more of the copy, in groups, and on
architectures that it lacks, dense is taken.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from cnncomp.dispatch.candidates import Option, groups_of, weight4d
from cnncomp.nn import ConvertedLayer, DenseConv2d
from cnncomp.sparsity.blocks import kept_fraction
from cnncomp.sparsity.vectors import QUAD, RUN
from cnncomp.sparsity.vnm import check_m, kept_columns
from cnncomp.sparsity.weights import CHUNK_BYTES, SLICE

TABLE = Path(__file__).with_name("gpu_crossovers.json")
#: The grid: input and output channels, images, rows and columns of the output; and kernels, larger ones as 3x3.
CHANNELS, IMAGES, SIZES = (64, 128, 256), (1, 8, 64), (7, 28)
KERNELS = {"1x1": 1, "3x3": 3}
FORMATS = ("sparse24", "blocks", "vectors", "vnm")
#: A sparse kernel has to take at most this much of the dense one's modelled time, which is 7 % off in the median.
MARGIN = 0.85

Ratios = dict[str, dict[str, dict[str, dict[str, list[list[list[float]]]]]]]


class Size(NamedTuple):
    """Of a convolution: its kernel, the fewer of its input and output channels, images, pixels of an output image."""

    kernel_size: tuple[int, int]
    channels: int
    images: int
    pixels: int


@functools.cache
def _table() -> Ratios:
    found: Ratios = json.loads(TABLE.read_text())
    return found


def arch_of(device: torch.device) -> str:
    """ "sm_80" of a GPU of that architecture."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _around(value: float, grid: tuple[int, ...]) -> set[int]:
    """Places in ``grid`` on both sides of a value, of its end for one beyond it, none for one before it."""
    if value < grid[0]:
        return set()
    below = max(i for i, v in enumerate(grid) if v <= value)
    return {below, below if grid[below] == value else min(below + 1, len(grid) - 1)}


def gain(arch: str, format: str, zeros: float, size: Size) -> float | None:
    """How many times as fast as the dense int8 kernel, at least; None where the table has no answer.

    Args:
        arch: "sm_80", ...
        format: One of FORMATS.
        zeros: Fraction of the weights that the kernel leaves out.
        size: Of the convolution.
    """
    kernel = "1x1" if max(size.kernel_size) == 1 else "3x3"
    levels = _table().get(arch, {}).get(format, {}).get(kernel, {})
    known = max((level for level in levels if float(level) <= zeros + 1e-6), key=float, default=None)
    channels = [i for i, wider in enumerate((*CHANNELS[1:], math.inf)) if wider > size.channels >= CHANNELS[0]]
    images, sizes = _around(size.images, IMAGES), _around(math.sqrt(size.pixels), SIZES)
    if known is None or not (channels and images and sizes):
        return None
    ratios = levels[known]
    return min(ratios[c][n][s] for c, n, s in itertools.product(channels, images, sizes))


def left_out(layer: ConvertedLayer, format: str) -> float:
    """Fraction of a layer's weights that the kernel of a format leaves out."""
    weight, groups = weight4d(layer), groups_of(layer)
    if format == "vnm":
        return 1 - kept_columns(weight, check_m(weight, groups), groups) / 2
    if format == "sparse24":
        return 0.5
    block = (RUN, QUAD) if format == "vectors" else (SLICE, CHUNK_BYTES)
    return 1 - kept_fraction(weight, *block, groups)


def choose(
    layer: ConvertedLayer, options: list[Option], arch: str, shape: tuple[int, ...]
) -> tuple[Option | None, str]:
    """The sparse int8 kernel that the model puts before the dense one by most, None for none, and one line why.

    Args:
        options: That can run the layer.
        arch: Of the GPU.
        shape: Of the layer's output, (N, K, P, Q) or (..., K).
    """
    found: list[tuple[float, Option]] = []
    reasons = []
    for option in options:
        format = option.candidate.kernel.partition("_")[2].partition("_")[0]
        if format not in FORMATS or getattr(option.layer, "on_triton", False):  # CUDA C++ is modelled
            continue
        zeros = left_out(layer, format)
        gained = _gain_of(layer, arch, format, zeros, shape)
        about = f"{option.candidate.kernel} at {zeros:.0%} zeros"
        if gained is None:
            reasons.append(f"{about} is not modelled here, kept dense")
        elif gained * MARGIN < 1:
            reasons.append(f"{about} is modelled {gained:.2f}× dense int8, kept dense")
        else:
            found.append((gained, option))
    if not found:
        return None, "; ".join(reasons)
    gained, best = max(found, key=lambda pair: pair[0])
    return best, f"modelled {gained:.2f}× faster than dense int8"


def _gain_of(layer: ConvertedLayer, arch: str, format: str, zeros: float, shape: tuple[int, ...]) -> float | None:
    if isinstance(layer, DenseConv2d):
        g = layer.geometry
        if g.groups > 1 or max(g.stride) > 1:
            return None
        n, *_, p, q = shape if len(shape) == 4 else (*shape[:2], 1, *shape[2:])
        size = Size(g.kernel_size, min(g.in_channels, g.out_channels), n, p * q)
    else:  # pixels that stand for images
        rows, k = math.prod(shape[:-1]), shape[-1]
        size = Size((1, 1), min(k, weight4d(layer).shape[1]), rows // SIZES[0] ** 2, SIZES[0] ** 2)
    return gain(arch, format, zeros, size)
