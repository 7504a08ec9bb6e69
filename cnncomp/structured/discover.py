"""From a model to its :class:`ChannelGraph`, by tracing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrize

from cnncomp._batches import evaluating
from cnncomp._modules import _chain
from cnncomp.convert import as_inputs
from cnncomp.errors import ArgumentError
from cnncomp.graph.nodes import cloned, has_user_hooks
from cnncomp.graph.operations import is_channelwise
from cnncomp.graph.trace import Call, base_type, record_calls, trace_graph
from cnncomp.nn import ConvertedLayer
from cnncomp.pruning.mask import Mask
from cnncomp.quantization import QuantizeInputHook
from cnncomp.structured.graph import ChannelGraph, build
from cnncomp.structured.layers import Node, node_type
from cnncomp.structured.propagate import Propagation
from cnncomp.structured.units import Units


def channels_of(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """Find by tracing which channels of ``model`` can go, and what goes with them.

    Where the model can't be traced as a whole, its parts are traced one by one; each keeps its inputs and outputs then. Never
    fails on a model: what stays is in ``ChannelGraph.kept``, with the reason.

    Args:
        example_inputs: a tensor or a tuple of positional arguments, on the model's device.

    Raises:
        ArgumentError: no module, a converted one, or no tensor among the inputs.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
    if any(isinstance(m, ConvertedLayer) for m in model.modules()):
        raise ArgumentError("model", "a converted model", "the model before cnncomp.convert")
    inputs = as_inputs(example_inputs, model)
    with evaluating(model), torch.no_grad():
        search = _Search(model, record_calls(model, inputs))
        search.visit(model, "")
    axes = [(node, axis, ids) for node in search.order for axis, ids in search.axes[node].items()]
    graph = build(model, search.units, axes)
    graph.kept = {**search.kept, **graph.kept}
    return graph


@dataclass
class _Search:
    model: nn.Module
    calls: dict[str, Call | None]
    units: Units = field(default_factory=Units)
    nodes: dict[nn.Module, Node] = field(default_factory=dict)
    order: list[Node] = field(default_factory=list)
    axes: dict[Node, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        owners = Counter(id(p) for m in self.model.modules() for p in m._parameters.values() if p is not None)
        self.shared = frozenset(i for i, n in owners.items() if n > 1)
        self.names = {m: name for name, m in self.model.named_modules()}

    def visit(self, module: nn.Module, path: str) -> None:
        """Follow the channels of ``module``, or of its children where it can't be traced."""
        if not any(node_type(base_type(m)) for m in module.modules()):
            return
        call = self.calls.get(path)
        single = node_type(base_type(module)) is not None
        gm = None
        if call is not None and not has_user_hooks(module) and any(isinstance(a, torch.Tensor) for a in call.args):
            gm = trace_graph(nn.Sequential(module) if single else module, call)
        if gm is not None and call is not None:
            self._follow(gm, call, "model" if module is self.model else "traced part")
            return
        if path in self.calls or not path:
            self.kept[path] = "has hooks" if has_user_hooks(module) else "can't be traced"
        for name, child in module.named_children():
            if self.names[child] == (f"{path}.{name}" if path else name):  # else another place's child too
                self.visit(child, self.names[child])

    def _follow(self, gm: fx.GraphModule, call: Call, noun: str) -> None:
        ShapeProp(gm).propagate(*cloned(call.args))
        taken_apart = {
            str(n.target).rpartition(".")[0] for n in gm.graph.nodes if n.op == "get_attr" and "." in str(n.target)
        }

        def node_of(target: str) -> tuple[Node | None, str]:
            module = gm.get_submodule(target)
            reason = "has weights that the forward reads by itself" if target in taken_apart else self._why_not(module)
            return (None, self._note(module, reason)) if reason else (self._node(module), "")

        found = Propagation(gm, self.units, node_of, noun)
        for known, axis in ((found.out_ids, "out"), (found.in_ids, "in")):
            for node, ids in known.items():
                mine = self.axes.setdefault(node, {})
                if node not in self.order:
                    self.order.append(node)
                if axis in mine:  # a layer in two parts of the model
                    self.units.join(mine[axis], ids)
                mine.setdefault(axis, ids)

    def _node(self, module: nn.Module) -> Node | None:
        cls = node_type(base_type(module))
        if cls is None or is_channelwise(module):
            return None
        if module not in self.nodes:
            self.nodes[module] = cls(self.names.get(module, ""), module)
        return self.nodes[module]

    def _note(self, module: nn.Module, reason: str) -> str:
        name = self.names.get(module, "")
        if name:
            self.kept[name] = reason
        return f"is tied to {name!r}, which {reason}"

    def _why_not(self, module: nn.Module) -> str:
        """Why the module may not lose channels; "" if it may, or has none."""
        if has_user_hooks(module):
            return "has hooks"
        if any(id(p) in self.shared for p in module.parameters()):
            return "shares its weights with another layer"
        if any(isinstance(hook, QuantizeInputHook) for hook in module._forward_pre_hooks.values()):
            return "is quantised: prune channels first"
        if parametrize.is_parametrized(module):
            foreign = {name for name in module.parametrizations if name != "weight"}  # type: ignore[union-attr]
            if foreign or any(not isinstance(p, Mask) for p in _chain(module)):
                return "has parametrised weights"
        return ""
