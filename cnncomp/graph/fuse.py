"""Fusion: conv or linear, BatchNorm, residual add and activation become one layer with one epilogue."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cnncomp._norms import BatchNorm, fold_batch_norm
from cnncomp.errors import ArgumentError
from cnncomp.graph.nodes import cloned, has_user_hooks, input_node, module_at, put_module
from cnncomp.graph.normalize import normalize
from cnncomp.nn import (
    Activation,
    ChannelAffine,
    Clamp,
    ConvertedLayer,
    DenseConv2d,
    DenseLinear,
    Geometry,
    LayerInfo,
    QuantSpec,
    dequantize_weight,
    quantize_weight,
)
from cnncomp.nn.base import INF
from cnncomp.ops.reference import ACTIVATIONS as EPILOGUE_ACTIVATIONS
from cnncomp.quantization import ClampChannels, quantization_of

#: Why a layer stays whose parts the graph refers to.
READ_ELSEWHERE = "has weights that the forward reads by itself"

_CONVS = (nn.Conv1d, nn.Conv2d)
_ADDS: tuple[Any, ...] = (operator.add, torch.add, "add")
_RELUS: tuple[Any, ...] = (F.relu, torch.relu, "relu")
_CLAMPS: tuple[Any, ...] = (torch.clamp, torch.clip, "clamp", "clip")
_FUNCTIONAL = {F.conv1d, F.conv2d, F.linear, torch.conv1d, torch.conv2d}


class _Recorder(fx.Interpreter):
    """Runs a graph and notes each node's shape and dtype in ``node.meta``."""

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            n.meta["shape"], n.meta["dtype"] = tuple(out.shape), out.dtype
        return out


def fuse(
    gm: fx.GraphModule,
    example_inputs: tuple[Any, ...],
    why_kept: Callable[[nn.Module], str | None],
    full_name: Callable[[str], str],
) -> dict[str, str]:
    """Fuse ``gm`` in place; its convolutions and linears become :class:`DenseConv2d` and :class:`DenseLinear`.

    Args:
        why_kept: why a layer may not be touched, or None.
        full_name: from a name in ``gm`` to the name in the user's model.

    Returns:
        Layers left as they are, by full name, with the reason.
    """
    with torch.no_grad():
        _Recorder(gm).run(*cloned(example_inputs))
    normalize(gm)
    calls = Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_module")
    taken_apart = _taken_apart(gm)
    kept: dict[str, str] = {}
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in _FUNCTIONAL:
            kept[full_name(node.name)] = "is called as a function, with weights that are not a layer's"
        if node.op != "call_module":
            continue
        module, name = module_at(gm, node), full_name(str(node.target))
        if isinstance(module, (*_CONVS, nn.Linear)):
            reason = why_kept(module)
            if calls[str(node.target)] > 1:
                reason = "is called more than once"
            if node.target in taken_apart:
                reason = READ_ELSEWHERE
            if reason is None:
                reason = _fuse_layer(gm, node, module, name, calls)
            if reason is not None:
                kept[name] = reason
        elif type(module) is nn.BatchNorm2d:
            _fuse_norm(gm, node, module, calls)
        elif isinstance(module, ConvertedLayer):
            module.info.name = module.info.name or name
        elif has_user_hooks(module):
            kept[name] = "has hooks"
        elif _has_weights(module):
            kept[name] = f"{type(module).__name__} has no compressed kernel"
    gm.graph.lint()
    gm.delete_all_unused_submodules()
    gm.recompile()
    return kept


def _taken_apart(gm: fx.GraphModule) -> set[str]:
    """Modules of which the graph reads or calls a part, as in ``F.conv2d(x, self.conv.weight)``: all outer paths."""
    paths = [str(n.target).split(".") for n in gm.graph.nodes if n.op in ("get_attr", "call_module")]
    return {".".join(path[:i]) for path in paths for i in range(1, len(path))}


