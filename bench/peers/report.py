"""The race as a table per network, the bars that were set, a JSON file and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from bench.peers.bars import BARS, BATCH_TARGET, OURS, THREADS_TARGET, Medians
from bench.peers.race import Entry

matplotlib.use("Agg")

import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Record:
    """One engine with one model. ``gmac_per_s`` counts weights that are not zero; ``of_peak`` is that over what the core can
    multiply in this precision; ``cosine`` and ``error`` compare with the float model's output."""

    network: str
    variant: str
    engine: str
    version: str
    threads: int
    batch: int
    ms_median: float
    ms_min: float
    cpu: str
    calls: int
    gmac_per_s: float
    of_peak: float | None
    cosine: float
    error: float
    note: str


def record(entry: Entry, cpu: str, peaks: dict[str, float]) -> Record:
    """What an entry's times say."""
    worker, case = entry.worker, entry.worker.case
    median = statistics.median(entry.ms)
    rate = case.macs[1] * entry.batch / case.batch / median / 1e6
    kinds = ("vpmaddwd_gmacs", "vpdpbusd_gmacs") if case.int8 else ("fma_fp32_gmacs",)
    peak = max((peaks[kind] for kind in kinds if kind in peaks), default=None)
    ready = worker.ready
    return Record(
        case.network,
        case.variant,
        worker.engine.name,
        ready["version"],
        worker.threads,
        entry.batch,
        median,
        min(entry.ms),
        cpu,
        len(entry.ms),
        rate,
        None if peak is None else rate / peak / worker.threads,
        ready["cosine"],
        ready["error"],
        ready["note"],
    )


def medians(records: Sequence[Record], threads: int, batch: int) -> Medians:
    """Those of the main table."""
    return {(r.network, r.variant, r.engine): r.ms_median for r in records if (r.threads, r.batch) == (threads, batch)}


def network_table(records: Sequence[Record]) -> Table:
    """Engines by variants of one network: median ms, and per cent of the limit."""
    table = Table()
    table.add_column("ms (% of the core's limit)")
    variants = list(dict.fromkeys(r.variant for r in records))
    for variant in variants:
        table.add_column(variant, justify="right", no_wrap=True)
    best = {v: min(r.ms_median for r in records if r.variant == v) for v in variants}
    for engine in dict.fromkeys(r.engine for r in records):
        rows = {r.variant: r for r in records if r.engine == engine}
        cells = [_cell(rows[v], best[v]) if v in rows else "" for v in variants]
        table.add_row(f"{engine} {next(iter(rows.values())).version}", *cells)
    return table


def _cell(r: Record, best: float) -> str:
    share = "" if r.of_peak is None else f" ({r.of_peak:.0%})"
    text = f"{r.ms_median:.2f}{share}"
    return f"[bold]{text}[/bold]" if r.ms_median == best else text


def bars_table(found: Medians, avx512: bool) -> tuple[Table, list[dict[str, Any]]]:
    """Each bar of which both sides were measured: ratio, target, whether it is reached."""
    table, rows = Table("network", "cnncomp", "against", "ratio", "target", "reached"), []
    for bar in BARS:
        result = bar.ratio(found)
        if result is None:
            continue
        ratio, rival = result
        target = bar.target if avx512 or bar.avx2 is None else bar.avx2
        rows.append(
            {**asdict(bar), "target": target, "ratio": ratio, "measured_against": rival, "reached": ratio >= target}
        )
        against = f"{rival} {bar.rival_variant}"
        table.add_row(
            bar.network, bar.variant, against, f"{ratio:.2f}", f"{target:.2f}", "yes" if ratio >= target else "no"
        )
    return table, rows


def scaling_table(records: Sequence[Record], threads: int, batch: int) -> tuple[Table, list[dict[str, Any]]]:
    """cnncomp with more threads and at larger batches: the ratio to one thread, and of images/s to the best smaller batch."""
    table, rows = Table("network", "variant", "threads", "batch", "ms", "images/s", "ratio", "target", "reached"), []
    ours = [r for r in records if r.engine == OURS]
    for r in sorted(ours, key=lambda r: (r.network, r.variant, r.threads, r.batch)):
        same = [o for o in ours if (o.network, o.variant) == (r.network, r.variant)]
        if r.threads != threads:
            ratios = [o.ms_median / r.ms_median for o in same if (o.threads, o.batch) == (threads, r.batch)]
            ratio, target = (ratios or [None])[0], THREADS_TARGET if r.threads == 2 * threads else None
        else:
            smaller = [o.batch / o.ms_median for o in same if o.threads == threads and o.batch < r.batch]
            if not smaller and all(o.batch == r.batch for o in same if o.threads == threads):
                continue
            ratio, target = (r.batch / r.ms_median / max(smaller), BATCH_TARGET) if smaller else (None, None)
        reached = None if ratio is None or target is None else ratio >= target
        row = {"network": r.network, "variant": r.variant, "threads": r.threads, "batch": r.batch, "ms": r.ms_median}
        rows.append({**row, "ratio": ratio, "target": target, "reached": reached})
        numbers = ("" if ratio is None else f"{ratio:.2f}", "" if target is None else f"{target:.2f}")
        yes = {None: "", True: "yes", False: "no"}[reached]
        images = f"{1e3 * r.batch / r.ms_median:.1f}"
        table.add_row(r.network, r.variant, str(r.threads), str(r.batch), f"{r.ms_median:.2f}", images, *numbers, yes)
    return table, rows


def plot(records: Sequence[Record], title: str, out: Path) -> None:
    """One row of bars per network: median ms of each engine, grouped by variant."""
    networks = list(dict.fromkeys(r.network for r in records))
    engines = list(dict.fromkeys(r.engine for r in records))
    colours = {engine: f"C{i}" for i, engine in enumerate(engines)}
    figure, axes = plt.subplots(
        len(networks), 1, figsize=(11, 3.6 * len(networks)), squeeze=False, layout="constrained"
    )
    for ax, network in zip(axes[:, 0], networks, strict=True):
        variants = list(dict.fromkeys(r.variant for r in records if r.network == network))
        at, middles = 0.0, []
        for variant in variants:
            rows = [r for r in records if (r.network, r.variant) == (network, variant)]
            bars = ax.bar([at + i for i in range(len(rows))], [r.ms_median for r in rows], 0.9)
            for bar, r in zip(bars, rows, strict=True):
                bar.set_color(colours[r.engine])
            ax.bar_label(bars, [f"{r.ms_median:.1f}" for r in rows], fontsize=6)
            middles.append(at + (len(rows) - 1) / 2)
            at += len(rows) + 1
        ax.set_xticks(middles, variants, fontsize=8)
        ax.set_ylabel("ms")
        ax.set_title(network, fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[engine]) for engine in engines]
    axes[0, 0].legend(handles, engines, fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def write(out: Path, machine: dict[str, Any], peaks: dict[str, float], records: Sequence[Record], **more: Any) -> None:
    """The JSON file: ``machine``, ``peaks``, ``records``, and what else there is."""
    found = {"machine": machine, "peaks": peaks, "records": [asdict(r) for r in records], **more}
    out.write_text(json.dumps(found, indent=1))


def show(console: Console, title: str, table: Table) -> None:
    if table.row_count:
        console.print(f"\n[bold]{title}[/bold]", highlight=False)
        console.print(table)
