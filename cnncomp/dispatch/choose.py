"""Choosing a kernel for every layer of a graph: the least total time, conversions between layers included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx

from cnncomp.dispatch import modelled
from cnncomp.dispatch.candidates import HALVES, NCHW, NHWC, Q8, Option, heuristic, options_for
from cnncomp.dispatch.timing import interleaved
from cnncomp.graph.chain import half_outputs, output_specs, passes_8bit, source
from cnncomp.graph.nodes import input_node, module_at
from cnncomp.nn import ConvertedLayer, DenseConv2d, DenseLinear, QuantConv2d, QuantLinear, QuantSpec
from cnncomp.nn.base import JOINED_KERNEL
from cnncomp.recordings import kernels_of

#: A compressed kernel has to take at most this much of the best dense one's time. What is closer turns with the noise and with
#: what ran before in the caches, and dense is the safer choice.
MARGIN = 0.9

#: The same, with the conversions of the layer's inputs counted.
WITH_CONVERSIONS = 0.97
#: A kernel that costs less in a network than alone is tried if alone it takes up to this much of the best one's time: the
#: network decides, which has to be faster by WITH_CONVERSIONS for compressed ones.
NEAR = 1.15
#: The same for two layers that run in one: what lies between them is then not written, up to a half of their time.
NEAR_IN_PAIRS = 1.5
#: Where dense and compressed are closer than this, they are timed again, longer.
CLOSE = 0.75

Assignment = dict[fx.Node, Option]


def _seconds(option: Option) -> float:
    return option.seconds


def half_nodes(gm: fx.GraphModule, assignment: Assignment) -> set[fx.Node]:
    """The layers that hand over half precision under an assignment."""

    def takes(node: fx.Node) -> torch.dtype | None:
        if (option := assignment.get(node)) is None:
            return None
        spec = option.layer.info.input if option.candidate.takes == Q8 else None
        return spec.dtype if spec else option.candidate.half

    return half_outputs(gm, takes) if any(o.candidate.half for o in assignment.values()) else set()


def layer_nodes(gm: fx.GraphModule) -> dict[fx.Node, ConvertedLayer]:
    """The fused layers of a graph, in order."""
    found: dict[fx.Node, ConvertedLayer] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = module_at(gm, node)
            if isinstance(module, ConvertedLayer):
                found[node] = module
    return found


def to_format(x: Tensor, fmt: str, spec: QuantSpec | None) -> Tensor:
    """``x`` (float) in an activation format; 8 bit as ``spec`` says."""
    if fmt == Q8:
        assert spec is not None
        return torch.ops.cnncomp.quantize(x, 1.0 / spec.scale, spec.dtype)
    x = x.to(HALVES.get(fmt, torch.float32))
    if x.dim() != 4:
        return x.contiguous()
    return x.contiguous(memory_format=torch.contiguous_format if fmt == NCHW else torch.channels_last)


def _noise(shape: Sequence[int], device: torch.device) -> Tensor:
    """float32 numbers from 0 to 1 that leave the caller's random numbers alone."""
    return torch.rand(tuple(shape), dtype=torch.float32, generator=torch.Generator().manual_seed(0)).to(device)


