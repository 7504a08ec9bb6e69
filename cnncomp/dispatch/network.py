"""Planning a whole network: its traced parts, the choice for each, and the final race against dense."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from cnncomp._version import __version__
from cnncomp.dispatch.candidates import Option, count_nonzero
from cnncomp.dispatch.choose import NEAR, WITH_CONVERSIONS, Assignment, Chooser, half_nodes, layer_nodes
from cnncomp.dispatch.device import device_key
from cnncomp.dispatch.plan import LayerPlan, Plan, plan_key
from cnncomp.dispatch.timing import interleaved
from cnncomp.errors import ArgumentError
from cnncomp.graph import Traced
from cnncomp.graph.chain import output_specs, settle_units, source
from cnncomp.graph.nodes import cloned, input_node, put_module
from cnncomp.nn import DenseConv2d, DenseLinear, QuantConv2d, QuantLinear, QuantSpec
from cnncomp.nn.dense import HALF_KERNELS
from cnncomp.progress import Advance
from cnncomp.recordings import Recordings

#: The converted network comes back unless the dense one is faster by more than noise.
NETWORK_MARGIN = 1.02


class _Capture(fx.Interpreter):
    """Runs a graph, keeps what each layer was called with, and notes shapes in ``node.meta``."""

    def __init__(self, gm: fx.GraphModule, nodes: set[fx.Node]) -> None:
        super().__init__(gm)
        self.wanted = nodes
        self.seen: dict[fx.Node, tuple[Any, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.wanted:
            self.seen[n] = self.fetch_args_kwargs_from_env(n)[0]
        out = super().run_node(n)
        if isinstance(out, Tensor):
            n.meta["shape"], n.meta["dtype"] = tuple(out.shape), out.dtype
        return out


class NetworkPlanner:
    """Chooses the kernels of a traced network and puts them in place.

    ``module`` is the network; each of :meth:`measure`, :meth:`replay` and :meth:`rule_of_thumb` leaves it converted.
    """

    def __init__(
        self,
        traced: Traced,
        inputs: tuple[Any, ...],
        device: torch.device,
        float_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.module, self.kept, self.inputs, self.device = traced.module, traced.kept, inputs, device
        self.float_dtype = float_dtype
        self.choosers: list[Chooser] = []
        with torch.no_grad():
            for path, gm in traced.graphs.items():
                capture = _Capture(gm, set(layer_nodes(gm)))
                capture.run(*cloned(traced.inputs[path]))
                self.choosers.append(Chooser(gm, capture.seen, device, float_dtype))
        self.num_layers = sum(len(c.layers) for c in self.choosers)
        self.key = self._key()

    @property
    def names(self) -> set[str]:
        """Layers that there is a choice for."""
        return {layer.info.name for chooser in self.choosers for layer in chooser.layers.values()}

    def _key(self) -> str:
        layers = [
            [
                layer.info.name,
                layer.extra_repr(),
                [list(t.shape) for t in chooser.inputs[node]],
                [o.candidate.kernel for o in chooser.options[node]],
                count_nonzero(layer),
                str(layer.info.input),
            ]
            for chooser in self.choosers
            for node, layer in chooser.layers.items()
        ]
        return plan_key(
            {
                "device": device_key(self.device),
                "float_dtype": str(self.float_dtype),
                "versions": [__version__, torch.__version__],
                "inputs": [[list(x.shape), str(x.dtype)] for x in tree_leaves(self.inputs) if isinstance(x, Tensor)],
                "layers": layers,
            }
        )

    def measure(self, advance: Advance) -> Plan:
        """Time every candidate, take the cheapest network, and race it against the best dense one."""
        self.time(advance)
        return self.settle()

    def time(self, advance: Advance) -> dict[str, dict[str, float]]:
        """Time every candidate; median seconds by layer and kernel."""
        with torch.inference_mode():
            for chooser in self.choosers:
                chooser.measure(advance)
        return {
            layer.info.name: {o.candidate.kernel: o.seconds for o in chooser.options[node]}
            for chooser in self.choosers
            for node, layer in chooser.layers.items()
        }

    def settle_by(self, seconds: Mapping[str, Mapping[str, float]]) -> Plan:
        """The plan for times that :meth:`time` gave for a network of the same layers; a kernel without one is not taken."""
        for chooser in self.choosers:
            for node, layer in chooser.layers.items():
                known = seconds.get(layer.info.name, {})
                for option in chooser.options[node]:
                    option.seconds = known.get(option.candidate.kernel, 1e9)
        return self.settle()

    def settle(self) -> Plan:
        """Take the cheapest network by the candidates' times, and race it against the best dense one."""
        with torch.inference_mode():
            dense = [c.cheapest_dense() for c in self.choosers]
            best = [c.cheapest() for c in self.choosers]
            near = [c.cheapest(NEAR) for c in self.choosers]
        if _all_dense(near):
            return self._keep_dense(best)
        rivals = {"converted": best, "dense": dense}
        if near != best:
            rivals["near"] = near
        ours = [c.with_own_kernels(assignment) for c, assignment in zip(self.choosers, best, strict=True)]
        if ours != best:
            rivals["own kernels"] = ours
        if self.device.type == "cuda":  # what else the network could run as, allowed or not
            rivals |= {kernel: [c.all_in_half(kernel) for c in self.choosers] for kernel in HALF_KERNELS}
        seconds = self._race(rivals)
        if seconds.get("own kernels", math.inf) < seconds["converted"]:
            best, seconds["converted"] = ours, seconds["own kernels"]
        if seconds.get("near", math.inf) < WITH_CONVERSIONS * seconds["converted"]:
            best, seconds["converted"] = near, seconds["near"]
        if _all_dense(best):
            return self._keep_dense(best)
        reported = ("dense", "converted", *HALF_KERNELS)
        network_ms = {name: seconds[name] * 1e3 for name in reported if name in seconds}
        if seconds["converted"] > NETWORK_MARGIN * seconds["dense"]:
            plan = self._plan(dense, measured=True)
            ms = " against ".join(f"{network_ms[k]:.2f} ms" for k in ("converted", "dense"))
            plan.reason = f"dense: the converted network as a whole was slower, {ms}"
            self._apply(dense)
        else:
            plan = self._plan(best, measured=True)
            self._apply(best)
        plan.network_ms = network_ms
        return plan

    def _keep_dense(self, best: list[Assignment]) -> Plan:
        plan = self._plan(best, measured=True)
        plan.reason = "no compressed kernel beat dense on any layer"
        self._apply(best)
        return plan

    def _race(self, rivals: Mapping[str, list[Assignment]]) -> dict[str, float]:
        """Median seconds of the whole network under each assignment, in turn."""
        fns: dict[str, partial[Any]] = {}
        for name, assignments in rivals.items():
            self._apply(assignments)
            network = copy.deepcopy(self.module) if len(fns) + 1 < len(rivals) else self.module
            fns[name] = partial(Recordings(), network, self.inputs)
        with torch.inference_mode():
            for fn in fns.values():
                fn()  # recorded the second time
            return interleaved(fns, min_rounds=9, budget_s=1.0, cuda=self.device.type == "cuda")

    def rule_of_thumb(self) -> Plan:
        """Choose without timing anything."""
        assignments = [c.heuristic() for c in self.choosers]
        plan = self._plan(assignments, measured=False)
        self._apply(assignments)
        return plan

    def replay(self, plan: Plan) -> Plan:
        """Take the kernels of ``plan``; layers that it does not name get the rule of thumb. Returns what was applied.

        Raises:
            ArgumentError: a kernel that can't run its layer here.
        """
        assignments = [c.heuristic() for c in self.choosers]
        for chooser, assignment in zip(self.choosers, assignments, strict=True):
            for node, layer in chooser.layers.items():
                if (wanted := plan.layers.get(layer.info.name)) is not None:
                    assignment[node] = _named(chooser.options[node], wanted.kernel, layer.info.name)
        applied = self._plan(assignments, measured=False)
        if unknown := plan.layers.keys() - applied.layers.keys():
            names = ", ".join(sorted(unknown))
            warnings.warn(f"the plan names layers that the model does not have: {names}", stacklevel=3)
        for name in plan.layers.keys() & applied.layers.keys():
            applied.layers[name] = plan.layers[name]
        for chooser in self.choosers:
            for layer in chooser.layers.values():
                layer.info.reason = applied.layers[layer.info.name].reason
                layer.info.timings = dict(applied.layers[layer.info.name].ms)
        self._apply(assignments)
        return replace(
            applied,
            device=plan.device,  # where it was chosen: a saved model is planned again when it is loaded elsewhere
            network_ms=dict(plan.network_ms),
            reason=plan.reason,
            measured=plan.measured,
            float_dtype=plan.float_dtype,
        )

    def _plan(self, assignments: list[Assignment], measured: bool) -> Plan:
        dtype = str(self.float_dtype).removeprefix("torch.")
        plan = Plan(device_key(self.device), self.key, measured=measured, float_dtype=dtype)
        for chooser, assignment in zip(self.choosers, assignments, strict=True):
            for node, option in assignment.items():
                info = chooser.layers[node].info
                info.timings = {o.candidate.kernel: o.seconds * 1e3 for o in chooser.options[node]} if measured else {}
                info.reason = _reason(chooser, node, option, measured)
                plan.layers[info.name] = LayerPlan(option.candidate.kernel, dict(info.timings), info.reason)
        return plan

    def _apply(self, assignments: list[Assignment]) -> None:
        for chooser, assignment in zip(self.choosers, assignments, strict=True):
            apply_assignment(chooser.gm, assignment)


