"""Results of the benches as a picture: ``python bench/plot.py build/bench/kernels.json [-o kernels.png]``.

One row of bars per bench and network: how many times as fast as torch's best, layer by layer.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

FASTER, SLOWER = "tab:blue", "tab:red"


def read_results(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The extra_info of each bench by title, in the order of the file.

    Raises:
        ValueError: a file without results of these benches.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in json.loads(path.read_text())["benchmarks"]:
        info = entry["extra_info"]
        if "ratio" in info:
            title = "whole networks" if info["kernel"] == "cnncomp" else f"{info['network']}, {info['kernel']}"
            groups[title].append(info)
    if not groups:
        raise ValueError(f"{path} holds no results of cnncomp's benches")
    return groups


def plot(path: Path, out: Path) -> None:
    """Draw the results in the JSON file ``path`` into the PNG file ``out``."""
    groups = read_results(path)
    widest = max(len(rows) for rows in groups.values())
    size = (max(6.0, 0.35 * widest + 2), 3.2 * len(groups))
    figure, axes = plt.subplots(len(groups), 1, figsize=size, squeeze=False, layout="constrained")
    for ax, (title, rows) in zip(axes[:, 0], groups.items(), strict=True):
        ratios = [row["ratio"] for row in rows]
        bars = ax.bar(range(len(rows)), ratios, color=[FASTER if r >= 1 else SLOWER for r in ratios])
        ax.bar_label(bars, [f"{r:.1f}" for r in ratios], fontsize=6)
        ax.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        ax.set_xticks(range(len(rows)), [row["layer"] for row in rows], rotation=60, ha="right", fontsize=6)
        ax.set_title(title, fontsize=9)
        ax.set_ylabel("× torch's best", fontsize=8)
    first = next(iter(groups.values()))[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    figure.suptitle(f"{first['cpu']} ({first['isa']}), {first['threads']} thread(s), {versions}", fontsize=9)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def plot_gpu(ratios: dict[tuple[str, str, int, str], dict[str, list[float]]], out: Path) -> Path:
    """Draw the modelled times of a peer over this project's, a point per layer, a row per network and peer.

    Args:
        ratios: By network, GPU, batch and peer: layer to ratios, of which the first counts.
        out: The PNG file, which is returned.
    """
    rows = sorted({(network, peer) for network, _, _, peer in ratios})
    columns = sorted({(gpu, batch) for _, gpu, batch, _ in ratios})
    size = (max(6.0, 0.6 * len(columns)), 2.6 * len(rows))
    figure, axes = plt.subplots(len(rows), 1, figsize=size, squeeze=False, layout="constrained")
    for ax, (network, peer) in zip(axes[:, 0], rows, strict=True):
        for place, (gpu, batch) in enumerate(columns):
            values = [v[0] for v in ratios.get((network, gpu, batch, peer), {}).values()]
            ax.scatter([place] * len(values), values, s=8, c=[FASTER if v >= 1 else SLOWER for v in values])
        ax.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        ax.set_yscale("log")
        ax.set_xticks(
            range(len(columns)), [f"{gpu}, {batch}" for gpu, batch in columns], rotation=60, ha="right", fontsize=6
        )
        ax.set_title(f"{network} against {peer}", fontsize=9)
        ax.set_ylabel("times as fast", fontsize=8)
    figure.suptitle("modelled, not measured: a point per layer; GPU and batch below", fontsize=9)
    figure.savefig(out, dpi=150)
    plt.close(figure)
    return out


def plot_gpu_means(means: dict[tuple[str, str, int], dict[str, float]], out: Path) -> Path:
    """Draw geometric means over layers, a row per network, a line per peer.

    Args:
        means: By network, GPU and batch: title of the peer to how many times as fast this project's kernels are.
        out: The picture, which is returned.
    """
    networks = sorted({network for network, *_ in means})
    columns = list(dict.fromkeys((gpu, batch) for _, gpu, batch in means))
    titles = list(dict.fromkeys(title for found in means.values() for title in found))
    figure, axes = plt.subplots(
        len(networks), 1, figsize=(8, 2.4 * len(networks)), squeeze=False, sharex=True, layout="constrained"
    )
    for ax, network in zip(axes[:, 0], networks, strict=True):
        for title in titles:
            values = [means.get((network, *column), {}).get(title, float("nan")) for column in columns]
            ax.plot(range(len(columns)), values, marker=".", linewidth=0.8, label=title)
        ax.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        ax.set_yscale("log")
        ax.set_ylabel("times as fast", fontsize=8)
        ax.set_title(network, fontsize=9)
        ax.set_xticks(range(len(columns)), [f"{g}, {b}" for g, b in columns], rotation=60, ha="right", fontsize=7)
    axes[0, 0].legend(fontsize=6, ncols=4)
    figure.suptitle("modelled, not measured: geometric means over layers; GPU and batch below", fontsize=9)
    figure.savefig(out, dpi=80)
    plt.close(figure)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("-o", "--out", type=Path, help="the picture; by default beside the JSON, with the suffix .png")
    args = parser.parse_args()
    out = args.out or args.json.with_suffix(".png")
    plot(args.json, out)
    print(out)


if __name__ == "__main__":
    main()
