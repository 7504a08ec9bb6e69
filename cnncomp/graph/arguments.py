"""Arguments of forwards. A graph holds one branch of the code: optional arguments that it branches on are fixed at their
defaults."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
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
    """The arguments of a call of ``module``, all by position; None where they can't be. What is left out before one that is
    given gets its default."""
    if not kwargs:
        return args
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return None
    ordered = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    last = max((i for i, p in enumerate(ordered) if p.name in bound.arguments), default=0)
    for p in ordered[:last]:
        bound.arguments.setdefault(p.name, p.default)
    return None if bound.kwargs else bound.args


def by_name(module: nn.Module, given: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Example inputs by the names of the forward's parameters, all by position; None where no key is such a name.

    Raises:
        ArgumentError: some keys are names of parameters, but others are not, one is missing, or one has no position.
    """
    if (found := positional(module, (), dict(given))) is not None:
        return found
    try:
        every = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    named = {p.name: p for p in every if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if not named.keys() & given.keys():
        return None
    keyword_only = {name for name, p in named.items() if p.kind == p.KEYWORD_ONLY}
    parts = {
        "no parameter": [key for key in given if key not in named],
        "missing": [name for name, p in named.items() if p.default is p.empty and name not in given],
        "keyword-only": [key for key in given if key in keyword_only],
    }
    got = "; ".join(f"{', '.join(map(repr, keys))} {what}" for what, keys in parts.items() if keys)
    names = [name for name in named if name not in keyword_only]
    expected = f"the names of positional parameters, {names} (a mapping that is itself an argument: in a tuple)"
    raise ArgumentError("example_inputs", f"a mapping ({got or 'by position only'})", expected)


def optional_arguments(module: nn.Module, given: tuple[Any, ...]) -> dict[str, Any]:
    """Parameters of the module's forward that are left out of ``given``, or given as what they are then: their defaults."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    left = [p for i, p in enumerate(parameters) if i >= len(given) or given[i] is p.default]
    return {p.name: p.default for p in left if p.default is not p.empty}


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