def _all_dense(assignments: list[Assignment]) -> bool:
    return all(option.candidate.dense for assignment in assignments for option in assignment.values())


def _named(options: list[Option], kernel: str, layer: str) -> Option:
    for option in options:
        if option.candidate.kernel == kernel:
            return option
    known = ", ".join(o.candidate.kernel for o in options)
    raise ArgumentError("plan", f"kernel {kernel!r} for layer {layer!r}", f"one of {known}")


def _reason(chooser: Chooser, node: fx.Node, option: Option, measured: bool) -> str:
    """One line: why a layer stayed dense, or what a compressed kernel gained."""
    if not measured and (modelled := chooser.modelled.get(node)):
        return modelled
    if not option.candidate.dense:
        if not measured:
            return "rule of thumb"
        times = f"{chooser.best_dense(node) / option.seconds:.2f}×"
        if not chooser.beats_dense(node, option):
            return f"{times} dense alone, but the network is faster with it: dense would need conversions"
        return f"{times} faster than dense{_beside_half(chooser, node, option)}"
    compressed = [o for o in chooser.options[node] if not o.candidate.dense]
    if not compressed:
        return chooser.why_not[node]
    if not measured:
        return "rule of thumb: too few zeros"
    rival = min(compressed, key=lambda o: o.seconds)
    ratio = chooser.best_dense(node) / rival.seconds
    if chooser.beats_dense(node, rival):
        return f"{rival.candidate.kernel} is {ratio:.2f}× dense here, but its conversions cost more"
    return f"{rival.candidate.kernel} is {ratio:.2f}× dense here"


