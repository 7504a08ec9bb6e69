"""How far each layer of a network is from what the core can do, and what binds it: ``python -m bench.limits``.

Each distinct convolution of a network with random zeros, alone and again and again on the same image, against the least time
that each resource of the core would take for it: multiply-adds, reads of inputs from the first-level cache (a sparse kernel
reads its inputs anew for each non-zero), and bytes in and out of the cache that holds the image. One thread, unless
CNNCOMP_BENCH_THREADS says otherwise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.layers import NETWORKS, ConvShape, calls, conv_shapes, random_layer
from bench.options import chosen, threads
from bench.peers import peaks
from cnncomp.demo.common import machine
from cnncomp.dispatch import CONV_CANDIDATES, interleaved
from cnncomp.dispatch.candidates import count_nonzero
from cnncomp.nn.dense import DEPTHWISE_KERNEL
from cnncomp.progress import track

#: An image of more bytes is in the third-level cache; half of a second-level one.
IN_L2 = 512 << 10


@dataclass(frozen=True)
class Limits:
    """The least milliseconds that each resource takes for a layer."""

    multiply_adds: float
    l1_reads: float
    traffic: float

    @property
    def binds(self) -> str:
        """The resource that takes longest."""
        found = asdict(self)
        return max(found, key=lambda name: found[name]).replace("_", " ")

    @property
    def ms(self) -> float:
        """No layer takes less."""
        return max(self.multiply_adds, self.l1_reads, self.traffic)


@dataclass(frozen=True)
class Record:
    """One layer on one kernel: median milliseconds, non-zero multiply-adds, and limits. ``count``: layers of this shape."""

    network: str
    layer: str
    shape: str
    count: int
    kernel: str
    sparsity: float
    ms: float
    macs: int
    limits: Limits

    @property
    def share(self) -> float:
        """Of the limit, 1 for a layer that takes no longer."""
        return self.limits.ms / self.ms


def limits(shape: ConvShape, nonzero: int, core: Mapping[str, float], sparse: bool) -> Limits:
    """The limits of a float layer with ``nonzero`` weights on a core with these peaks (:func:`bench.peers.peaks.measure`)."""
    pixels = shape.macs // (shape.k * shape.geometry.reduction)
    macs = nonzero * pixels
    read, written = shape.c * shape.h * shape.w * 4, shape.k * pixels * 4
    level = "l2" if read + written <= IN_L2 else "l3"
    seconds = (
        macs / core["fma_fp32_gmacs"],
        macs * 4 / core["l1_gbs"] if sparse else 0.0,
        read / core[f"{level}_gbs"] + written / core[f"{level}_write_gbs"],
    )
    return Limits(*(s / 1e6 for s in seconds))


def measure(shape: ConvShape, zeros: float, core: Mapping[str, float], budget_s: float) -> Record:
    """Time a layer of this shape on our float kernel for it: dense layers are those that are not pruned in practice."""
    sparse = shape.groups == 1 and shape.c > 4 and zeros > 0
    layer, x = random_layer(shape, zeros if sparse else 0.0)
    kernel = "conv2d_sparse" if sparse else DEPTHWISE_KERNEL if shape.groups > 1 else "dense.direct"
    with torch.inference_mode():
        seconds = interleaved(
            calls(layer, x, [c for c in CONV_CANDIDATES if c.kernel == kernel]), min_rounds=9, budget_s=budget_s
        )
    nonzero = count_nonzero(layer)
    macs = nonzero * (shape.macs // (shape.k * shape.geometry.reduction))
    where = (shape.network, shape.name, str(shape.geometry), shape.count, kernel, zeros if sparse else 0.0)
    return Record(*where, seconds[kernel] * 1e3, macs, limits(shape, nonzero, core, sparse))


def table(records: list[Record]) -> Table:
    """A row per layer, and their sum as often as the network has them."""
    result = Table("network", "layer", "×", "kernel", "ms", "GMAC/s", "limit, ms", "binds", "share")
    for r in records:
        result.add_row(
            r.network, r.layer, str(r.count), r.kernel, f"{r.ms:.3f}", f"{r.macs / r.ms / 1e6:.1f}", f"{r.limits.ms:.3f}",
            r.limits.binds, f"{r.share:.0%}",
        )  # fmt: skip
    for network in dict.fromkeys(r.network for r in records):
        own = [r for r in records if r.network == network]
        ms, least = (sum(r.count * value(r) for r in own) for value in (lambda r: r.ms, lambda r: r.limits.ms))
        result.add_row(
            network, "all", str(sum(r.count for r in own)), "", f"{ms:.2f}", "", f"{least:.2f}", "", f"{least / ms:.0%}"
        )
    return result


def main(
    networks: Annotated[
        str, typer.Option(help=f"Some of {', '.join(NETWORKS)}, with commas.")
    ] = "resnet50,mobilenet_v2",
    zeros: Annotated[float, typer.Option(min=0, max=1, help="Fraction of zeros of layers that are pruned.")] = 0.9,
    quick: Annotated[bool, typer.Option(help="Few repetitions: shows that it works.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for limits.json.")] = Path("build/bench"),
) -> None:
    """Measure the core and the layers of float networks; print a table, and keep it in OUT/limits.json."""
    picked = chosen(networks, NETWORKS, "--networks")
    out.mkdir(parents=True, exist_ok=True)
    core = peaks.measure(out)
    if isinstance(core, str):
        raise typer.BadParameter(core)
    torch.set_num_threads(threads())
    shapes = [shape for network in picked for shape in conv_shapes(network)]
    with track("layers", len(shapes)) as advance:
        records = []
        for shape in shapes:
            records.append(measure(shape, zeros, core, 0.02 if quick else 0.3))
            advance(shape.name)
    (out / "limits.json").write_text(
        json.dumps({"machine": machine(), "peaks": core, "records": [asdict(r) for r in records]}, indent=1)
    )
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table(records))
    console.print(f"The core: {', '.join(peaks.texts(core))}")


if __name__ == "__main__":
    typer.run(main)
