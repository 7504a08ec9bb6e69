"""The demonstration's times as a bar chart."""

from __future__ import annotations

from pathlib import Path

from cnncomp.demo.common import machine_line
from cnncomp.demo.runner import Outcome
from cnncomp.errors import ArgumentError, MissingPackageError


def plot(outcome: Outcome, path: Path) -> None:
    """Draw the latency of every model, one chart per table, into an image file (its suffix says which kind).

    Raises:
        MissingPackageError: matplotlib is not installed.
        ArgumentError: nothing was timed, or a suffix that matplotlib doesn't write.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("a picture needs matplotlib: pip install matplotlib") from None
    reports = [r for r in outcome.reports.values() if r.columns[0].key == "name" and r.rows]
    if not reports:
        raise ArgumentError("plot", "a run without times", "at least one part of the demonstration")
    rows = [len(r.rows) for r in reports]
    figure = Figure(figsize=(9, 1.2 * len(reports) + 0.42 * sum(rows)), layout="constrained")
    axes = figure.subplots(len(reports), 1, squeeze=False, gridspec_kw={"height_ratios": rows})[:, 0]
    for ax, report in zip(axes, reports, strict=True):
        names, ms = [row["name"] for row in report.rows], [row["ms"] for row in report.rows]
        colors = ["tab:blue" if name.startswith("cnncomp") else "tab:gray" for name in names]
        bars = ax.barh(names, ms, color=colors)
        labels = [f"{row['ms']:.2f} ms" + (f", {row['ratio']:.1f}×" if "ratio" in row else "") for row in report.rows]
        ax.bar_label(bars, labels, padding=3, fontsize=8)
        ax.invert_yaxis()
        ax.margins(x=0.2)
        ax.set_title(report.title, fontsize=10, loc="left")
        ax.set_xlabel("ms, less is better", fontsize=8)
    figure.suptitle(machine_line(), fontsize=8)
    FigureCanvasAgg(figure)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ArgumentError("plot", str(path), "a name that ends in .png, .svg or .pdf") from error