def _has_weights(module: nn.Module) -> bool:
    return any(p.dim() > 1 for p in module.parameters())


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _target_in(node: fx.Node, table: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and any(node.target is t or node.target == t for t in table)


def _batch_norm_after(
    gm: fx.GraphModule, node: fx.Node, layer: nn.Module, calls: Counter[str]
) -> tuple[fx.Node, BatchNorm] | None:
    """The BatchNorm that alone reads ``node``, if its running statistics make it an affine map per output channel."""
    user = _only_user(node)
    if user is None or user.op != "call_module" or calls[str(user.target)] > 1:
        return None
    norm = module_at(gm, user)
    if not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) or type(norm).__module__ != "torch.nn.modules.batchnorm":
        return None
    if norm.running_mean is None or has_user_hooks(norm):
        return None
    if isinstance(layer, nn.Linear) and len(node.meta.get("shape", ())) != 2:
        return None  # BatchNorm1d normalises dimension 1, which is the layer's output only if there are two
    return user, norm


def _fuse_norm(gm: fx.GraphModule, node: fx.Node, norm: nn.BatchNorm2d, calls: Counter[str]) -> None:
    """Replace a BatchNorm of images that no layer took in, and the clamp behind it, by one affine map of each channel."""
    if (
        has_user_hooks(norm)
        or norm.running_mean is None
        or calls[str(node.target)] > 1
        or len(node.all_input_nodes) != 1
    ):
        return
    if len(node.meta.get("shape", ())) != 4 or node.meta.get("dtype") != torch.float32:
        return
    last, activation = node, Clamp()
    user = _only_user(node)
    clamp = None if user is None else activation_of(gm, user)
    if user is not None and clamp is not None and not isinstance(clamp.hi, tuple):
        last, activation = user, clamp
    put_module(gm, node, ChannelAffine.of(norm, activation))
    if last is not node:
        last.replace_all_uses_with(node)
        gm.graph.erase_node(last)


def activation_of(gm: fx.GraphModule, node: fx.Node) -> Clamp | None:
    """The clamp that ``node`` computes, or None."""
    if node.op == "call_module":
        module = module_at(gm, node)
        if has_user_hooks(module):
            return None
        if type(module) is nn.ReLU:
            return Clamp(0.0)
        if isinstance(module, nn.Hardtanh) and type(module) in (nn.ReLU6, nn.Hardtanh):
            return Clamp(float(module.min_val), float(module.max_val))
        if type(module) is ClampChannels:
            return Clamp(module.lo, tuple(module.hi.tolist()))
        return None
    if _target_in(node, _RELUS):
        return Clamp(0.0)
    if _target_in(node, (F.relu6,)):
        return Clamp(0.0, 6.0)
    if _target_in(node, (F.hardtanh,)):
        return _bounds(node, ("min_val", "max_val"), (-1.0, 1.0))
    return _bounds(node, ("min", "max"), (None, None)) if _target_in(node, _CLAMPS) else None


def nonlinearity_of(gm: fx.GraphModule, node: fx.Node) -> str:
    """ "silu" or "hardswish" if that is what ``node``, of a normalised graph, computes, else ""."""
    module = module_at(gm, node) if node.op == "call_module" else None
    return module.kind if type(module) is Activation and module.kind in EPILOGUE_ACTIVATIONS else ""


def _worth_fusing(nonlinearity: str, device: torch.device) -> bool:
    """Whether an int8 layer had better end in it. SiLU by the epilogue's steps, whose bits are the same everywhere, takes a CPU
    longer than floats through a kernel of their own, and quantising them."""
    return nonlinearity == "hardswish" or (nonlinearity == "silu" and device.type == "cuda")


def _bounds(node: fx.Node, names: tuple[str, str], defaults: tuple[float | None, float | None]) -> Clamp | None:
    """The numbers that a clamp was called with, by position or by name."""
    given: dict[str, Any] = {**dict(zip(names, defaults, strict=True)), **dict(zip(names, node.args[1:], strict=False))}
    given.update(node.kwargs)
    lo, hi = (given[name] for name in names)
    if len(node.args) > 3 or not all(v is None or isinstance(v, (int, float)) for v in (lo, hi)):
        return None
    return Clamp(-INF if lo is None else float(lo), INF if hi is None else float(hi))


def _from_input(node: fx.Node, seen: set[fx.Node]) -> bool:
    """Whether the node's value depends on the network's input, so that its batch is the network's."""
    if node in seen:
        return False
    seen.add(node)
    return node.op == "placeholder" or any(_from_input(n, seen) for n in node.all_input_nodes)


