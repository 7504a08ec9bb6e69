"""fx graphs as JSON and back. Whatever a graph may call stands in the tables here; a file can name nothing else."""

from __future__ import annotations

import builtins
import keyword
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from cnncomp.errors import SerializationError
from cnncomp.graph.arguments import require_default

_TORCH = """
abs add addmm amax amin arange argmax argmin baddbmm bmm cat ceil chunk clamp clip clone concat conv1d conv2d cos
cumsum div einsum empty eq exp eye flatten flip floor floor_divide full full_like gather ge gt index_select
layer_norm le log log_softmax lt masked_fill matmul max maximum mean min minimum mm mul narrow ne neg norm ones
ones_like permute pow prod reciprocal relu relu_ remainder repeat_interleave reshape roll round rsqrt rsub select
sigmoid sign sin softmax split sqrt square squeeze stack std sub sum tanh tile topk transpose tril triu unbind
unflatten unsqueeze var where zeros zeros_like
"""

_FUNCTIONAL = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d avg_pool1d avg_pool2d batch_norm
celu conv1d conv2d conv_transpose1d conv_transpose2d dropout dropout1d dropout2d elu elu_ embedding gelu glu
group_norm hardsigmoid hardswish hardtanh hardtanh_ instance_norm interpolate layer_norm leaky_relu leaky_relu_
linear local_response_norm log_softmax logsigmoid lp_pool2d max_pool1d max_pool2d mish normalize one_hot pad
pixel_shuffle pixel_unshuffle prelu relu relu6 relu_ scaled_dot_product_attention selu sigmoid silu softmax softmin
softplus softsign tanh unfold upsample
"""

_OPERATOR = """
abs add and_ eq floordiv ge getitem gt iadd iand ifloordiv imatmul imod imul invert ior ipow isub itruediv le lt
matmul mod mul ne neg not_ or_ pos pow sub truediv xor
"""

#: Every function that a graph may call, by the name that stands in files.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH.split()},
    **{f"torch.nn.functional.{name}": getattr(F, name) for name in _FUNCTIONAL.split()},
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATOR.split()},
    "builtins.getattr": builtins.getattr,
    "cnncomp.require_default": require_default,
}
_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}

_METHODS = """
abs add add_ amax amin argmax argmin bfloat16 bmm ceil chunk clamp clamp_ clamp_max clamp_min clip clone contiguous cos cumsum
detach dim div div_ double eq exp expand expand_as flatten flip float floor gather ge gt half index_select int le
log log_softmax long lt masked_fill matmul max mean min mm mul mul_ narrow ne neg new_full new_ones new_zeros norm
numel permute pow prod reciprocal relu relu_ repeat repeat_interleave reshape reshape_as roll round rsqrt select
sigmoid sigmoid_ sign sin size softmax split sqrt square squeeze std sub sub_ sum t tanh tile to topk transpose
type_as unbind unflatten unfold unsqueeze var view view_as where
"""

#: Every method of a tensor that a graph may call.
METHODS = frozenset(_METHODS.split())

#: What a graph may read of a tensor by ``getattr``.
ATTRIBUTES = frozenset(("T", "device", "dtype", "mT", "ndim", "requires_grad", "shape"))

DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool,
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    )
}  # fmt: skip
_MEMORY_FORMATS = {
    str(m).removeprefix("torch."): m for m in (torch.contiguous_format, torch.channels_last, torch.preserve_format)
}
_OPS = ("placeholder", "get_attr", "call_module", "call_function", "call_method", "output")

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z", re.ASCII)
_SEGMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*|[0-9]+)\Z", re.ASCII)
# What a module path may not shadow.
_RESERVED = frozenset(dir(nn.Module)) | frozenset(vars(nn.Module()))
_RESERVED_AT_ROOT = _RESERVED | frozenset(dir(fx.GraphModule)) | frozenset(("_graph", "_code"))


def check_identifier(name: Any) -> str:
    """``name``, if it is one that may stand in generated code.

    Raises:
        ValueError: it isn't.
    """
    if not isinstance(name, str) or not _IDENTIFIER.match(name) or keyword.iskeyword(name):
        raise ValueError(f"{name!r} can't be the name of a node")
    return name


def check_path(path: Any) -> str:
    """``path``, if it can be that of a module or tensor in a network ("layer1.0.conv1").

    Raises:
        ValueError: it can't.
    """
    segments = path.split(".") if isinstance(path, str) else []
    reserved = [s for i, s in enumerate(segments) if s in (_RESERVED if i else _RESERVED_AT_ROOT)]
    if not segments or reserved or not all(_SEGMENT.match(s) and not keyword.iskeyword(s) for s in segments):
        raise ValueError(f"{path!r} can't be the path of a module")
    return str(path)


def check_disjoint(paths: set[str]) -> None:
    """Raise ValueError if one of ``paths`` lies inside another."""
    for path in paths:
        parts = path.split(".")
        for i in range(1, len(parts)):
            if (outer := ".".join(parts[:i])) in paths:
                raise ValueError(f"{path!r} lies inside {outer!r}, which is a module of its own")


def encode_value(value: Any) -> Any:
    """JSON form of an argument: plain values as they are, all others as an object with one key, the kind.

    Raises:
        ValueError: a kind of value that files don't hold.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        items = [encode_value(v) for v in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict) and all(type(k) is str for k in value):
        return {"dict": {k: encode_value(v) for k, v in value.items()}}
    if isinstance(value, slice):
        return {"slice": [encode_value(v) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    kinds = ((torch.dtype, "dtype"), (torch.memory_format, "memory_format"), (torch.device, "device"))
    for cls, kind in kinds:
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise ValueError(f"a value of type {type(value).__name__} has no form in a file")


def decode_value(value: Any, nodes: dict[str, fx.Node]) -> Any:
    """The inverse of :func:`encode_value`, with ``nodes`` by the names in the file.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: JSON that :func:`encode_value` did not write.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode_value(v, nodes) for v in value]
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(decode_value(v, nodes) for v in content)
    if kind == "dict":
        return {k: decode_value(v, nodes) for k, v in content.items()}
    if kind == "slice":
        start, stop, step = (decode_value(v, nodes) for v in content)
        return slice(start, stop, step)
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "dtype":
        return DTYPES[content]
    if kind == "memory_format":
        return _MEMORY_FORMATS[content]
    if kind == "device" and isinstance(content, str):
        return torch.device(content)
    if kind == "ellipsis":
        return Ellipsis
    raise ValueError(f"a value of the unknown kind {kind!r}")


def encode_graph(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes in order, each as ``{"op", "name", "target", "args", "kwargs"}``.

    Raises:
        SerializationError: a call that is not in the tables, or an argument that has no form in a file; names the node.
    """
    encoded = []
    for node in graph.nodes:
        target = node.target
        if node.op == "call_function":
            if target not in _FUNCTION_NAMES:
                name = getattr(target, "__qualname__", str(target))
                raise SerializationError(
                    f"node {node.name!r} calls {getattr(target, '__module__', None)}.{name}, which can't be saved: "
                    "express it with functions of torch, or save the model with torch.export"
                )
            target = _FUNCTION_NAMES[target]
        args, kwargs = list(node.args), dict(node.kwargs)
        try:
            new = {
                "op": node.op,
                "name": node.name,
                "target": target,
                "args": [encode_value(a) for a in args],
                "kwargs": {k: encode_value(v) for k, v in kwargs.items()},
            }
            _check_node(new)
        except ValueError as error:
            raise SerializationError(f"node {node.name!r} of the network can't be saved: {error}") from error
        encoded.append(new)
    return encoded


def _check_node(node: dict[str, Any]) -> None:
    """Raise ValueError unless a node in JSON form is one that may be built."""
    op, target, args, kwargs = (node[key] for key in ("op", "target", "args", "kwargs"))
    if op not in _OPS or not isinstance(target, str) or not isinstance(args, list) or not isinstance(kwargs, dict):
        raise ValueError(f"a node of the unknown form {op!r}")
    check_identifier(node["name"])
    for key in kwargs:
        check_identifier(key)
    if op == "placeholder":
        check_identifier(target[len(target) - len(target.lstrip("*")) :])
        if len(target) - len(target.lstrip("*")) > 2:
            raise ValueError(f"an argument {target!r}")
    elif op in ("get_attr", "call_module"):
        check_path(target)
    elif op == "call_function" and target not in FUNCTIONS:
        raise ValueError(f"a call of the unknown function {target!r}")
    elif op == "call_method" and (target not in METHODS or not args or not _is_node(args[0])):
        raise ValueError(f"the method {target!r} can't be called from a file")
    if target == "builtins.getattr" and op == "call_function":
        plain = len(args) == 2 and not kwargs and _is_node(args[0]) and isinstance(args[1], str)
        if not plain or args[1] not in ATTRIBUTES:
            raise ValueError(f"the attribute {args[1:]!r} can't be read from a file")


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and list(value) == ["node"]


def decode_graph(encoded: Any) -> fx.Graph:
    """The graph of :func:`encode_graph`.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: JSON that :func:`encode_graph` did not write.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    if not encoded or [n["op"] for n in encoded].count("output") != 1 or encoded[-1]["op"] != "output":
        raise ValueError("a graph without one output at its end")
    for node in encoded:
        _check_node(node)
        op, name, target = node["op"], node["name"], node["target"]
        if name in nodes:
            raise ValueError(f"two nodes named {name!r}")
        args = tuple(decode_value(a, nodes) for a in node["args"])
        kwargs = {k: decode_value(v, nodes) for k, v in node["kwargs"].items()}
        nodes[name] = graph.create_node(op, FUNCTIONS[target] if op == "call_function" else target, args, kwargs, name)
    graph.lint()
    return graph


def paths_of(encoded: list[dict[str, Any]], op: str) -> list[str]:
    """Targets of the nodes with that op, each once, in order."""
    return list(dict.fromkeys(node["target"] for node in encoded if node["op"] == op))