@dataclass
class Chooser:
    """Options and measured times of one graph's layers.

    ``inputs``: for each layer node, the float tensors that it was called with on the example input. ``float_dtype``: float32,
    or the half precision that layers may also compute in. ``modelled``: what the model said of its sparse kernels, where they
    were chosen by it.
    """

    gm: fx.GraphModule
    inputs: dict[fx.Node, tuple[Tensor, ...]]
    device: torch.device
    float_dtype: torch.dtype = torch.float32
    layers: dict[fx.Node, ConvertedLayer] = field(init=False)
    options: dict[fx.Node, list[Option]] = field(init=False)
    why_not: dict[fx.Node, str] = field(init=False)
    modelled: dict[fx.Node, str] = field(init=False, default_factory=dict)
    _measured: dict[object, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = layer_nodes(self.gm)
        self.options, self.why_not = {}, {}
        for node, layer in self.layers.items():
            self.options[node], self.why_not[node] = options_for(layer, self.device.type)

    def heuristic(self) -> Assignment:
        """The choice without measurement; on a GPU, where sparse kernels are concerned, by the model."""
        if self.device.type != "cuda":
            return {node: heuristic(layer, self.options[node]) for node, layer in self.layers.items()}
        return {node: self._by_the_model(node, layer) for node, layer in self.layers.items()}

    def _by_the_model(self, node: fx.Node, layer: ConvertedLayer) -> Option:
        options, shape = self.options[node], node.meta.get("shape", ())
        best, self.modelled[node] = modelled.choose(layer, options, modelled.arch_of(self.device), shape)
        if best is not None:
            return best
        known = [o for o in options if o.candidate.dense or o.candidate.kernel in ("conv2d_int8", "linear_int8")]
        found = heuristic(layer, known)
        halves = [o for o in options if o.candidate.half == self.float_dtype]
        return halves[0] if found.candidate.dense and halves else found

    def measure(self, progress: Callable[[str], None]) -> None:
        """Time every option of every layer on its own, in its preferred formats."""
        all_8bit = {n: next((o for o in opts if o.candidate.takes == Q8), opts[0]) for n, opts in self.options.items()}
        specs = self._specs(all_8bit)
        for node, options in self.options.items():
            if len(options) > 1:
                self._time(node, options, specs, budget_s=0.2)
                dense = min(self.dense(node), key=_seconds)
                rival = min((o for o in options if not o.candidate.dense), key=_seconds, default=None)
                if rival is not None and CLOSE < dense.seconds / rival.seconds < 1 / CLOSE:
                    self._time(node, options, specs, budget_s=0.6)
            else:
                options[0].seconds = 0.0  # nothing to choose
            progress(self.layers[node].info.name)

    def _time(self, node: fx.Node, options: list[Option], specs: dict[fx.Node, QuantSpec], budget_s: float) -> None:
        """Measure options in turn, with 8-bit outputs and residuals where ``specs`` says so. Those that take the same format
        share one copy of the inputs: each with its own would find it cold in the caches."""
        x, *rest = self.inputs[node]
        added = specs.get(source(self.gm, input_node(node, 1))) if rest else None
        inputs: dict[str, tuple[Tensor, ...]] = {}
        for option in options:
            takes = option.candidate.takes
            if takes not in inputs:
                as_added = takes if takes != Q8 else NHWC if added is None else Q8
                others = [to_format(r, as_added, added) for r in rest]
                inputs[takes] = (to_format(x, takes, option.layer.info.input), *others)
            if isinstance(option.layer, (QuantConv2d, QuantLinear)):
                option.layer.set_output(specs.get(node), 1.0 if added is None else added.scale)
            elif isinstance(option.layer, (DenseConv2d, DenseLinear)):  # half precision: as in a network all of it
                option.layer.float_dtype = option.layer.half_dtype or torch.float32
        fns: dict[str, Callable[[], object]] = {}
        for option in options:
            given = inputs[option.candidate.takes]
            # As the network will run: a chain of our kernels has no Python between them.
            fns[option.candidate.kernel] = kernels_of(option.layer, given) or partial(option.layer, *given)
        times = interleaved(fns, min_rounds=9, budget_s=budget_s, cuda=self.device.type == "cuda")
        for option in options:
            option.seconds = times[option.candidate.kernel]

    def _specs(self, assignment: Assignment) -> dict[fx.Node, QuantSpec]:
        """Which layers hand over 8 bit under an assignment."""

        def input_spec(node: fx.Node) -> QuantSpec | None:
            option = assignment.get(node)
            return option.layer.info.input if option is not None and option.candidate.takes == Q8 else None

        return output_specs(self.gm, input_spec)

    def _conversion(self, node: fx.Node, src: str, dst: str, spec: QuantSpec | None) -> float:
        """Seconds to bring ``node``'s tensor from one format to another, measured once per shape."""
        shape = node.meta.get("shape")
        if src == dst or shape is None or (len(shape) != 4 and dst != Q8):
            return 0.0

        def make() -> Callable[[], object]:
            x = to_format(_noise(shape, self.device), src, None)
            return lambda: to_format(x, dst, spec)

        return self._measure_once((shape, src, dst, spec), make)

    def _measure_once(self, key: object, make: Callable[[], Callable[[], object]]) -> float:
        """Seconds of the function that ``make`` returns, made and measured the first time that ``key`` is asked for."""
        if key not in self._measured:
            self._measured[key] = interleaved({"": make()}, budget_s=0.01, cuda=self.device.type == "cuda")[""]
        return self._measured[key]

    def _passing(self, node: fx.Node, fmt: str) -> float:
        """Seconds of a module of torch's on its input in a format, measured once: its max-pool on NCHW takes ten times as
        long as on channels_last."""
        if node.op != "call_module" or len(node.all_input_nodes) != 1:
            return 0.0
        shape, dtype = (node.all_input_nodes[0].meta.get(key) for key in ("shape", "dtype"))
        if shape is None or len(shape) != 4 or dtype != torch.float32:
            return 0.0

        def make() -> Callable[[], object]:
            module = module_at(self.gm, node)
            x = to_format(_noise(shape, self.device), fmt, QuantSpec(1.0, torch.uint8))
            return lambda: module(x)

        return self._measure_once((node, fmt), make)

    def costs(self, assignment: Assignment) -> dict[fx.Node, float]:
        """Seconds of each layer with the conversions of its inputs, and of torch's modules between layers."""
        specs, halves = self._specs(assignment), half_nodes(self.gm, assignment)
        formats: dict[fx.Node, str] = {}
        costs: dict[fx.Node, float] = {}
        for node in self.gm.graph.nodes:
            option = assignment.get(node)
            if option is None:
                before = node.all_input_nodes
                formats[node] = formats[before[0]] if before else NCHW
                costs[node] = self._passing(node, formats[node])
                if formats[node] == Q8 and node not in specs and not passes_8bit(self.gm, node):
                    formats[node] = NCHW
                continue
            takes = option.candidate.takes
            costs[node] = option.seconds
            for i, arg in enumerate(node.all_input_nodes):
                have = formats[arg]
                if have == Q8:
                    continue  # handed over in 8 bit only where every consumer takes it
                want = NHWC if takes == Q8 and i else takes
                costs[node] += self._conversion(arg, have, want, option.layer.info.input)
            formats[node] = Q8 if node in specs else option.candidate.gives
            if option.candidate.half and node not in halves:
                costs[node] += self._conversion(node, formats[node], NHWC, None)
                formats[node] = NHWC
        return costs

    def cost(self, assignment: Assignment) -> float:
        """Seconds of all layers and of the conversions between them."""
        return sum(self.costs(assignment).values())

    def cheapest_dense(self) -> Assignment:
        """The best dense network."""
        allowed = {node: self.dense(node) for node in self.options}
        return min((self._descend(start, allowed) for start in self._starts(allowed)), key=self.cost)

    def all_in_half(self, kernel: str) -> Assignment:
        """The network on a kernel of half precision, whether it may run in it or not."""
        return {node: next(o for o in opts if o.candidate.kernel == kernel) for node, opts in self.options.items()}

    def _starts(self, allowed: dict[fx.Node, list[Option]]) -> list[Assignment]:
        """The fastest options without regard to layouts, and those of each float layout: from one layout to the other is
        more than one step at a time."""
        half = tuple(fmt for fmt, dtype in HALVES.items() if dtype == self.float_dtype)

        def fastest(opts: list[Option], formats: tuple[str, ...]) -> Option:
            return min((o for o in opts if o.candidate.takes in formats), key=_seconds, default=min(opts, key=_seconds))

        return [
            {node: fastest(opts, formats) for node, opts in allowed.items()}
            for formats in ((NCHW, NHWC, Q8, *half), (NCHW,), (NHWC,), *(half and [half]))
        ]

    def cheapest(self, margin: float = MARGIN) -> Assignment:
        """The best network in which no compressed layer takes longer than the best dense kernel in its place: its own time
        must beat dense, and with the conversions of its inputs it must not lose to it. With a ``margin`` of :data:`NEAR` it
        may take a little longer alone: among others in 8 bit it needs no conversions, which a dense one does."""
        allowed = {
            node: self.dense(node) + [o for o in opts if not o.candidate.dense and self.beats_dense(node, o, margin)]
            for node, opts in self.options.items()
        }
        dense, limit = self.cheapest_dense(), max(margin, WITH_CONVERSIONS)
        while True:
            starts = [*self._starts(allowed), dense]
            best = min((self._descend(start, allowed) for start in starts), key=self.cost)
            costs = self.costs(best)
            losers = [n for n, o in best.items() if not o.candidate.dense and costs[n] > limit * self.best_dense(n)]
            if not losers:
                return best
            for node in losers:
                allowed[node].remove(best[node])

    def with_own_kernels(self, assignment: Assignment) -> Assignment:
        """An assignment with kernels that cost less in a network than alone, where alone they take about as long, in the same
        formats: dense ones of ours in place of torch's, as they need no Python and no new memory, and those that run two layers
        in one."""

        def near(node: fx.Node, option: Option) -> Option:
            if option.layer.own_kernels:
                return option
            formats, limit = (option.candidate.takes, option.candidate.gives), NEAR * option.seconds
            found = [
                o
                for o in self.options[node]
                if o.candidate.dense and o.layer.own_kernels and (o.candidate.takes, o.candidate.gives) == formats
            ]
            return min((o for o in found if o.seconds <= limit), key=_seconds, default=option)

        ours = {node: near(node, option) for node, option in assignment.items()}
        return ours | self._joined(ours)

    def _joined(self, assignment: Assignment) -> Assignment:
        """The layers of an assignment that could run in one with another, on the kernel for it."""
        found: Assignment = {}
        for node in assignment:
            pair = [node, *(n for n in node.args[1:2] if isinstance(n, fx.Node))]
            if len(pair) < 2 or pair[1] not in assignment or list(pair[1].users) != [node]:
                continue
            options = {n: o for n in pair for o in self.options[n] if o.candidate.kernel == JOINED_KERNEL}
            if len(options) == 2 and all(
                o.seconds <= NEAR_IN_PAIRS * assignment[n].seconds for n, o in options.items()
            ):
                found |= options
        return found

    def dense(self, node: fx.Node) -> list[Option]:
        """The dense options that the user allows."""
        allowed = (None, self.float_dtype)
        return [o for o in self.options[node] if o.candidate.dense and o.candidate.half in allowed]

    def best_dense(self, node: fx.Node) -> float:
        """Seconds of the fastest dense option that the user allows."""
        return min(o.seconds for o in self.dense(node))

    def beats_dense(self, node: fx.Node, option: Option, margin: float = MARGIN) -> bool:
        """Whether a compressed option is measurably faster than every dense one."""
        return option.seconds <= margin * self.best_dense(node)

    def _descend(self, current: Assignment, allowed: dict[fx.Node, list[Option]]) -> Assignment:
        current = dict(current)
        best = self.cost(current)
        improved = True
        while improved:
            improved = False
            for node, options in allowed.items():
                for option in options:
                    if option is current[node]:
                        continue
                    before, current[node] = current[node], option
                    cost = self.cost(current)
                    if cost < best * (1 - 1e-6):
                        best, improved = cost, True
                    else:
                        current[node] = before
        return current
