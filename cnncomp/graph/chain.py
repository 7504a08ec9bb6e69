"""Where activations stay in 8 bit between layers, and of those where they stay in units of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx, nn

from cnncomp.graph.nodes import has_user_hooks, module_at
from cnncomp.nn import ConcatChannels, GatheredConv2d, QuantConv2d, QuantLinear, QuantMaxPool2d, QuantSpec

_PASS_METHODS = ("flatten", "reshape")

#: How a node takes its input in 8 bit (None: it doesn't), asked for layers only.
InputSpec = Callable[[fx.Node], QuantSpec | None]


def passes_8bit(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` takes and gives 8 bit without changing values or scale."""
    if node.op == "call_module":
        module = module_at(gm, node)
        if has_user_hooks(module):
            return False
        if isinstance(module, nn.MaxPool2d) and type(module) in (nn.MaxPool2d, QuantMaxPool2d):
            return not module.return_indices
        return type(module) is nn.Flatten
    if node.op == "call_function":
        return node.target is torch.flatten
    return node.op == "call_method" and node.target in _PASS_METHODS


def _reads_shape_only(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim")


def _joins(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` puts images one behind the other: in 8 bit if all come in 8 bit, with one scale."""
    return node.op == "call_module" and type(module_at(gm, node)) is ConcatChannels


def _consumers(gm: fx.GraphModule, node: fx.Node, joints: set[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(consumer, the input of it that carries ``node``'s values), looking through what passes 8 bit."""
    for user in node.users:
        if _reads_shape_only(user):
            continue
        if user in joints or (passes_8bit(gm, user) and user.args[0] is node):
            yield from _consumers(gm, user, joints)
        else:
            yield user, node


def output_specs(gm: fx.GraphModule, input_spec: InputSpec) -> dict[fx.Node, QuantSpec]:
    """For each 8-bit layer whose result can stay in 8 bit, and for each concatenation of such, how it is quantised.

    It can if every consumer is an 8-bit layer, and those that multiply it agree on one scale and dtype. (A consumer may
    also take it as its residual; one that is only a residual stays float, since nothing calibrated it.) Layers whose results
    are concatenated have the scale of what reads the concatenation: all, or none.
    """
    joints = {node for node in gm.graph.nodes if _joins(gm, node)}
    while True:
        specs = _specs_through(gm, input_spec, joints)
        for node in gm.graph.nodes:  # in order: what is joined may be joined again
            if node in joints:
                given = {specs.get(source(gm, x)) for x in node.all_input_nodes}
                if len(given) == 1 and (spec := given.pop()) is not None:
                    specs[node] = spec
        if not (broken := joints - specs.keys()):
            return specs
        joints -= broken


def _specs_through(gm: fx.GraphModule, input_spec: InputSpec, joints: set[fx.Node]) -> dict[fx.Node, QuantSpec]:
    """The layers' part of :func:`output_specs`, if all of ``joints`` take and give 8 bit."""
    specs: dict[fx.Node, QuantSpec] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module" or input_spec(node) is None:
            continue
        wanted: set[QuantSpec | None] = set()
        for user, carrier in _consumers(gm, node, joints):
            spec = input_spec(user) if user.op == "call_module" else None
            if spec is None or user.args[0] is carrier:
                wanted.add(spec)
        if len(wanted) == 1 and (spec := wanted.pop()) is not None:
            specs[node] = spec
    return specs


def half_outputs(gm: fx.GraphModule, takes: Callable[[fx.Node], torch.dtype | None]) -> set[fx.Node]:
    """The layers that compute in half precision whose results can stay in it: those that read them do too, or quantise them.

    Args:
        gm: The graph.
        takes: What a layer multiplies: float16 or bfloat16, uint8 or int8; None for float32 and what is no layer.
    """

    def reads_half(user: fx.Node, carrier: fx.Node) -> bool:
        dtype = takes(user)
        if dtype is None or dtype.is_floating_point:
            return dtype is not None
        return user.args[0] is carrier and carrier not in user.args[1:]  # a residual of int8 kernels is no half

    found = set()
    for node in gm.graph.nodes:
        dtype, readers = takes(node), list(_consumers(gm, node, set()))
        if dtype and dtype.is_floating_point and readers and all(reads_half(*reader) for reader in readers):
            found.add(node)
    return found


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


def _gathering(gm: fx.GraphModule, node: fx.Node) -> GatheredConv2d | None:
    """A node's layer, if it gathers its input in units and can give its output in them."""
    layer = module_at(gm, node) if node.op == "call_module" else None
    return layer if isinstance(layer, GatheredConv2d) and layer.gathers else None


def _gives_8bit(gm: fx.GraphModule, node: fx.Node) -> bool:
    layer = module_at(gm, node) if node.op == "call_module" else None
    return isinstance(layer, (QuantConv2d, QuantLinear)) and layer.output is not None


def settle_units(gm: fx.GraphModule) -> None:
    """Decide which layers give their output in units of images, whether it is 8 bit being settled.

    Those do all whose readers gather in the same format, if one of them multiplies it, or adds it to an output in units. A
    residual that lies otherwise than the output is copied: where a chain begins or ends.
    """
    chained: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if (layer := _gathering(gm, node)) is None:
            continue
        readers = [(_gathering(gm, user), user, carrier) for user, carrier in _unit_readers(gm, node)]
        layer.out_units = (
            _gives_8bit(gm, node)
            and all(_gives_8bit(gm, source(gm, n)) for n in node.args[1:] if isinstance(n, fx.Node))
            and all(other is not None and other.gathers == layer.gathers for other, *_ in readers)
            and any(user.args[0] is carrier or user in chained for _, user, carrier in readers)
        )
        chained.update([node] * layer.out_units)
