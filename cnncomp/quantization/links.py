"""Which layers feed which, with nothing between them that would mind a positive factor per channel."""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from cnncomp._modules import LAYER_TYPES, Layer, layers_of
from cnncomp._norms import BatchNorm
from cnncomp.quantization.clamp import ClampChannels

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

#: f(s·x) = s·f(x) for s > 0, element by element; and channel by channel of (N, C, ...).
_ELEMENTWISE = {
    nn.ReLU,
    nn.LeakyReLU,
    nn.Identity,
    nn.Dropout,
    F.relu,
    torch.relu,
    F.leaky_relu,
    F.dropout,
    "relu",
    "relu_",
}
_POOLING = {
    nn.MaxPool2d, nn.MaxPool1d, nn.AvgPool2d, nn.AvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool1d, nn.Dropout2d,
    nn.AdaptiveMaxPool2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d,
}  # fmt: skip


_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}


@dataclass
class Link:
    """``seconds`` read what ``firsts`` give, through norms, activations, pooling and additions, and nobody else does.

    Attributes:
        firsts: layers, each with the name of the BatchNorm that alone reads it, or None.
        seconds: layers, each with the number of its inputs that belong to one channel (more than one after flatten).
        clamps: names of the activations between them that have an upper bound; lower bounds are 0.
        pooled: there is a pooling or flatten between them.
    """

    firsts: dict[str, str | None] = field(default_factory=dict)
    seconds: dict[str, int] = field(default_factory=dict)
    clamps: list[str] = field(default_factory=list)
    pooled: bool = False


def layer_graph(model: nn.Module, warn: bool = True) -> fx.Graph | None:
    """The graph of the model's forward, torch's own layers as its leaves; None, with a warning if ``warn``, if it can't be
    traced."""
    try:
        return _Tracer().trace(model)
    except Exception as error:  # fx, and the model's own code on a proxy, raise anything
        text = (str(error).splitlines() or [type(error).__name__])[0]
        if warn:
            warnings.warn(
                f"the model's forward can't be traced ({text}): its layers are taken one by one", stacklevel=4
            )
        return None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*LAYER_TYPES, ClampChannels)) or super().is_leaf_module(m, module_qualified_name)


def norm_after(model: nn.Module, graph: fx.Graph | None) -> dict[str, str]:
    """For each convolution that a BatchNorm with running statistics alone reads: the norm's name. Both are called once."""
    found: dict[str, str] = {}
    for node in _called_once(model, graph):
        if isinstance(model.get_submodule(str(node.target)), nn.Linear):
            continue  # whose channels are in the last dimension, not in the one that the norm takes
        user = _only_user(node)
        norm = None if user is None or _calls(graph, user) > 1 else _norm(model, user)
        if user is not None and norm is not None and norm.running_mean is not None:
            found[str(node.target)] = str(user.target)
    return found


def links_of(model: nn.Module, graph: fx.Graph | None) -> list[Link]:
    """All links of a graph, in the order of execution. Each layer is in one link as first and in one as second, at most."""
    calls = {node: str(node.target) for node in _called_once(model, graph)}
    norms, links, seen = norm_after(model, graph), [], set[str]()
    for node, name in calls.items():
        if name not in seen:
            search = _Search(model, graph, calls, norms)
            if search.run(node):
                links.append(search.link)
            seen |= set(search.link.firsts)
    return links


def unpooled_readers(model: nn.Module, graph: fx.Graph | None, names: Iterable[str]) -> dict[str, str]:
    """Of layers that read max-pooled values: the layer that reads the same values before they are pooled, of ``names``.

    What they read can stay in 8 bit with one scale for both.
    """
    known, found = set(names), dict[str, str]()
    calls = {node: str(node.target) for node in _called_once(model, graph) if str(node.target) in known}
    for node, name in calls.items():
        read = node.args[0]
        while isinstance(read, fx.Node) and _max_pools(model, read):
            read = read.args[0]
            readers = [calls[user] for user in read.users if user in calls] if isinstance(read, fx.Node) else []
            if readers:
                found[name] = readers[0]
    return found


