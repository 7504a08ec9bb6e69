"""What pruning and quantisation share: the layers, their names, and our parametrizations of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from cnncomp.errors import ArgumentError, DeviceError

Layer: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Linear
LAYER_TYPES = (nn.Conv1d, nn.Conv2d, nn.Linear)


class WeightParametrization(nn.Module):
    """Base of cnncomp's parametrizations of ``weight``: a map that keeps shape, dtype and device."""

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is stored for an assignment to ``layer.weight``."""
        return weight


P = TypeVar("P", bound=WeightParametrization)


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """All Conv1d, Conv2d and Linear layers by name, in the order of ``model.named_modules()``, each once.

    Raises:
        ArgumentError: ``model`` is no module, or one of its layers is lazy and has no weight yet.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LAYER_TYPES)}
    for name, layer in layers.items():
        if isinstance(layer._parameters.get("weight"), UninitializedParameter):
            raise ArgumentError("model", f"the lazy layer {name!r}", "a model that has been run once")
    return layers


def select(names: Sequence[str], exclude: str | Sequence[str]) -> list[str]:
    """The names that no pattern matches. A pattern (:mod:`fnmatch`) also takes all that lies below the module it names.

    Raises:
        ArgumentError: a pattern matches nothing, which is a typing error more often than not.
    """
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    ancestors = {name: [".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 2)] for name in names}
    excluded: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if any(fnmatchcase(a, pattern) for a in ancestors[name])}
        if not hits:
            raise ArgumentError("exclude", repr(pattern), f"a pattern of layer names such as {list(names)[:3]}")
        excluded |= hits
    return [name for name in names if name not in excluded]


def check_fraction(argument: str, value: float | None, what: str) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is a number from 0 to 1, the fraction of ``what``."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise ArgumentError(argument, repr(value), f"a number from 0 to 1 (the fraction of {what})")


def resolve_device(device: str | torch.device) -> torch.device:
    """The device.

    Raises:
        DeviceError: one that is not there, or that cnncomp has no kernels for.
    """
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError("device", repr(device), "a device that torch knows") from error
    if resolved.type not in ("cpu", "cuda"):
        raise DeviceError("device", repr(device), "'cpu' or 'cuda'")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device", repr(device), "'cpu': torch finds no CUDA device here")
    return resolved


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each filter sees one channel only."""
    return isinstance(layer, (nn.Conv1d, nn.Conv2d)) and layer.groups == layer.in_channels > 1


def groups_of(layer: Layer) -> int:
    """Groups of a convolution; 1 for a linear layer."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def reduction_length(layer: Layer) -> int:
    """Products that are summed for one output."""
    return layer.weight[0].numel()


def _chain(layer: nn.Module) -> Any:
    """The ParametrizationList of the layer's weight."""
    return layer.parametrizations["weight"]  # type: ignore[index]


def parametrization_of(layer: nn.Module, kind: type[P]) -> P | None:
    """The layer's parametrization of that kind, if any."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return next((p for p in _chain(layer) if isinstance(p, kind)), None)


def weight_parameter(layer: Layer, name: str) -> Tensor:
    """The parameter behind ``layer.weight``.

    Raises:
        ArgumentError: the weight is parametrised by someone else (weight_norm, torch.nn.utils.prune, ...).
    """
    if parametrize.is_parametrized(layer, "weight"):
        chain = _chain(layer)
        foreign = next((p for p in chain if not isinstance(p, WeightParametrization)), None)
        if foreign is None:
            return chain.original
        got = f"layer {name!r} with a {type(foreign).__name__} parametrization"
    elif layer._parameters.get("weight") is not None:
        return layer.weight
    else:
        got = f"layer {name!r} whose weight is no parameter"
    raise ArgumentError("model", got, "plain weights (make them permanent first, as with torch.nn.utils.prune.remove)")


def add_parametrization(layer: Layer, parametrization: WeightParametrization) -> None:
    """Append ``parametrization`` to those of ``layer.weight``. The parameter object stays the one optimisers know."""
    parametrize.register_parametrization(layer, "weight", parametrization)


def drop_parametrization(layer: Layer, kind: type[WeightParametrization]) -> None:
    """Take the parametrizations of that kind away; others stay, and so does the parameter object."""
    # torch keeps the parametrised property on a class that deepcopies of the layer share, and removes it from there: a class of
    # its own for this layer leaves the others theirs.
    cls = type(layer)
    layer.__class__ = type(
        cls.__name__, cls.__bases__, {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    )
    kept = [p for p in _chain(layer) if not isinstance(p, kind)]
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    for p in kept:
        add_parametrization(layer, p)
    if not kept:
        # torch puts the weight behind the bias; state_dict and optimisers count parameters in the original order.
        for other in [name for name in layer._parameters if name != "weight"]:
            layer._parameters[other] = layer._parameters.pop(other)


def bake_weight(layer: nn.Module) -> None:
    """Make the layer's weight a plain parameter with the values that it computes with, unless it is plain already or
    parametrised by someone else too. A weight whose values change so is no longer shared."""
    if not isinstance(layer, LAYER_TYPES) or not parametrize.is_parametrized(layer, "weight"):
        return
    if not all(isinstance(p, WeightParametrization) for p in _chain(layer)):
        return
    weight = layer.weight.detach().clone()
    drop_parametrization(layer, WeightParametrization)
    if not torch.equal(weight, layer.weight):
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
