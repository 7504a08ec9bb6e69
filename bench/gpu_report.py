"""Tables of the model's records, of bench/gpu_model.py; ``python -m bench.gpu_report`` makes them again from the file."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.gpu_hardware import GPUS
from bench.gpu_model import LABEL, OUT
from bench.layers import GPU_NETWORKS


def report(rows: list[dict[str, Any]]) -> str:
    """A table: time per network, batch and GPU of the package's kernels, and how often each resource binds."""
    lines = [f"{'network':14} {'batch':>5} {'GPU':10} {'ms':>8} {'of int8 peak':>12}  bound by  ({LABEL})"]
    ours = [r for r in rows if r["peer"] is None and r["pattern"] == "dense"]
    for network, batch, name in sorted({(r["network"], r["batch"], r["gpu"]) for r in ours}):
        mine = [r for r in ours if (r["network"], r["batch"], r["gpu"]) == (network, batch, name)]
        gpu = next(g for g in GPUS if g.name == name)
        seconds = sum(r["us"] * r["count"] for r in mine) * 1e-6
        useful = sum(2 * r["macs"] * r["count"] for r in mine)
        binding: dict[str, int] = {}
        for r in mine:
            binding[r["bound"]] = binding.get(r["bound"], 0) + 1
        share = useful / seconds / gpu.int8_peak
        lines.append(f"{network:14} {batch:5d} {name:10} {seconds * 1e3:8.3f} {share:11.1%}   {binding}")
    return "\n".join(lines)


PICTURE = "gpu_model.png"  # beside the document

#: By network, GPU, batch and peer ("cutlass int8 dense"): layer to how many times as fast as the peer the package's kernel is,
#: with each of VARIATIONS.
Ratios = dict[tuple[str, str, int, str], dict[str, list[float]]]


def ratios(rows: list[dict[str, Any]], passes: bool = False, pattern: str = "dense") -> Ratios:
    """The peers' times over those of the package's int8 kernels of a pattern, layer by layer.

    Args:
        rows: Records.
        passes: Add the pass for what a peer's kernel can't fuse.
        pattern: Of the package's weights; layers that its kernels of this pattern can't run are left out.
    """
    place = lambda r: (r["network"], r["gpu"], r["batch"], r["layer"])  # noqa: E731
    own = [r for r in rows if r["peer"] is None and (r["dtype"], r["pattern"]) == ("int8", pattern)]
    ours = {place(r): r["us_varied"] for r in own}
    found: Ratios = {}
    for r in rows:
        if r["peer"] and place(r) in ours:
            mine = ours[place(r)]
            key = (r["network"], r["gpu"], r["batch"], f"{r['peer']} {r['dtype']} {r['pattern']}")
            found.setdefault(key, {})[r["layer"]] = [
                (theirs + passes * r["pass_us"]) / us for theirs, us in zip(r["us_varied"], mine, strict=True)
            ]
    return found


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    logarithms = [math.log(v) for v in values]
    return math.exp(sum(logarithms) / len(logarithms))


