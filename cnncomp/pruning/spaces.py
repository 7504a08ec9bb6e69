"""Which channels of a network can be put in another order, and what must be reordered with them."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from cnncomp._modules import LAYER_TYPES, WeightParametrization, is_depthwise
from cnncomp.graph.nodes import cloned, has_user_hooks
from cnncomp.graph.trace import base_type
from cnncomp.pruning.mask import Mask

_POINTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid),
    *(nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
)
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_POINTWISE: set[Any] = {
    *(F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.dropout),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.clamp, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    *("relu", "relu_", "sigmoid", "tanh", "clamp", "clamp_", "contiguous", "clone", "detach", "float"),
}
_ELEMENTWISE: set[Any] = {
    *(operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, torch.add, torch.sub),
    *(torch.mul, "add", "add_", "sub", "mul", "mul_"),
}
_RESHAPES: set[Any] = {torch.flatten, torch.reshape, torch.squeeze, "flatten", "reshape", "view", "squeeze"}


@dataclass
class Space:
    """Channels that can only be reordered together.

    ``producers`` write them (their output channels), ``consumers`` read them (their input channels), ``followers`` keep
    them (BatchNorm, depthwise convolutions).
    """

    size: int
    producers: list[str] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    followers: list[str] = field(default_factory=list)


class _Spaces:
    """Union-find over nodes. What can't be followed is joined with one space that is fixed."""

    def __init__(self) -> None:
        self.parent: dict[Any, Any] = {}
        self.spaces: dict[Any, Space] = {}
        self.fixed: set[Any] = set()

    def find(self, node: Any) -> Any:
        self.parent.setdefault(node, node)
        while self.parent[node] is not node:
            node = self.parent[node]
        return node

    def join(self, a: Any, b: Any) -> None:
        a, b = self.find(a), self.find(b)
        if a is b:
            return
        self.parent[b] = a
        if b in self.fixed:
            self.fixed.add(a)
        gone = self.spaces.pop(b, None)
        if gone is not None:
            kept = self.spaces.setdefault(a, Space(gone.size))
            kept.producers += gone.producers
            kept.consumers += gone.consumers
            kept.followers += gone.followers

    def fix(self, nodes: Iterable[Any]) -> None:
        self.fixed.update(self.find(n) for n in nodes)

    def at(self, node: fx.Node) -> Space:
        return self.spaces.setdefault(self.find(node), Space(_shape(node)[1]))


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def spaces_of(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> list[Space]:
    """The spaces of a graph whose order nothing but their layers can tell, in the order of their first layers.

    Args:
        gm: a traced network, not fused, in eval mode.
        inputs: what to run it on.
    """
    with torch.no_grad():
        ShapeProp(gm).propagate(*cloned(inputs))
    movable = _movable(gm)
    spaces = _Spaces()
    for node in gm.graph.nodes:
        sources = [n for n in node.all_input_nodes if len(_shape(n)) > 0]
        if node.op == "output" or not _shape(node):
            if not _reads_shape_only(node):
                spaces.fix(sources)
        elif node.op in ("placeholder", "get_attr"):
            spaces.fix([node])
        elif node.op == "call_module" and str(node.target) in movable:
            _visit_module(spaces, node, gm.get_submodule(str(node.target)))
        elif node.op != "call_module" and _keeps_channels(node, sources):
            for n in sources:
                if _shape(n)[1] == _shape(node)[1]:
                    spaces.join(n, node)
        else:
            spaces.fix([node, *sources])
    return [s for root, s in spaces.spaces.items() if spaces.find(root) not in spaces.fixed and s.producers]


def _movable(gm: fx.GraphModule) -> set[str]:
    """Modules that the graph calls once, or that have no tensors, and whose parameters nothing else knows."""
    calls = Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_module")
    taken = {str(n.target).rpartition(".")[0] for n in gm.graph.nodes if n.op == "get_attr"}
    owners = Counter(id(p) for m in gm.modules() for p in m._parameters.values() if p is not None)
    found = set()
    for name, count in calls.items():
        module = gm.get_submodule(name)
        ours = all(isinstance(m, Mask) for m in module.modules() if isinstance(m, WeightParametrization))
        apart = any(t == name or t.startswith(f"{name}.") for t in taken)
        shared = any(owners[id(p)] > 1 for p in module.parameters())
        once = count == 1 or not any(True for _ in (*module.parameters(), *module.buffers()))
        if once and ours and not (apart or shared or has_user_hooks(module) or module._forward_pre_hooks):
            found.add(name)
    return found


def _visit_module(spaces: _Spaces, node: fx.Node, module: nn.Module) -> None:
    kind, name = base_type(module), str(node.target)
    sources = [n for n in node.all_input_nodes if _shape(n)]
    if len(sources) != 1 or len(node.args) != 1:
        spaces.fix([node, *sources])
        return
    x = sources[0]
    if kind in (*_POINTWISE_MODULES, *_POOLS, *_NORMS) or is_depthwise_alone(module):
        if kind in _POOLS and _shape(x)[:2] != _shape(node)[:2]:
            spaces.fix([node, x])
            return
        spaces.join(x, node)
        if kind in _NORMS or isinstance(module, LAYER_TYPES):
            spaces.at(node).followers.append(name)
    elif kind in LAYER_TYPES and getattr(module, "groups", 1) == 1 and _channels_second(module, x):
        spaces.at(x).consumers.append(name)
        spaces.at(node).producers.append(name)
    elif kind is nn.Flatten and _only_channels(x, node):
        spaces.join(x, node)
    else:
        spaces.fix([node, x])


def is_depthwise_alone(module: nn.Module) -> bool:
    """Whether each output channel comes from the input channel of the same number, and from no other."""
    return base_type(module) in LAYER_TYPES and is_depthwise(module) and module.out_channels == module.in_channels


def _channels_second(module: nn.Module, x: fx.Node) -> bool:
    """Whether dimension 1 of the input is what the layer's input channels are."""
    dims = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4}[base_type(module)]
    return len(_shape(x)) == dims