def _residual_of(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """The other operand, if ``user`` adds a tensor of the same shape and dtype to ``node``."""
    if not _target_in(user, _ADDS) or len(user.args) != 2 or user.kwargs:
        return None
    a, b = user.args
    other = b if a is node else a
    if not isinstance(other, fx.Node) or other is node or not _from_input(other, set()):
        return None
    same = all(other.meta.get(key) == node.meta.get(key) for key in ("shape", "dtype"))
    return other if same and "shape" in node.meta else None


def _fuse_layer(gm: fx.GraphModule, node: fx.Node, layer: nn.Module, name: str, calls: Counter[str]) -> str | None:
    """Replace ``node`` and what can be fused behind it by one dense layer; the reason if that can't be."""
    assert isinstance(layer, (*_CONVS, nn.Linear))
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return "is called with more than its input"
    if node.meta.get("dtype") != torch.float32:
        return "does not run in float32"
    if isinstance(layer, _CONVS) and len(node.meta["shape"]) != (3 if isinstance(layer, nn.Conv1d) else 4):
        return "runs without a batch dimension"
    try:
        geometry = Geometry.of(layer) if isinstance(layer, _CONVS) else None
    except ArgumentError as error:
        return str(error)
    quantized = quantization_of(layer)
    weight, bias = layer.weight.detach(), layer.bias
    weight_scale = None if quantized is None else quantized.weight_scale.detach().clone()
    weight_shift = None if quantized is None else quantized.weight_shift
    last, dead = node, []
    if (found := _batch_norm_after(gm, node, layer, calls)) is not None:
        last, norm = found
        weight, bias, factor = fold_batch_norm(weight, bias, norm)
        weight_scale = None if weight_scale is None else weight_scale * factor.abs()
        weight_shift = None if weight_shift is None else weight_shift * factor
        dead.append(node)
    if weight_scale is not None:  # what folding rounded is put back on the grid: a file can hold the integers
        q, weight_scale = quantize_weight(weight, weight_scale, weight_shift)
        weight = dequantize_weight(q, weight_scale, weight_shift)
    residual = None
    if (user := _only_user(last)) is not None and (other := _residual_of(user, last)) is not None:
        residual = other
        dead.append(last)
        last = user
    activation, nonlinearity = Clamp(), ""
    if (user := _only_user(last)) is not None:
        clamp = activation_of(gm, user)
        nonlinearity = nonlinearity_of(gm, user)
        if quantized is None or not _worth_fusing(nonlinearity, weight.device):
            nonlinearity = ""
        if clamp is not None or nonlinearity:
            activation = clamp or activation
            dead.append(last)
            last = user
    dense: ConvertedLayer
    if geometry is not None:
        g = geometry
        weight4d = weight.reshape(g.out_channels, -1, *g.kernel_size)
        dense = DenseConv2d(g, weight4d, bias, activation, nonlinearity=nonlinearity)
    else:
        dense = DenseLinear(weight, bias, activation, nonlinearity=nonlinearity)
    dense.info = LayerInfo(name, pattern_of(weight))
    if quantized is not None:
        dense.info.input = QuantSpec(quantized.input_scale, quantized.input_dtype)
        dense.info.weight_scale = weight_scale
        dense.info.weight_shift = None if weight_shift is None else weight_shift.detach().clone()
    _replace(gm, last, dead, node, dense, residual)
    return None


def pattern_of(weight: Tensor) -> str:
    """ "unstructured 90 %" for a weight with at least one zero in a hundred, else "dense"."""
    zeros = 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
    return f"unstructured {zeros:.0%}" if zeros >= 0.01 else "dense"


def _replace(
    gm: fx.GraphModule,
    last: fx.Node,
    dead: list[fx.Node],
    node: fx.Node,
    dense: ConvertedLayer,
    residual: fx.Node | None,
) -> None:
    """Put ``dense`` in the place of ``last`` (where both of its inputs exist) and erase what it stands for."""
    x = input_node(node, 0)
    put_module(gm, node, dense)
    with gm.graph.inserting_before(last):
        new = gm.graph.call_module(str(node.target), (x,) if residual is None else (x, residual))
    new.meta.update(last.meta)
    last.replace_all_uses_with(new)
    for n in [last, *reversed(dead)]:
        gm.graph.erase_node(n)