def _max_pools(model: nn.Module, node: fx.Node) -> bool:
    kind = type(model.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    return kind in (nn.MaxPool2d, F.max_pool2d, torch.max_pool2d) and bool(node.args)


class _Search:
    """Finds the link that a layer is a first of: all values whose channels must share their factors with its outputs."""

    def __init__(
        self, model: nn.Module, graph: fx.Graph | None, calls: dict[fx.Node, str], norms: dict[str, str]
    ) -> None:
        self.model, self.graph, self.calls, self.norms = model, graph, calls, norms
        self.layers = layers_of(model)
        self.link = Link()
        self.flat: dict[fx.Node, bool] = {}  # the values, and whether they are flattened
        self.todo: list[fx.Node] = []

    def run(self, start: fx.Node) -> bool:
        """Whether there is a link. ``link.firsts`` holds the layers found in either case."""
        first = self.layers[self.calls[start]]
        self.rows, self.channels = isinstance(first, nn.Linear), first.weight.shape[0]  # rows: channels come last
        good = self._value(start, False)
        while good and self.todo:
            node = self.todo.pop()
            good = all(self._read_by(user, node) for user in node.users) and self._made_of(node)
        return good and bool(self.link.seconds)

    def _value(self, node: fx.Node, flat: bool) -> bool:
        """Take a value in; False if its channels can't be rescaled."""
        if node in self.flat:
            return True
        self.flat[node] = flat
        self.todo.append(node)
        if (name := self.calls.get(node)) is not None:
            self.link.firsts[name] = self.norms.get(name)
            norm = self.link.firsts[name]
            affine = norm is None or self.model.get_submodule(norm).weight is not None
            layer = self.layers[name]
            return affine and layer.weight.shape[0] == self.channels and isinstance(layer, nn.Linear) == self.rows
        module = self._module(node)
        kind = node.target if module is None else type(module)
        if kind in _ADDS:
            return not node.kwargs and len(node.args) == 2 and len(node.all_input_nodes) > 0
        if str(node.target) in self.norms.values() and module is not None:
            return self.calls.get(node.all_input_nodes[0]) in self.norms
        if self.rows:
            return kind in _ELEMENTWISE
        if module is not None and _is_clamp(module):
            self.link.clamps.append(str(node.target))
            return _calls(self.graph, node) == 1
        if kind in _POOLING or _flattens(node, module):
            self.link.pooled = True
            return True
        return kind in _ELEMENTWISE

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _read_by(self, user: fx.Node, node: fx.Node) -> bool:
        if (name := self.calls.get(user)) is not None:
            expand = self._inputs_per_channel(self.layers[name], self.flat[node])
            self.link.seconds[name] = expand
            return expand > 0
        return self._value(user, self.flat[node] or _flattens(user, self._module(user)))

    def _inputs_per_channel(self, second: Layer, flat: bool) -> int:
        """0 if the layer does not read these channels as its inputs."""
        if not isinstance(second, nn.Linear):
            return int(second.in_channels == self.channels and not flat and not self.rows)
        if not (self.rows or flat) or second.in_features % self.channels:
            return 0  # it reads the last dimension, which holds no channels
        return second.in_features // self.channels

    def _made_of(self, node: fx.Node) -> bool:
        """Take in what a value is computed from, up to the layers."""
        if node in self.calls:
            return True
        if node.op not in ("call_module", "call_function", "call_method"):
            return False
        flat = self.flat[node] and not _flattens(node, self._module(node))
        return all(self._value(source, flat) for source in node.all_input_nodes)


def _called_once(model: nn.Module, graph: fx.Graph | None) -> Iterator[fx.Node]:
    """Calls of layers that are called once and share their weight with no other."""
    if graph is None:
        return
    layers = layers_of(model)
    owners = Counter(id(p) for layer in layers.values() for p in layer.parameters())
    for node in graph.nodes:
        layer = layers.get(str(node.target)) if node.op == "call_module" else None
        if layer is None or _calls(graph, node) > 1 or len(node.args) != 1 or node.kwargs:
            continue
        if all(owners[id(p)] == 1 for p in layer.parameters()):
            yield node


def _calls(graph: fx.Graph | None, node: fx.Node) -> int:
    assert graph is not None
    return sum(n.op == "call_module" and n.target == node.target for n in graph.nodes)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].all_input_nodes == [node] else None


def _norm(model: nn.Module, node: fx.Node) -> BatchNorm | None:
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, NORMS) else None


def _is_clamp(module: nn.Module) -> bool:
    """ReLU6, Hardtanh from 0 on, and what they became before."""
    if isinstance(module, ClampChannels):
        return module.lo == 0
    return isinstance(module, nn.Hardtanh) and type(module) in (nn.ReLU6, nn.Hardtanh) and module.min_val == 0


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether all dimensions but the first become one."""
    if module is not None:
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    if node.target not in (torch.flatten, "flatten"):
        return False
    return (node.args[1:] in ((1,), (1, -1)) and not node.kwargs) or (
        len(node.args) == 1 and node.kwargs == {"start_dim": 1}
    )
