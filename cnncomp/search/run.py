"""The search: tables of time and of loss per layer, a ladder of configurations, and bisection on the whole network.

1. **Time.** Every layer's kernels are timed with every choice, on this device (:class:`LatencyTable`).
2. **Loss.** One layer at a time is compressed with each choice, and the divergence of the outputs from the dense ones noted.
3. **Ladder.** Both are added up over layers; Lagrange's multiplier orders all useful configurations (:func:`ladder`).
4. **Whole networks.** The sums only rank. Rungs are built, converted, timed against the dense network in turn, and scored:
   by bisection the first rung that is fast enough, or the last that is good enough; then some more along the ladder, for the
   Pareto front.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp.convert import Conversion, ConvertedModel, as_inputs, convert
from cnncomp.dispatch import device_key, interleaved
from cnncomp.dispatch.network import NetworkPlanner
from cnncomp.errors import ArgumentError
from cnncomp.graph import trace
from cnncomp.progress import track
from cnncomp.search.ladder import ladder
from cnncomp.search.quality import Judge
from cnncomp.search.result import Point, SearchResult
from cnncomp.search.space import DENSE, Choice, Config, Space, Target
from cnncomp.search.table import Kernels, LatencyTable
from cnncomp.search.variants import Variants, swapped, weight_bytes
from cnncomp.structured import prune_channels

#: Rungs that are looked at for the front, besides those of the bisection.
EXTRA_RUNGS = 6


@dataclass(frozen=True)
class Settings:
    """How to search; see :func:`search`."""

    target: Target
    space: Space = field(default_factory=Space)
    finetune: Callable[[nn.Module], object] | None = None
    quantization: Mapping[str, Any] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    float_dtype: torch.dtype = torch.float32
    progress: bool = True


def search(
    model: nn.Module,
    data: Any,
    example_inputs: Any,
    settings: Settings,
    held_out: Any = None,
    tables: Mapping[float, LatencyTable] | None = None,
    measure: bool = True,
) -> SearchResult:
    """Find per-layer sparsity, pattern and precision for a target. ``model`` stays as it is. See the module's docstring.

    Args:
        model: a float classifier: (N, classes) outputs.
        data: batches to calibrate with and to measure sensitivity on; kept in memory. With labels, quality is accuracy; else
            agreement with the dense network.
        example_inputs: as in :func:`cnncomp.convert`.
        held_out: batches to score whole networks on; by default ``data``.
        tables: latency tables to use in place of measuring, by fraction of channels taken out.
        measure: False takes the tables' sums for the latency of whole networks: then the same tables give the same result.

    Raises:
        ArgumentError: outputs of another form, no layer to search, ``measure=False`` without tables.
        CalibrationError: no batch, or one that can't be used.
    """
    inputs = as_inputs(example_inputs, model)
    missing = [c for c in {0.0, *settings.space.channels} if c not in (tables or {})]
    if not measure and missing:
        raise ArgumentError(
            "tables", f"none for {missing} of the channels taken out", "one for each, with measure=False"
        )
    model = copy.deepcopy(model).eval()
    judge = Judge(model, data)
    jury = judge if held_out is None else Judge(model, held_out)
    run = _Run(model, inputs, settings, judge, jury, dict(tables or {}), measure)
    run.start()
    for channels in settings.space.channels:
        run.explore(channels)
    return run.result()


class _Run:
    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...],
        settings: Settings,
        judge: Judge,
        jury: Judge,
        tables: dict[float, LatencyTable],
        measure: bool,
    ) -> None:
        self.model, self.inputs, self.settings = model, inputs, settings
        self.judge, self.jury, self.tables, self.measured = judge, jury, tables, measure
        self.device = next(x.device for x in inputs if isinstance(x, Tensor))
        self.points: list[Point] = []
        self.best: tuple[Point, nn.Module] | None = None
        self.dense: nn.Module = model
        self.dense_kernels: dict[str, Kernels] = {}
        self.dense_quality = jury.quality(model)

    def start(self) -> None:
        """Convert the dense network, the first point, which the others are compared with."""
        seconds = 0.0
        if self.measured:
            planner = self._planner(self.model)
            with track("measuring dense kernels", planner.num_layers, show=self.settings.progress) as advance:
                self.dense_kernels = planner.time(advance)
            self.dense = self._settled(planner)
            seconds = self._seconds({"dense": self.dense})["dense"]
        else:
            seconds = self.tables[0.0].predict({})
        self._note(Point(1.0, seconds, self.dense_quality, 0.0, weight_bytes(self.model, {})), self.dense)

    # Tables

    def explore(self, channels: float) -> None:
        """One ladder: of the network itself, or of what is left without a fraction of its channels."""
        settings, space = self.settings, self.settings.space
        base = self.model
        if channels:
            base = copy.deepcopy(base)
            prune_channels(base, channels, self.inputs, round_to=space.round_to, exclude=settings.exclude)
            if settings.finetune is not None:
                settings.finetune(base)
                base.eval()
        variants = Variants(base, self.judge.batches, settings.quantization, settings.exclude)
        choices = [c for c in dict.fromkeys(space.choices) if c != DENSE]
        steps = (len(choices) + 1 if channels not in self.tables else 0) + len(variants.names) * len(choices)
        with track("measuring layers", steps, show=settings.progress) as advance:
            networks = {c: variants.uniform(c) for c in choices}
            if channels not in self.tables:
                self.tables[channels] = self._time(base, networks, advance)
            losses = self._losses(base, variants.names, networks, advance)
        table = self.tables[channels]
        names = [name for name in variants.names if name in table.kernels]
        self._climb(ladder(names, choices, table.seconds, losses), variants, channels, table)

    def _time(
        self, base: nn.Module, networks: Mapping[Choice, nn.Module], advance: Callable[[str], None]
    ) -> LatencyTable:
        """Time all kernels of all layers with every choice."""
        table = LatencyTable(device=device_key(self.device))
        dense = self.dense
        for choice, network in {DENSE: base, **networks}.items():
            if network is self.model:
                found = self.dense_kernels
            else:
                planner = self._planner(network)
                found = planner.time(lambda label: None)
                dense = self._settled(planner) if choice == DENSE else dense
            for layer, kernels in found.items():
                table.kernels.setdefault(layer, {})[str(choice)] = kernels
            advance(f"{choice}: kernels")
        seconds = self._seconds({"dense": dense})["dense"]
        table.rest = max(0.0, seconds - sum(table.seconds(layer) for layer in table.kernels))
        return table

    def _losses(
        self,
        base: nn.Module,
        names: Sequence[str],
        networks: Mapping[Choice, nn.Module],
        advance: Callable[[str], None],
    ) -> dict[tuple[str, Choice], float]:
        """The divergence that each choice in each single layer causes, above what is there without."""
        work = copy.deepcopy(base)
        start = self.judge.loss(work)
        losses: dict[tuple[str, Choice], float] = {}
        for name in names:
            for choice, network in networks.items():
                with swapped(work, name, network.get_submodule(name)):
                    loss = self.judge.loss(work) - start
                if loss < float("inf"):
                    losses[name, choice] = loss
                advance(f"{name}: {choice}")
        return losses

    # Whole networks

    def _climb(self, rungs: list[Config], variants: Variants, channels: float, table: LatencyTable) -> None:
        """Bisect for the target's two ends, then look at rungs in between."""
        target = self.settings.target
        seen: dict[int, Point] = {} if channels else {0: self.points[0]}

        def point(i: int) -> Point:
            if i not in seen:
                seen[i] = self._evaluate(rungs[i], variants, channels, table)
                advance(str(seen[i]))
            return seen[i]

        def first(holds: Callable[[Point], bool]) -> int:
            """The first rung from which on ``holds`` is true, as if it were never false again; the last where it is never."""
            low, high = 0, len(rungs) - 1
            if holds(point(0)):
                return 0
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if holds(point(middle)) else (middle, high)
            point(high)
            return high

        total = EXTRA_RUNGS + 2 * len(rungs).bit_length()
        with track("measuring networks", total, show=self.settings.progress) as advance:
            if target.latency is not None:
                limit = target.latency
                first(lambda p: p.latency <= limit)
            reached = target.latency is not None and any(p.meets(target) for p in seen.values())
            if target.accuracy_drop is not None and not reached:
                allowed = target.accuracy_drop
                first(lambda p: p.drop > allowed + 1e-9)
            for k in range(EXTRA_RUNGS):
                point(round(k * (len(rungs) - 1) / (EXTRA_RUNGS - 1)))

    def _evaluate(self, config: Config, variants: Variants, channels: float, table: LatencyTable) -> Point:
        """Build, convert, time and score one configuration."""
        network = variants.build(config, self.settings.finetune)
        ran: nn.Module = network
        if self.measured:
            ran = self._settled(self._planner(network), table.times(config))
            times = self._seconds({"dense": self.dense, "new": ran})
            seconds, dense = times["new"], times["dense"]
        else:
            seconds, dense = table.predict(config), self.points[0].seconds
        quality = self.jury.quality(ran)
        text = {layer: str(choice) for layer, choice in config.items()}
        size = weight_bytes(variants.model, config)
        return self._note(
            Point(seconds / dense, seconds, quality, self.dense_quality - quality, size, text, channels), ran
        )

    def _note(self, point: Point, network: nn.Module) -> Point:
        """Keep the point, and the network if it is the best so far."""
        self.points.append(point)
        if self.best is None or point.rank(self.settings.target) < self.best[0].rank(self.settings.target):
            self.best = point, network
        return point

    def _planner(self, network: nn.Module) -> NetworkPlanner:
        return NetworkPlanner(trace(network, self.inputs), self.inputs, self.device, self.settings.float_dtype)

    def _settled(self, planner: NetworkPlanner, times: Mapping[str, Kernels] | None = None) -> ConvertedModel:
        """The network converted by times that are known, without measuring kernels again."""
        plan = planner.settle() if times is None else planner.settle_by(times)
        shapes = [(list(x.shape), str(x.dtype).removeprefix("torch.")) for x in self.inputs if isinstance(x, Tensor)]
        return ConvertedModel(planner.module, Conversion(plan, planner.kept, shapes)).eval()

    def _seconds(self, networks: Mapping[str, nn.Module]) -> dict[str, float]:
        fns = {name: (lambda m=m: m(*self.inputs)) for name, m in networks.items()}
        with torch.inference_mode():
            return interleaved(fns, min_rounds=9, budget_s=1.0, cuda=self.device.type == "cuda")

    def result(self) -> SearchResult:
        assert self.best is not None
        best, network = self.best
        if not isinstance(network, ConvertedModel):
            dtype = self.settings.float_dtype
            network = convert(network, self.inputs, measure=False, float_dtype=dtype, progress=False)
        target = self.settings.target
        return SearchResult(
            network, best, best.meets(target), message(target, best, self.points), target, self.points,
            self.jury.what, device_key(self.device), self.measured, self.tables,
        )  # fmt: skip


def message(target: Target, best: Point, points: Sequence[Point]) -> str:
    """One line: whether the target was reached, and if not, what was possible."""
    if best.meets(target):
        return f"reached ({target}): {best}"
    fastest = min(points, key=lambda p: (p.latency, p.drop))
    parts = [f"not reached ({target}): the best seen is {best}"]
    if target.latency is not None and fastest.latency > target.latency:
        parts.append(f"the fastest seen takes {fastest.latency:.2f} of dense and loses {100 * fastest.drop:.2f} points")
    elif target.accuracy_drop is not None:
        fast = min((p for p in points if target.latency is None or p.latency <= target.latency), key=lambda p: p.drop)
        parts.append(f"the least lost at {fast.latency:.2f} of dense is {100 * fast.drop:.2f} points")
    return "; ".join(parts)
