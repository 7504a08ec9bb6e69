"""Functions that this package has kernels for, and torch's modules that are such, as modules of ours."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from cnncomp.graph.nodes import has_user_hooks, module_at, put_module
from cnncomp.graph.operations import CONCATENATING, arguments
from cnncomp.nn import Activation, ConcatChannels, MeanPool2d, QuantMaxPool2d, ScaleChannels

_MAX_POOLS: tuple[Any, ...] = (F.max_pool2d, torch.max_pool2d)
_MEANS: tuple[Any, ...] = (torch.mean, "mean")
_PRODUCTS: tuple[Any, ...] = (operator.mul, torch.mul, "mul")
_ACTIVATIONS: dict[Any, str] = {
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    "sigmoid": "sigmoid",
    F.silu: "silu",
    F.hardsigmoid: "hardsigmoid",
    F.hardswish: "hardswish",
}


def as_modules(gm: fx.GraphModule) -> None:
    """Rewrite ``gm``, whose nodes know their shapes, in place: max-pools, means over all pixels, sigmoids and their kin, and
    products with a factor for each channel become modules. What they were called with must be constant."""
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            module = module_at(gm, node)
            if not has_user_hooks(module) and (ours := _twin(module)) is not None:
                put_module(gm, node, ours)
        elif node.op in ("call_function", "call_method") and (found := _module_for(node)) is not None:
            _call(gm, node, *found)


def _twin(module: nn.Module) -> nn.Module | None:
    """The module of ours that does the same as one of torch's."""
    if MeanPool2d.applies(module):
        return MeanPool2d()
    return QuantMaxPool2d.from_float(module) if QuantMaxPool2d.applies(module) else Activation.of(module)


def _module_for(node: fx.Node) -> tuple[nn.Module, list[fx.Node], bool] | None:
    """The module, its inputs, and whether the result is to be flattened to (N, C)."""
    inputs = node.all_input_nodes
    if len(inputs) == 1 and node.args[:1] == (inputs[0],):
        if node.target in _MAX_POOLS:
            pool = _max_pool(node)
            return None if pool is None else (pool, inputs, False)
        if node.target in _ACTIVATIONS and not node.args[1:] and not any(node.kwargs.values()):
            return Activation(_ACTIVATIONS[node.target]), inputs, False
        return _mean_pool(node)
    if node.target in CONCATENATING:
        return _concat(node)
    if node.target in _PRODUCTS and len(inputs) == len(node.args) == 2 and not node.kwargs:
        x, scale = sorted(inputs, key=_pixels, reverse=True)
        if (
            len(shape := _shape(x)) == 4
            and _shape(scale) == (*shape[:2], 1, 1)
            and _pixels(x) > 1
            and _are_float(inputs)
        ):
            return ScaleChannels(), [x, scale], False
    return None


def _shape(node: fx.Node) -> tuple[int, ...]:
    return node.meta.get("shape", ())


def _pixels(node: fx.Node) -> int:
    shape = _shape(node)
    return shape[2] * shape[3] if len(shape) == 4 else 0


def _are_float(nodes: list[fx.Node]) -> bool:
    return all(node.meta.get("dtype") == torch.float32 for node in nodes)


def _concat(node: fx.Node) -> tuple[nn.Module, list[fx.Node], bool] | None:
    """Channels of float images one behind the other; the same image may come twice."""
    given, dim = arguments(node, ("tensors", "dim"), (None, 0), method=False)
    if not isinstance(given, (tuple, list)) or not all(isinstance(x, fx.Node) for x in given):
        return None
    images = all(len(_shape(x)) == 4 for x in given) and _are_float(list(given))
    return (ConcatChannels(), list(given), False) if images and dim in (1, -3) else None


def _max_pool(node: fx.Node) -> QuantMaxPool2d | None:
    names = ["kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"]
    given: dict[str, Any] = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    if not set(given) <= set(names) or given.get("return_indices"):
        return None
    return QuantMaxPool2d(**given)


def _mean_pool(node: fx.Node) -> tuple[nn.Module, list[fx.Node], bool] | None:
    """A mean over all pixels of images (N, C, H, W)."""
    inputs = node.all_input_nodes
    if len(_shape(inputs[0])) != 4 or not _are_float(inputs):
        return None
    if node.target is F.adaptive_avg_pool2d:
        (size,) = arguments(node, ("output_size",), (None,))
        return (MeanPool2d(), inputs, False) if size in (1, (1, 1), [1, 1]) else None
    if node.target not in _MEANS or not set(node.kwargs) <= {"dim", "keepdim"}:
        return None
    dims, keepdim = arguments(node, ("dim", "keepdim"), (None, False))
    if not isinstance(dims, (tuple, list)) or sorted(d % 4 for d in dims if isinstance(d, int)) != [2, 3]:
        return None
    return MeanPool2d(), inputs, not keepdim


def _call(gm: fx.GraphModule, node: fx.Node, module: nn.Module, inputs: list[fx.Node], flat: bool) -> None:
    """Put a call of ``module`` in the place of ``node``."""
    path = f"{node.name}_module"
    gm.add_submodule(path, module)
    with gm.graph.inserting_before(node):
        new = gm.graph.call_module(path, tuple(inputs))
        if flat:
            new.meta.update(node.meta, shape=(*_shape(inputs[0])[:2], 1, 1))
            new = gm.graph.call_function(torch.flatten, (new, 1))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
