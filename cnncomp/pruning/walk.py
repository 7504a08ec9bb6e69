"""From layer to layer through a network, with all batches of a data set together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from cnncomp._batches import inputs_of
from cnncomp._modules import Layer
from cnncomp.graph import graph_of

Layers: TypeAlias = Sequence[Layer]


def call(model: nn.Module, batch: Any, index: int) -> None:
    """One forward on batch number ``index``."""
    args, kwargs = inputs_of(batch, index, next(model.parameters()).device)
    model(*args, **kwargs)


class _Reached(Exception):
    """Ends a forward before the last layer of interest."""


class Walk:
    """The inputs of a network's layers, asked for in the order of their calls.

    A network that can be traced is run once, stopping before each layer that is asked for, with the values of all batches
    held that are still needed there. Another is run anew up to that layer each time. Either way the layer's weights,
    and those of the ones before it, may have changed since the last question.
    """

    def __init__(self, model: nn.Module, data: Sequence[Any]) -> None:
        self.model, self.data = model, data
        self._stepper: _Stepper | None = None
        device = next(model.parameters()).device
        inputs = [inputs_of(batch, i, device) for i, batch in enumerate(data)]
        if any(kwargs for _, kwargs in inputs):
            return
        graph = graph_of(model, tuple(x[:1] if x.dim() else x for x in inputs[0][0]))  # one sample shows the way
        if graph is not None:
            self._stepper = _Stepper(graph, [args for args, _ in inputs])

    def inputs_at(self, layers: Layers, calls: int) -> Iterator[list[tuple[Layer, Tensor]]]:
        """For each batch what ``layers`` are called with, in the order of the calls, of which there are ``calls``."""
        if self._stepper is not None and calls == 1:
            found = self._stepper.inputs_at(layers)
            if found is not None:
                for layer, x in found:
                    yield [(layer, x)]
                return
        for index, batch in enumerate(self.data):
            yield self._run_to(layers, batch, index, calls)

    def _run_to(self, layers: Layers, batch: Any, index: int, calls: int) -> list[tuple[Layer, Tensor]]:
        inputs: list[tuple[Layer, Tensor]] = []

        def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append((layer, (args[0] if args else kwargs["input"]).clone()))
            if len(inputs) == calls:
                raise _Reached

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
        try:
            call(self.model, batch, index)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return inputs


class _Stepper:
    """Runs a graph node by node for several inputs at once."""

    def __init__(self, graph: fx.GraphModule, inputs: list[list[Tensor]]) -> None:
        self.graph = graph
        self.nodes = list(graph.graph.nodes)
        self.at = 0
        self.runs = []
        for args in inputs:
            run = fx.Interpreter(graph)
            run.args_iter = iter(args)
            self.runs.append(run)

    def inputs_at(self, layers: Layers) -> list[tuple[Layer, Tensor]] | None:
        """(layer, its input) of each run just before the next call of one of ``layers``; None if there is no such call."""
        for stop in range(self.at, len(self.nodes)):
            node = self.nodes[stop]
            called = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            layer = next((one for one in layers if one is called), None)
            if layer is not None:
                self._advance(stop)
                x = node.args[0] if node.args else node.kwargs["input"]
                return [(layer, run.env[x]) for run in self.runs]
        return None

    def _advance(self, stop: int) -> None:
        with torch.no_grad():
            for node in self.nodes[self.at : stop]:
                for run in self.runs:
                    run.env[node] = run.run_node(node)
                    for dead in run.user_to_last_uses.get(node, []):
                        del run.env[dead]
        self.at = stop
