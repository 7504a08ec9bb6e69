"""Where activations stay in 8 bit between layers, and of those where they stay in units of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx, nn

from cnncomp.graph.nodes import has_user_hooks, module_at
from cnncomp.nn import QuantMaxPool2d, QuantSpec

_PASS_METHODS = ("flatten", "reshape")

#: How a node takes its input in 8 bit (None: it doesn't), asked for layers only.
InputSpec = Callable[[fx.Node], QuantSpec | None]
#: The format in whose units a node's layer gathers its input and may give its output (None: it doesn't).
Gathers = Callable[[fx.Node], str | None]


def passes_8bit(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` takes and gives 8 bit without changing values or scale."""
    if node.op == "call_module":
        module = module_at(gm, node)
        if has_user_hooks(module):
            return False
        if isinstance(module, nn.MaxPool2d) and type(module) in (nn.MaxPool2d, QuantMaxPool2d):
            return not module.ceil_mode and not module.return_indices
        return type(module) is nn.Flatten
    if node.op == "call_function":
        return node.target is torch.flatten
    return node.op == "call_method" and node.target in _PASS_METHODS


def _reads_shape_only(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim")


def _consumers(gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(consumer, the input of it that carries ``node``'s values), looking through what passes 8 bit."""
    for user in node.users:
        if _reads_shape_only(user):
            continue
        if passes_8bit(gm, user) and user.args[0] is node:
            yield from _consumers(gm, user)
        else:
            yield user, node


def output_specs(gm: fx.GraphModule, input_spec: InputSpec) -> dict[fx.Node, QuantSpec]:
    """For each 8-bit layer whose result can stay in 8 bit, how it is quantised.

    It can if every consumer is an 8-bit layer, and those that multiply it agree on one scale and dtype. (A consumer may
    also take it as its residual; one that is only a residual stays float, since nothing calibrated it.)
    """
    specs: dict[fx.Node, QuantSpec] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module" or input_spec(node) is None:
            continue
        wanted: set[QuantSpec | None] = set()
        for user, carrier in _consumers(gm, node):
            spec = input_spec(user) if user.op == "call_module" else None
            if spec is None or user.args[0] is carrier:
                wanted.add(spec)
        if len(wanted) == 1 and (spec := wanted.pop()) is not None:
            specs[node] = spec
    return specs


def source(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node whose values ``node`` carries, looking back through what passes 8 bit."""
    while passes_8bit(gm, node):
        node = node.all_input_nodes[0]  # the others are sizes
    return node


def _unit_readers(gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """As :func:`_consumers`, looking through max-pools alone, which take units."""
    for user in node.users:
        pool = module_at(gm, user) if user.op == "call_module" else None
        if type(pool) is QuantMaxPool2d and passes_8bit(gm, user):
            yield from _unit_readers(gm, user)
        else:
            yield user, node


def outputs_in_units(gm: fx.GraphModule, gathers: Gathers, specs: dict[fx.Node, QuantSpec]) -> set[fx.Node]:
    """Layers that best give their 8-bit output in units of images: all that reads it are layers that gather in the same format,
    one of them its input, or a residual beside an output in units. ``specs``: of :func:`output_specs`.

    A residual that lies otherwise than the output is copied: at most once where a chain ends.
    """
    found: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        format = gathers(node) if node in specs else None
        if format is None or any(source(gm, n) not in specs for n in node.all_input_nodes[1:]):
            continue  # a residual of floats has no units
        readers = list(_unit_readers(gm, node))
        if all(gathers(user) == format for user, _ in readers) and any(
            user.args[0] is carrier or user in found for user, carrier in readers
        ):
            found.add(node)
    return found