def compare(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown of geometric means over the distinct layers that a peer has a kernel for.

    The range is over the constants' uncertainty; worst layer and the column with the pass that the peer can't fuse are with the
    frozen constants.
    """
    titles = (
        "network",
        "GPU",
        "batch",
        "peer",
        "layers",
        f"times as fast, {LABEL}",
        "range",
        "worst layer",
        "with its pass",
    )
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    passes = ratios(rows, passes=True)
    for key, values in sorted(ratios(rows).items()):
        means = [geometric_mean(column) for column in zip(*values.values(), strict=True)]
        worst = min(v[0] for v in values.values())
        whole = geometric_mean(v[0] for v in passes[key].values())
        numbers = f"{means[0]:.2f} | {min(means):.2f}..{max(means):.2f} | {worst:.2f} | "
        numbers += f"{whole:.2f}" if whole != means[0] else ""
        lines.append(f"| {' | '.join(map(str, key))} | {len(values)} | {numbers} |")
    return "\n".join(lines)


#: Columns of the overview: peer as in Ratios, whether with its pass, the package's pattern, title.
COLUMNS = (
    ("cutlass int8 dense", False, "dense", "CUTLASS int8"),
    ("cutlass int8 dense", True, "dense", "and its pass"),
    ("cutlass fp16 dense", False, "dense", "CUTLASS fp16"),
    ("inductor fp16 dense", False, "dense", "inductor fp16"),
    ("inductor int8 dense", False, "dense", "inductor int8"),
    ("triton int8 dense", False, "dense", "plain Triton int8"),
    ("cutlass int8 2:4", False, "dense", "CUTLASS 2:4 int8"),
    ("cutlass int8 2:4", False, "2:4", "both 2:4"),
)


#: By network, GPU and batch: title of the column to the geometric mean over the layers that the peer has a kernel for.
Means = dict[tuple[str, str, int], dict[str, float]]


def averages(rows: list[dict[str, Any]], gpus: Iterable[str] = ()) -> Means:
    """The overview's numbers; of all GPUs by default, in their order."""
    wanted = tuple(gpus) or tuple(gpu.name for gpu in GPUS)
    found: Means = {}
    for peer, passes, pattern, title in COLUMNS:
        for (*place, name), layers in ratios(rows, passes, pattern).items():
            if name == peer and place[1] in wanted:
                found.setdefault((place[0], place[1], place[2]), {})[title] = geometric_mean(
                    v[0] for v in layers.values()
                )
    return dict(sorted(found.items(), key=lambda item: (item[0][0], wanted.index(item[0][1]), item[0][2])))


def lacking(rows: list[dict[str, Any]], place: tuple[str, str, int], title: str) -> str:
    """Why a place (network, GPU, batch) has no number in a column: "no kernel" of the peer, or it was "not counted"."""
    kernels, _, pattern, _ = next(column for column in COLUMNS if column[3] == title)
    peer, dtype, its_pattern = kernels.split()
    turing = next(gpu.arch for gpu in GPUS if gpu.name == place[1]) == "sm_75"
    if turing and (peer != "cutlass" or its_pattern != "dense"):
        return "no kernel"
    here = [r for r in rows if (r["network"], r["gpu"], r["batch"]) == place]
    theirs = any((r["peer"], r["dtype"]) == (peer, dtype) for r in here)
    own = any((r["peer"], r["pattern"]) == (None, pattern) for r in here)
    return "no kernel" if theirs and own else "not counted"


def overview(rows: list[dict[str, Any]], gpus: Iterable[str] = ()) -> str:
    """Geometric means over layers as a table in Markdown: a line for each network, GPU (all by default) and batch.

    Columns that no layer has a value for are left out; a cell without one says why.
    """
    means = averages(rows, gpus)
    titles = [title for *_, title in COLUMNS if any(title in found for found in means.values())]
    lines = ["| network | GPU | batch | " + " | ".join(titles) + " |", "|---|---|---:|" + "---:|" * len(titles)]
    for place, found in means.items():
        cells = [f"{found[title]:.2f}" if title in found else lacking(rows, place, title) for title in titles]
        lines.append("| " + " | ".join([*map(str, place), *cells]) + " |")
    return "\n".join(lines)


def document(rows: list[dict[str, Any]]) -> str:
    """The section of docs/results.md."""
    shown = ("A100", "H100")
    others = tuple(gpu.name for gpu in GPUS if gpu.name not in shown)
    table = overview(rows, others)
    some = table.count("\n") > 1
    elsewhere = f"<details><summary>Other GPUs</summary>\n\n{table}\n\n</details>\n\n" if some else ""
    lacking = [name for name in GPU_NETWORKS if all(row["network"] != name for row in rows)]
    lacking += [gpu.name for gpu in GPUS if all(row["gpu"] != gpu.name for row in rows)]
    scope = f"Not counted for this table: {', '.join(lacking)}.\n\n" if lacking else ""
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "triton", "nvidia-cutlass"))
    return f"""## GPU kernels beside others ({LABEL})

How many times as fast the package's int8 CUDA kernels are as the best of each peer's tiles, by the model: geometric means over
the distinct convolution and linear layers that the peer has a kernel for. u8 in and out, scale and bias per channel, ReLU.

{overview(rows, shown)}

![the same of all GPUs]({PICTURE})

"And its pass": CUTLASS fuses one scale, not one per channel; the pass that scales each channel reads 32-bit sums and writes
bytes. On H100 CUTLASS dense is the faster of its sm_80 kernel, as counted, and of a bound: 75 % of the wgmma peak, with no
tile, wave or multiprocessor wasted, which no kernel reaches on small batches. CUTLASS 2:4 multiplies half as much, in layers
that are matrix products; the package's kernel beside it is the dense one, except in a column "both 2:4". Neither CUTLASS nor
Triton has int8 for depthwise layers, and inductor has int8 for products alone. "No kernel": the peer has none
that the emulator runs. "Not counted": it may have, but the table was made without it (`--without`; inductor takes long).

{elsewhere}{scope}Command: `python -m bench.gpu_model --docs docs/results.md`, or `make bench-gpu-model`. {versions}.
Records, with ranges over the uncertainty of the model's constants, are in `build/bench/gpu_model.json`; what the model is
worth, and how long it takes, is in docs/design.md."""


def write(rows: list[dict[str, Any]], docs: Path | None) -> None:
    """Print the tables, draw the picture beside the records, and put the section into ``docs`` if it is given."""
    from cnncomp.results.report import replace_section

    print(report(rows), compare(rows), overview(rows), sep="\n\n")
    print(f"{OUT}: {len(rows)} records")
    if any(row["peer"] for row in rows):
        from bench.plot import plot_gpu, plot_gpu_means

        print(plot_gpu(ratios(rows), OUT.with_suffix(".png")))
        if docs:
            replace_section(docs, "gpu-model", document(rows))
            print(plot_gpu_means(averages(rows), docs.parent / PICTURE))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--docs", type=Path, help="a Markdown file to put the tables into")
    write(json.loads(OUT.read_text()), parser.parse_args().docs)


if __name__ == "__main__":
    main()
