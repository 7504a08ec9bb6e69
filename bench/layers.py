"""Shapes of the convolutions of well-known networks, from ``shapes/*.csv``, and random layers of these shapes."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cnncomp.dispatch import Candidate
from cnncomp.dispatch.choose import to_format
from cnncomp.nn import Clamp, DenseConv2d, Geometry, QuantConv2d, QuantSpec
from cnncomp.recordings import kernels_of

FOLDER = Path(__file__).parent / "shapes"
NETWORKS = tuple(sorted(path.stem for path in FOLDER.glob("*.csv")))
GPU_FOLDER = FOLDER / "gpu"  # layers that only the model of GPUs takes: they are large
GPU_NETWORKS = tuple(sorted({*NETWORKS, *(path.stem for path in GPU_FOLDER.glob("*.csv"))}))

#: How the input of a quantised layer is quantised: the step does not change the time, the sign may.
INPUT = QuantSpec(0.02, torch.uint8)
#: How its output is: 8 bit, as in the middle of a network.
OUTPUT = QuantSpec(0.05, torch.uint8)


@dataclass(frozen=True)
class ConvShape:
    """A convolution and its input image (batch 1); ``count`` layers of the network have it, ``name`` is the first."""

    network: str
    name: str
    count: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: int
    padding: int
    dilation: int
    groups: int

    @property
    def geometry(self) -> Geometry:
        stride, padding, dilation = ((v, v) for v in (self.stride, self.padding, self.dilation))
        return Geometry(self.c, self.k, (self.r, self.s), stride, padding, dilation, self.groups)

    @property
    def macs(self) -> int:
        """Multiply-adds of one image, zeros included."""
        p, q = (
            (size + 2 * self.padding - self.dilation * (kernel - 1) - 1) // self.stride + 1
            for size, kernel in ((self.h, self.r), (self.w, self.s))
        )
        return self.k * p * q * self.geometry.reduction

    def __str__(self) -> str:
        return f"{self.network}-{self.name}"


def _read(path: Path) -> list[ConvShape]:
    with path.open(newline="") as f:
        rows = list(csv.DictReader(f))
    texts = {"name"}
    return [ConvShape(path.stem, **{k: v if k in texts else int(v) for k, v in row.items()}) for row in rows]  # type: ignore[arg-type]


def conv_shapes(network: str) -> list[ConvShape]:
    """The distinct convolutions of a network, in order."""
    return _read(FOLDER / f"{network}.csv")


def gpu_shapes(network: str) -> list[ConvShape]:
    """The distinct convolutions of a network and its linear layers, as convolutions of one pixel, for the model of GPUs."""
    paths = [FOLDER / f"{network}.csv", GPU_FOLDER / f"{network}.csv"]
    return [shape for path in paths if path.exists() for shape in _read(path)]


def random_layer(
    shape: ConvShape, zeros: float = 0.0, quantized: bool = False, run: int = 1
) -> tuple[DenseConv2d, Tensor]:
    """A dense layer with ReLU, a fraction ``zeros`` of its weights zero, in runs of ``run`` input channels, and a random input
    image, floats in [0, 1)."""
    g = shape.geometry
    generator = torch.Generator().manual_seed(0)
    size = (g.out_channels, g.in_channels // g.groups, *g.kernel_size)
    weight = torch.randn(size, generator=generator) / math.sqrt(g.reduction)
    kept = torch.rand((size[0], -(-size[1] // run), *size[2:]), generator=generator) >= zeros
    weight *= kept.repeat_interleave(run, 1)[:, : size[1]]
    layer = DenseConv2d(g, weight, torch.randn(g.out_channels, generator=generator), Clamp(0.0))
    layer.info.name = shape.name
    layer.info.input = INPUT if quantized else None
    return layer, torch.rand((1, shape.c, shape.h, shape.w), generator=generator)


def calls(layer: DenseConv2d, x: Tensor, candidates: Iterable[Candidate]) -> dict[str, Callable[[], object]]:
    """The layer on each kernel, called as in a network: without Python between kernels, on ``x`` (float) in the format that the
    kernel takes.

    Args:
        candidates: Entries of dispatch's table, whether dispatch would try them on this layer or not.

    Raises:
        CnncompError: a kernel that can't run it.
    """
    found: dict[str, Callable[[], object]] = {}
    for candidate in candidates:
        built = candidate.build(layer)
        if isinstance(built, QuantConv2d):
            built.set_output(OUTPUT)
        given = (to_format(x, candidate.takes, layer.info.input),)
        found[candidate.kernel] = kernels_of(built, given) or partial(built, *given)
    return found
