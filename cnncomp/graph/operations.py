"""Tables: the operations that channels, and the images of a batch, are followed through."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_CHANNELWISE_MODULES = frozenset(
    {
        nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
        nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish, nn.Tanh, nn.Softplus, nn.Softsign,
        nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
        nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
        nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
        nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
        nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
        nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
    }
)  # fmt: skip

#: Each channel of the result comes from the same channel of the first argument; its place does not change.
CHANNELWISE: frozenset[Any] = frozenset(
    {
        torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.clip, torch.abs, torch.exp, torch.sqrt, torch.square,
        torch.neg, operator.neg, F.relu, F.relu_, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish,
        F.sigmoid, F.hardsigmoid, F.hardswish, F.tanh, F.softplus, F.dropout, F.dropout2d, torch.dropout,
        F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
        F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
        F.interpolate, F.pad,
        "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "clamp", "clamp_", "abs", "exp", "sqrt", "square", "neg",
        "contiguous", "clone", "detach", "float", "double", "half", "to",
    }
)  # fmt: skip

#: Elementwise on two tensors, or a tensor and a number.
COMBINING: frozenset[Any] = frozenset(
    {
        operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub, operator.imul,
        torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum,
        "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_",
    }
)  # fmt: skip
CONCATENATING: frozenset[Any] = frozenset({torch.cat, torch.concat, torch.concatenate})
FLATTENING: frozenset[Any] = frozenset({torch.flatten, "flatten"})
RESHAPING: frozenset[Any] = frozenset({torch.reshape, "reshape", "view"})
REDUCING: frozenset[Any] = frozenset({torch.mean, torch.sum, torch.amax, torch.amin, "mean", "sum", "amax", "amin"})
PERMUTING: frozenset[Any] = frozenset({torch.permute, torch.transpose, "permute", "transpose"})
SQUEEZING: frozenset[Any] = frozenset({torch.squeeze, torch.unsqueeze, "squeeze", "unsqueeze"})
CHUNKING: frozenset[Any] = frozenset({torch.chunk, "chunk"})
INDEXING: frozenset[Any] = frozenset({operator.getitem})


def is_channelwise(module: nn.Module) -> bool:
    """Whether the module works on each channel alone and has no parameters for it."""
    if type(module) in _CHANNELWISE_MODULES:
        return not getattr(module, "return_indices", False)
    return type(module) is nn.PReLU and module.num_parameters == 1


def reads_shape(target: Any, rest: tuple[Any, ...]) -> bool:
    """Whether the operation asks a tensor for nothing but its shape, dtype or device."""
    if target is getattr:
        return rest[:1] in (("shape",), ("ndim",), ("dtype",), ("device",))
    return target in ("size", "dim", "numel", "ndimension")


def channel_dim(module: nn.Module, ndim: int) -> int | None:
    """The dimension of an ``ndim``-dimensional input that holds the layer's channels; None without a batch dimension."""
    if isinstance(module, nn.Linear):
        return ndim - 1 if ndim > 1 else None
    spatial = {
        nn.Conv1d: 1,
        nn.Conv2d: 2,
        nn.Conv3d: 3,
        nn.InstanceNorm1d: 1,
        nn.InstanceNorm2d: 2,
        nn.InstanceNorm3d: 3,
    }
    wanted = next((d for cls, d in spatial.items() if isinstance(module, cls)), None)
    if wanted is not None:
        return 1 if ndim == wanted + 2 else None
    return 1 if ndim > 1 else None


def arguments(node: fx.Node, names: tuple[str, ...], defaults: tuple[Any, ...], method: bool = True) -> list[Any]:
    """What an operation was called with, by position (behind the tensor, where ``method``) or by name."""
    given = {**dict(zip(names, defaults, strict=True)), **dict(zip(names, node.args[method:], strict=False))}
    given.update({k: v for k, v in node.kwargs.items() if k in names})
    return [given[name] for name in names]


def sizes(node: fx.Node) -> tuple[Any, ...] | None:
    """The sizes that a view was asked for; None where they are computed as a whole."""
    given = node.args[1:] or tuple(node.kwargs.values())
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        return tuple(given[0])
    if len(given) == 1 and isinstance(given[0], fx.Node):
        return None
    return tuple(given)


def dimension_order(node: fx.Node, ndim: int) -> list[int] | None:
    """For a permutation or transposition, the input's dimension at each place of the result; None where it is not written
    as numbers."""
    given = node.args[1:]
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = tuple(given[0])
    dims = [d % ndim for d in given if isinstance(d, int)]
    if len(dims) != len(given):
        return None
    if node.target in (torch.permute, "permute"):
        return dims
    order = list(range(ndim))
    a, b = dims
    order[a], order[b] = b, a
    return order