def _beside_half(chooser: Chooser, node: fx.Node, option: Option) -> str:
    """How a compressed kernel compares with half precision that it did not have to beat."""
    halves = [o for o in chooser.options[node] if o.candidate.half not in (None, chooser.float_dtype)]
    return "".join(f", {o.seconds / option.seconds:.2f}× {o.candidate.kernel.partition('.')[2]}" for o in halves)


def apply_assignment(gm: fx.GraphModule, assignment: Assignment) -> None:
    """Put the chosen layers into the graph and settle where 8 bit is handed over, where half precision, and where in units of
    images."""

    def input_spec(node: fx.Node) -> QuantSpec | None:
        option = assignment.get(node)
        layer = None if option is None else option.layer
        return layer.input if isinstance(layer, (QuantConv2d, QuantLinear)) else None

    specs, halves = output_specs(gm, input_spec), half_nodes(gm, assignment)
    for node, option in assignment.items():
        layer = option.layer
        put_module(gm, node, layer)
        if isinstance(layer, (QuantConv2d, QuantLinear)):
            step = 1.0
            if len(node.args) > 1 and (spec := specs.get(source(gm, input_node(node, 1)))) is not None:
                step = spec.scale
            layer.set_output(specs.get(node), step)
        elif isinstance(layer, (DenseConv2d, DenseLinear)):
            layer.float_dtype = (layer.half_dtype if node in halves else None) or torch.float32
    settle_units(gm)
