"""From how many zeros on a sparse kernel is faster than the dense ones, layer by layer: ``python -m bench.crossover``.

Every distinct convolution of a network that is pruned in practice (no depthwise ones), with 0 to 99 % zeros, on every kernel
of dispatch's table, in turn, in one process. One thread, unless CNNCOMP_BENCH_THREADS says otherwise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.layers import NETWORKS, ConvShape, calls, conv_shapes, random_layer
from bench.options import chosen, threads
from cnncomp.demo.common import machine
from cnncomp.dispatch import CONV_CANDIDATES, interleaved
from cnncomp.nn.dense import DEPTHWISE_KERNEL
from cnncomp.progress import track

matplotlib.use("Agg")

import matplotlib.pyplot as plt

#: Fractions of zeros.
LEVELS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Pattern:
    """Which weights are zero, and in which precision the layer runs. ``kernels``: entries of dispatch's table that compete; the
    last one is the sparse one."""

    name: str
    run: int
    int8: bool
    kernels: tuple[str, ...]


_FLOAT = tuple(c.kernel for c in CONV_CANDIDATES if c.dense and "cpu" in c.devices and c.kernel != DEPTHWISE_KERNEL)
_INT8 = (*_FLOAT, "conv2d_int8")
PATTERNS = (
    Pattern("fp32, unstructured", 1, False, (*_FLOAT, "conv2d_sparse")),
    Pattern("int8, unstructured", 1, True, (*_INT8, "conv2d_scattered_int8")),
    Pattern("int8, 1x4", 4, True, (*_INT8, "conv2d_sparse_int8")),
)


@dataclass(frozen=True)
class Record:
    """One layer at one fraction of zeros: median milliseconds of each kernel, the fastest one, and how many times as fast as
    the best dense kernel the sparse one is. ``count``: layers of this shape in the network."""

    network: str
    layer: str
    shape: str
    count: int
    pattern: str
    sparsity: float
    ms: dict[str, float]
    winner: str
    ratio: float


def measure(shape: ConvShape, pattern: Pattern, zeros: float, budget_s: float) -> Record:
    """Time all kernels of the pattern on a random layer of this shape."""
    layer, x = random_layer(shape, zeros, pattern.int8, pattern.run)
    competing = [c for c in CONV_CANDIDATES if c.kernel in pattern.kernels and "cpu" in c.devices]
    with torch.inference_mode():
        seconds = interleaved(calls(layer, x, competing), min_rounds=5, budget_s=budget_s)
    ms = {name: s * 1e3 for name, s in seconds.items()}
    sparse = pattern.kernels[-1]
    dense = min(value for name, value in ms.items() if name != sparse)
    winner = min(ms, key=lambda name: ms[name])
    where = (shape.network, shape.name, str(shape.geometry), shape.count)
    return Record(*where, pattern.name, zeros, ms, winner, dense / ms[sparse])


def crossover(ratios: Sequence[tuple[float, float]]) -> float | None:
    """The fraction of zeros from which sparse is the faster: between the last level at which it is not and the next, by a
    straight line.

    Args:
        ratios: (fraction of zeros, speed over the best dense kernel's), ascending.

    Returns:
        None if it is not the faster at the highest level.
    """
    behind = [i for i, (_, ratio) in enumerate(ratios) if ratio < 1]
    if not behind:
        return ratios[0][0]
    if behind[-1] == len(ratios) - 1:
        return None
    (x0, y0), (x1, y1) = ratios[behind[-1]], ratios[behind[-1] + 1]
    return x0 + (1 - y0) / (y1 - y0) * (x1 - x0)


def _of(records: Sequence[Record], **values: Any) -> list[Record]:
    return [r for r in records if all(getattr(r, name) == value for name, value in values.items())]


def table(records: Sequence[Record]) -> Table:
    """A row per layer: the crossover of each pattern, and how many times as fast sparse is at 90 % zeros."""
    patterns = list(dict.fromkeys(r.pattern for r in records))
    result = Table("network", "layer", "shape")
    for pattern in patterns:
        result.add_column(f"{pattern}: sparse from", justify="right")
        result.add_column("at 90 %", justify="right")
    for network, layer in dict.fromkeys((r.network, r.layer) for r in records):
        rows = _of(records, network=network, layer=layer)
        cells = []
        for pattern in patterns:
            own = _of(rows, pattern=pattern)
            at = crossover([(r.sparsity, r.ratio) for r in own])
            cells += [
                "never" if at is None else f"{at:.0%}",
                next((f"{r.ratio:.2f}×" for r in own if r.sparsity == 0.9), ""),
            ]
        result.add_row(network, layer, rows[0].shape, *cells)
    return result


def plot(records: Sequence[Record], title: str, out: Path) -> None:
    """A picture per network and pattern: layers down, zeros across, blue where sparse is faster, with the ratio."""
    networks, patterns = (list(dict.fromkeys(getattr(r, name) for r in records)) for name in ("network", "pattern"))
    layers = {n: list(dict.fromkeys(r.layer for r in _of(records, network=n))) for n in networks}
    levels = sorted({r.sparsity for r in records})
    figure, axes = plt.subplots(
        len(networks), len(patterns), squeeze=False, layout="constrained",
        figsize=(2 + (1 + 0.36 * len(levels)) * len(patterns), 1.2 + sum(0.6 + 0.24 * len(names) for names in layers.values())),
        height_ratios=[len(names) + 2 for names in layers.values()],
    )  # fmt: skip
    for i, network in enumerate(networks):
        for j, pattern in enumerate(patterns):
            ax, rows = (
                axes[i][j],
                {(r.layer, r.sparsity): r.ratio for r in _of(records, network=network, pattern=pattern)},
            )
            grid = torch.tensor([[rows.get((layer, z), float("nan")) for z in levels] for layer in layers[network]])
            image = ax.imshow(grid.log2(), cmap="RdBu", vmin=-3, vmax=3, aspect="auto")
            for (y, layer), (x, z) in ((a, b) for a in enumerate(layers[network]) for b in enumerate(levels)):
                if (layer, z) in rows:
                    strong = abs(float(grid[y, x].log2())) > 2
                    ax.text(
                        x,
                        y,
                        f"{rows[layer, z]:.1f}",
                        ha="center",
                        va="center",
                        fontsize=5,
                        color="w" if strong else "k",
                    )
            ax.set_xticks(range(len(levels)), [f"{z:.0%}" for z in levels], rotation=60, fontsize=6)
            ax.set_yticks(range(len(layers[network])), layers[network] if j == 0 else [], fontsize=6)
            ax.set_title(f"{network}, {pattern}", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.5, ticks=range(-3, 4))
    bar.ax.set_yticklabels([f"{2.0**e:g}×" for e in range(-3, 4)], fontsize=7)
    figure.suptitle(f"Speed of the sparse kernel over the best dense one. {title}", fontsize=9)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def main(
    only: Annotated[str, typer.Option("--networks", help=f"Some of {', '.join(NETWORKS)}, with commas.")] = "",
    quick: Annotated[
        bool, typer.Option(help="The two smallest layers, few levels and rounds: shows that it works.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("build/bench"),
) -> None:
    """Time every layer at every level and print where sparse begins to win; records go to OUT/crossover.json, a picture to
    OUT/crossover.png."""
    picked = chosen(only, NETWORKS, "--networks")
    torch.set_num_threads(threads())
    shapes = [s for name in picked for s in conv_shapes(name) if not s.geometry.depthwise]
    if quick:
        shapes = sorted(shapes, key=lambda s: s.macs)[:2]
    levels = (0.0, 0.9, 0.99) if quick else LEVELS
    plan = [(s, p, z) for s in shapes for p in PATTERNS for z in levels]
    records = []
    with track("timing", len(plan)) as advance:
        for shape, pattern, zeros in plan:
            records.append(measure(shape, pattern, zeros, 0.01 if quick else 0.15))
            advance(shape.name)
    about = {**machine(), "threads": torch.get_num_threads()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "crossover.json").write_text(
        json.dumps({"machine": about, "records": [asdict(r) for r in records]}, indent=1)
    )
    title = f"{about['cpu']} ({about['isa']}), {about['threads']} thread(s), batch 1, medians"
    plot(records, title, out / "crossover.png")
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(f"[bold]{title}[/bold]", highlight=False)
    console.print(table(records))
    console.print(f"{out / 'crossover.json'}, {out / 'crossover.png'}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
