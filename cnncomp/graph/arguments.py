"""Arguments of forwards. A graph holds one branch of the code: optional arguments that it branches on are fixed at their
defaults."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import fx, nn

from cnncomp.errors import ArgumentError


def require_default(value: Any, default: Any, name: str) -> None:
    """Stands in a graph for the branch that was taken.

    Raises:
        ArgumentError: ``value`` is not the ``default`` that the graph was traced with.
    """
    if value is not default and (type(value) is not type(default) or value != default):
        got = f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
        expected = f"{default!r}: the forward branches on it, so it was fixed at its default by cnncomp.convert"
        raise ArgumentError(name, got, expected)


def positional(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The arguments of a call of ``module``, all by position; None where they can't be."""
    if not kwargs:
        return args
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return None
    return None if bound.kwargs else bound.args


def optional_arguments(module: nn.Module, given: int) -> dict[str, Any]:
    """Parameters of the module's forward behind the first ``given``, with their defaults."""
    parameters = list(inspect.signature(module.forward).parameters.values())[given:]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def trace_with_fixed(tracer: fx.Tracer, root: nn.Module, fixed: dict[str, Any]) -> fx.GraphModule:
    """Trace ``root`` with some optional arguments at their defaults. They stay arguments of the graph, which takes no other
    value for them.

    Raises:
        Exception: whatever fx, or the model's own code on a proxy, raises.
    """
    graph = tracer.trace(root, fixed)
    names = set(inspect.signature(root.forward).parameters)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node in placeholders:
        name = re.sub(r"_\d+$", "", str(node.target))  # fx numbers the arguments that it fixes
        if node.target not in names and name in fixed:
            node.target = name
            with graph.inserting_after(placeholders[-1]):
                graph.call_function(require_default, (node, fixed[name], name))
    return fx.GraphModule(tracer.root, graph)
