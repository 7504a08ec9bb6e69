"""What a search saw: points, their Pareto front, the best of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cnncomp.convert import ConvertedModel
from cnncomp.errors import ArgumentError, MissingPackageError
from cnncomp.search.space import Target
from cnncomp.search.table import LatencyTable


@dataclass(frozen=True)
class Point:
    """One configuration of the whole network.

    Args:
        latency: over the dense network's.
        seconds: median, or the table's sum where nothing was measured.
        quality: accuracy, or agreement with the dense network; 0 to 1.
        drop: the dense network's quality minus this one's.
        bytes: of all weights, in the form that :func:`cnncomp.save` writes.
        config: what is done to each layer, by name; the others stay dense.
        channels: fraction of channels taken out first.
    """

    latency: float
    seconds: float
    quality: float
    drop: float
    bytes: int
    config: dict[str, str] = field(default_factory=dict)
    channels: float = 0.0

    def __str__(self) -> str:
        time = f"{self.latency:.2f} of dense ({1e3 * self.seconds:.2f} ms)"
        return f"{time}, {100 * self.drop:.2f} points lost, {self.bytes / 1e6:.3f} MB"

    def meets(self, target: Target) -> bool:
        return self._fast(target) and self._good(target)

    def _fast(self, target: Target) -> bool:
        return target.latency is None or self.latency <= target.latency

    def _good(self, target: Target) -> bool:
        return target.accuracy_drop is None or self.drop <= target.accuracy_drop + 1e-9

    def rank(self, target: Target) -> tuple[Any, ...]:
        """Sort key, the best first: what meets the target; then what keeps the accuracy, the fastest; then the rest.

        Among points that meet it, a target for latency is satisfied by the one that loses least, one for accuracy alone by
        the fastest."""
        if self.meets(target):
            order = (self.drop, self.latency) if target.latency is not None else (self.latency, self.drop)
            return (0, *order, self.bytes)
        return (1 if self._good(target) else 2, self.latency, self.drop, self.bytes)


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in latency and drop, the slowest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.latency, p.drop, p.bytes)):
        if not front or point.drop < front[-1].drop:
            front.append(point)
    return front[::-1]


@dataclass
class SearchResult:
    """What :func:`cnncomp.compress` found for a target.

    Args:
        model: the best network, converted.
        best: its point.
        reached: whether it meets the target; ``message`` says it in words, with what was possible.
        points: all that were tried, in order; the first is the dense network.
        quality: what ``Point.quality`` is: "accuracy" or "agreement with the dense network".
        tables: the latency tables, by fraction of channels taken out, to be used again.
    """

    model: ConvertedModel
    best: Point
    reached: bool
    message: str
    target: Target
    points: list[Point]
    quality: str
    device: str
    measured: bool
    tables: dict[float, LatencyTable] = field(default_factory=dict)

    @property
    def front(self) -> list[Point]:
        """The Pareto front, the slowest first."""
        return pareto_front(self.points)

    def __str__(self) -> str:
        lines = [self.message, *(f"{'→' if p is self.best else ' '} {p}" for p in self.front)]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Points, front and message, without the model."""
        return json.dumps(
            {
                "target": asdict(self.target),
                "reached": self.reached,
                "message": self.message,
                "device": self.device,
                "measured": self.measured,
                "quality": self.quality,
                "best": asdict(self.best),
                "front": [asdict(p) for p in self.front],
                "points": [asdict(p) for p in self.points],
            },
            indent=1,
        )

    def plot(self, path: str | Path) -> None:
        """Draw all points, their front and the target into an image file.

        Raises:
            MissingPackageError: matplotlib is not installed.
            ArgumentError: a suffix that matplotlib doesn't write.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingPackageError("a picture needs matplotlib: pip install matplotlib") from None
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        front = self.front
        ax.plot([p.latency for p in front], [100 * p.quality for p in front], "-", color="tab:blue", label="front")
        ax.plot([p.latency for p in self.points], [100 * p.quality for p in self.points], "o", color="tab:gray", ms=4)
        ax.plot([self.best.latency], [100 * self.best.quality], "*", color="tab:red", ms=14, label="best")
        if self.target.latency is not None:
            ax.axvline(self.target.latency, ls=":", color="tab:green", label="target")
        if self.target.accuracy_drop is not None:
            least = self.points[0].quality - self.target.accuracy_drop
            ax.axhline(100 * least, ls=":", color="tab:green", label=None if self.target.latency else "target")
        how = "measured" if self.measured else "predicted"
        ax.set_xlabel(f"latency over dense, {how}")
        ax.set_ylabel(f"{self.quality}, %")
        ax.set_title(self.message, fontsize=8, wrap=True)
        ax.legend()
        try:
            figure.savefig(path, dpi=150)
        except ValueError as error:
            raise ArgumentError("path", str(path), "a name that ends in .png, .svg or .pdf") from error
