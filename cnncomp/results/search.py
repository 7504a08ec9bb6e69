"""Searches on the teacher of the Fashion-MNIST results. ``python -m cnncomp.results.search --help``."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer

from cnncomp import SearchResult, Target
from cnncomp.demo.common import machine_line, say
from cnncomp.errors import CnncompError
from cnncomp.results.fashion_mnist import CALIBRATION, TIMED_BATCH, Experiment
from cnncomp.results.idx import ImageSet, fashion_mnist
from cnncomp.results.networks import accuracy
from cnncomp.results.report import replace_section
from cnncomp.search.run import Settings, search
from cnncomp.search.space import Choice, Space
from cnncomp.search.table import LatencyTable
from cnncomp.training.batches import as_float

COMMAND = "python -m cnncomp.results.search --docs docs/results.md"
#: Without any training: what stays is what the weights bear.
TARGETS = (Target(latency=0.5), Target(accuracy_drop=0.005), Target(latency=0.2, accuracy_drop=0.01))


def labelled(images: ImageSet) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 250 images with their labels."""
    return list(zip(as_float(images.images).split(250), images.labels.long().split(250), strict=True))


def run(e: Experiment, targets: tuple[Target, ...]) -> list[tuple[SearchResult, float, float]]:
    """For each target what was found, its accuracy on the test images, and the seconds it took. Layers are timed once."""
    teacher = e.teacher.model
    data, held_out = labelled(e.data.train[:CALIBRATION]), labelled(e.data.held_out)
    tables: dict[float, LatencyTable] = {}
    out = []
    for target in targets:
        say(f"{target} ...")
        start = time.monotonic()
        space = Space((Choice(int8=True),)) if e.quick else Space()
        settings = Settings(target, space, quantization={"correct_bias": True})
        found = search(teacher, data, e.example(), settings, held_out, tables=tables)
        tables = found.tables
        out.append((found, accuracy(found.model, e.data.test), time.monotonic() - start))
        say(found.message)
    return out


def text(results: list[tuple[SearchResult, float, float]], dense: float, picture: str | None) -> str:
    """The section. ``dense``: the teacher's accuracy on the test images."""
    rows = [
        "| target | reached | latency, of dense | MB | held-out, points lost | test, points lost | layers | s |",
        "|---|---|---:|---:|---:|---:|---|---:|",
    ]
    for found, tested, seconds in results:
        best = found.best
        kinds = Counter(best.config.get(name, "dense") for name in found.model.plan.layers)
        layers = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items(), key=lambda kv: -kv[1]))
        cells = [
            str(found.target),
            "yes" if found.reached else "no",
            f"{best.latency:.2f}",
            f"{best.bytes / 1e6:.2f}",
            f"{100 * best.drop:.2f}",
            f"{100 * (dense - tested):.2f}",
            layers,
            f"{seconds:.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    parts = [
        "## Search to a target",
        f"Command: `{COMMAND}`. {machine_line()}.",
        "\n".join(rows),
        f"The teacher of the table above, {dense:.2%} on the test images, compressed to a target without any training: "
        f"sparsity and precision per layer from times and sensitivities measured on {CALIBRATION:,} training images, whole "
        "networks scored on 5,000 held-out images, and only the result on the test images. Latency: "
        f"{TIMED_BATCH} images a call, over the teacher converted without compression. The first search times the layers, the "
        "others use its table.",
    ]
    return "\n\n".join(parts if picture is None else [*parts, f"![all networks that the last search tried]({picture})"])


def main(
    out: Annotated[Path, typer.Option(help="Folder of cnncomp.results.fashion_mnist.")] = Path("build/fashion"),
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the IDX files.")] = None,
    docs: Annotated[Path | None, typer.Option(metavar="FILE", help="Markdown file to write the table into.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 1,
    quick: Annotated[bool, typer.Option(help="One epoch for the teacher, one target: shows that it runs.")] = False,
) -> None:
    """Search, and write the table and a picture of the last front beside it."""
    torch.set_num_threads(threads)
    try:
        out.mkdir(parents=True, exist_ok=True)
        e = Experiment(fashion_mnist(data, 100 if quick else 5000), out, quick)
        results = run(e, TARGETS[:1] if quick else TARGETS)
        picture = None
        if docs is not None:
            picture = f"{docs.stem}-search.png"
            results[-1][0].plot(docs.with_name(picture))
        section = text(results, accuracy(e.teacher.model, e.data.test), picture)
        typer.echo(section)
        if docs is not None:
            replace_section(docs, "search", section)
    except CnncompError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
