"""Brings a traced graph into a form that fusion may reorder: no mutation in place, no identities, no demands on layout."""

from __future__ import annotations

import copy
import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cnncomp.graph.arguments import positional
from cnncomp.graph.modules import as_modules
from cnncomp.graph.nodes import has_user_hooks, module_at, put_module
from cnncomp.graph.operations import arguments

_IDENTITIES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)
#: In-place operators and functions, and what computes the same on a new tensor.
_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    torch.clamp_: torch.clamp,
    F.relu_: F.relu,
    F.hardtanh_: F.hardtanh,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
}
_VIEWS = frozenset(
    (
        *("view", "view_as", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "squeeze", "unsqueeze"),
        *("chunk", "split", "narrow", "expand", "contiguous", "detach", "unbind", "select", "swapaxes", "movedim"),
        *("to", "getitem", "diagonal", "unfold"),
    )
)


class CannotNormalize(Exception):
    """The graph mutates something in a way that is not understood."""


def normalize(gm: fx.GraphModule) -> None:
    """Rewrite ``gm`` in place.

    Raises:
        CannotNormalize: a mutation of a view, of a buffer, or by an operation with no twin out of place.
    """
    for node in gm.graph.nodes:
        node.type = None  # an annotation that is a string could not be pickled
    _drop_assertions(gm)
    _by_position(gm)
    _drop_identities(gm)  # first: in inference a dropout changes nothing, in place or not
    _out_of_place(gm)
    as_modules(gm)
    _tolerate_layouts(gm)
    gm.graph.lint()
    gm.recompile()


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _drop_assertions(gm: fx.GraphModule) -> None:
    """Tracing with fixed arguments leaves fx's checks that they keep their values; :mod:`cnncomp.graph.arguments` has its
    own."""
    read: set[fx.Node] = set()  # by the checks
    for node in reversed(list(gm.graph.nodes)):
        check = node.op == "call_function" and _name(node) in ("_assert", "_assert_is_none")
        compared = node.op == "call_function" and node.target is operator.eq and node in read
        if check or (not node.users and compared):
            read.update(node.all_input_nodes)
            gm.graph.erase_node(node)


def _by_position(gm: fx.GraphModule) -> None:
    """``self.conv(input=x)`` as ``self.conv(x)``."""
    for node in gm.graph.nodes:
        if node.op == "call_module" and node.kwargs and not has_user_hooks(module := module_at(gm, node)):
            args = positional(module, node.args, node.kwargs)
            if args is not None:
                node.args, node.kwargs = args, {}


def _mutates(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` changes its first input in place."""
    if node.op == "call_module":
        return bool(getattr(module_at(gm, node), "inplace", False))
    if node.op == "call_method":
        return _name(node).endswith("_") and not _name(node).endswith("__")
    if node.op != "call_function":
        return False
    if node.target in _OUT_OF_PLACE or node.target in (operator.setitem, setattr) or _name(node).endswith("_"):
        return True
    return _inplace_argument(node) is not None


def _inplace_argument(node: fx.Node) -> int | str | None:
    """Where a call like ``F.relu(x, True)`` or ``F.relu(x, inplace=True)`` says so."""
    if node.kwargs.get("inplace"):
        return "inplace"
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    at = names.index("inplace") if "inplace" in names else len(node.args)
    return at if at < len(node.args) and node.args[at] else None


def _out_of_place(gm: fx.GraphModule) -> None:
    """Mutations become values: who read the mutated tensor afterwards reads the result instead."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in [n for n in gm.graph.nodes if _mutates(gm, n)]:
        target = next(iter(node.all_input_nodes), None)
        if target is None or target.op == "get_attr" or _name(target) in _VIEWS:
            raise CannotNormalize(f"{_name(node)} changes {target} in place")
        if any(_name(user) in _VIEWS and user is not node and order[user] < order[node] for user in target.users):
            raise CannotNormalize(f"{_name(node)} changes {target} in place, of which there is a view")
        _make_out_of_place(gm, node)
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)


def _make_out_of_place(gm: fx.GraphModule, node: fx.Node) -> None:
    if node.op == "call_module":
        module = module_at(gm, node)
        if has_user_hooks(module):
            raise CannotNormalize(f"{node.target} changes its input in place and has hooks")
        # A copy: where the graph is given up, the module must still do in its own place what it did.
        twin = copy.copy(module)
        twin.inplace = False  # type: ignore[assignment]
        put_module(gm, node, twin)
    elif node.op == "call_method" and hasattr(Tensor, _name(node)[:-1]):
        node.target = _name(node)[:-1]
    elif node.op == "call_function" and node.target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[node.target]
    elif node.op == "call_function" and (at := _inplace_argument(node)) is not None:
        if isinstance(at, str):
            node.kwargs = {**node.kwargs, at: False}
        else:
            node.update_arg(at, False)
    else:
        raise CannotNormalize(f"{_name(node)} changes a tensor in place")


#: Functions that drop something in training only, and their arguments. torchvision's, which is not traced into, goes by name.
_DROPPING: dict[Any, tuple[str, ...]] = {
    F.dropout: ("p", "training", "inplace"),
    F.dropout1d: ("p", "training", "inplace"),
    F.dropout2d: ("p", "training", "inplace"),
    ("torchvision.ops.stochastic_depth", "stochastic_depth"): ("p", "mode", "training"),
}


def _is_identity(gm: fx.GraphModule, node: fx.Node) -> bool:
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module":
        module = module_at(gm, node)
        return type(module) in _IDENTITIES and not has_user_hooks(module)
    if node.op != "call_function":
        return False
    names = _DROPPING.get(node.target) or _DROPPING.get((getattr(node.target, "__module__", ""), _name(node)))
    if names is None:
        return False
    given = dict(zip(names, arguments(node, names, (None, True, None)), strict=True))
    return given["training"] is False


def _drop_identities(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if _is_identity(gm, node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)


def _tolerate_layouts(gm: fx.GraphModule) -> None:
    """Fused layers may return channels_last where torch's gave contiguous tensors: ``view`` becomes ``reshape``, and
    modules that are not torch's own, or that have hooks, get contiguous inputs."""
    for node in list(gm.graph.nodes):
        if node.op == "call_method" and node.target == "view":
            sizes = node.args[1:] or ((node.kwargs["size"],) if "size" in node.kwargs else ())
            if sizes and not isinstance(sizes[0], torch.dtype):
                node.target, node.args, node.kwargs = "reshape", (node.args[0], *sizes), {}
        if node.op != "call_module":
            continue
        module = module_at(gm, node)
        if type(module).__module__.startswith(
            ("torch.nn", "cnncomp.nn", "cnncomp.quantization")
        ) and not has_user_hooks(module):
            continue
        for arg in node.all_input_nodes:
            if "shape" in arg.meta:
                with gm.graph.inserting_before(node):
                    fixed = gm.graph.call_method("contiguous", (arg,))
                fixed.meta.update(arg.meta)
                node.replace_input_with(arg, fixed)
