"""Which layers feed which: pairs of layers with nothing between them that would mind a positive factor per channel."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
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


@dataclass
class Link:
    """``second`` reads what ``first`` gives, through ``norm`` and activations, and nobody else does.

    ``clamps``: names of the activations between them that have an upper bound; lower bounds are 0. ``expand``: how many
    inputs of ``second`` belong to one output channel of ``first`` (more than one after flatten). ``direct``: there is
    nothing but norm and activations between them.
    """

    first: str
    second: str
    norm: str | None = None
    clamps: list[str] = field(default_factory=list)
    expand: int = 1
    direct: bool = True


def graph_of(model: nn.Module) -> fx.Graph | None:
    """The graph of the model's forward, torch's own layers as its leaves; None, with a warning, if it can't be traced."""
    try:
        return _Tracer().trace(model)
    except Exception as error:  # fx, and the model's own code on a proxy, raise anything
        text = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"the model's forward can't be traced ({text}): its layers are taken one by one", stacklevel=4)
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
    """All links of a graph, in the order of execution."""
    once = {str(n.target) for n in _called_once(model, graph)}
    norms = norm_after(model, graph)
    links = []
    for node in _called_once(model, graph):
        link = _follow(model, graph, node, norms)
        if link is not None and link.second in once:
            links.append(link)
    return links


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


def _follow(model: nn.Module, graph: fx.Graph | None, node: fx.Node, norms: dict[str, str]) -> Link | None:
    """The link that starts at a layer's call, if there is one."""
    link = Link(str(node.target), "", norms.get(str(node.target)))
    first = layers_of(model)[link.first]
    rows = isinstance(first, nn.Linear)  # channels are in the last dimension
    flattened = False
    at: fx.Node | None = _only_user(node)
    if at is not None and link.norm is not None:
        if model.get_submodule(link.norm).weight is None:
            return None
        at = _only_user(at)
    while at is not None:
        module = model.get_submodule(str(at.target)) if at.op == "call_module" else None
        kind = at.target if module is None else type(module)
        if isinstance(module, LAYER_TYPES):
            return _closed(link, str(at.target), first, module, flattened)
        if rows and kind not in _ELEMENTWISE:
            return None
        if module is not None and _is_clamp(module):
            if _calls(graph, at) > 1:
                return None
            link.clamps.append(str(at.target))
        elif _flattens(at, module):
            flattened, link.direct = True, False
        elif kind in _POOLING:
            link.direct = False
        elif kind not in _ELEMENTWISE:
            return None
        at = _only_user(at)
    return None


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


def _closed(link: Link, name: str, first: Layer, second: Layer, flattened: bool) -> Link | None:
    """The link, complete, if the channels of ``first`` are the inputs of ``second``."""
    link.second = name
    outputs = first.weight.shape[0]
    if isinstance(second, nn.Linear):
        # It reads the last dimension: of channels after a linear layer, of all that was flattened after a convolution.
        if not (isinstance(first, nn.Linear) or flattened) or second.in_features % outputs:
            return None
        link.expand = second.in_features // outputs
        return link
    return link if second.in_channels == outputs and not flattened and not isinstance(first, nn.Linear) else None