def _only_channels(x: fx.Node, out: fx.Node) -> bool:
    """Whether (N, C, 1, ...) becomes (N, C)."""
    shape = _shape(x)
    return len(shape) >= 2 and math.prod(shape[2:]) == 1 and _shape(out) == shape[:2]


def _keeps_channels(node: fx.Node, sources: list[fx.Node]) -> bool:
    """Whether channel c of the result comes from channel c of the operands."""
    shape = _shape(node)
    if len(shape) < 2 or not sources or any(len(_shape(n)) < 2 for n in sources):
        return False
    if node.target in _POINTWISE:
        return len(sources) == 1 and node.args[:1] == (sources[0],) and _shape(sources[0])[:2] == shape[:2]
    if node.target in _ELEMENTWISE:
        return all(len(_shape(n)) == len(shape) and _shape(n)[1] in (1, shape[1]) for n in sources)
    if node.target in _RESHAPES:
        return len(sources) == 1 and _only_channels(sources[0], node)
    if node.target in (torch.mean, "mean"):
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        n = len(_shape(sources[0]))
        return isinstance(dims, (tuple, list)) and all(isinstance(d, int) and d % n >= 2 for d in dims)
    return False


def _reads_shape_only(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim")


def reorder(model: nn.Module, space: Space, order: Tensor) -> None:
    """Put the space's channels in ``order`` (int64): the model computes the same as before."""
    with torch.no_grad():
        for name in (*space.producers, *space.followers):
            for x in _along_outputs(model.get_submodule(name)):
                x.copy_(x[order.to(x.device)])
        for name in space.consumers:
            for x in _weights(model.get_submodule(name)):
                x.copy_(x[:, order.to(x.device)])


def _weights(layer: nn.Module) -> Iterator[Tensor]:
    """The layer's weight and mask."""
    for name, x in (*layer.named_parameters(), *layer.named_buffers()):
        if name == "weight" or name.startswith("parametrizations.weight."):
            yield x


def _along_outputs(module: nn.Module) -> Iterator[Tensor]:
    """What has one entry per output channel: weights, masks, biases, BatchNorm's statistics."""
    yield from (x for x in (*module.parameters(), *module.buffers()) if x.dim() > 0)
