"""Simulated quantisation: a quantised model still trains, and predicts what its converted form gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp._modules import (
    LAYER_TYPES,
    Layer,
    WeightParametrization,
    add_parametrization,
    drop_parametrization,
    layers_of,
    parametrization_of,
)

WEIGHT_MAX = 127


def fake_quantize(x: Tensor, scale: Tensor, lo: Any, hi: Any) -> Tensor:
    """``round_half_to_even(clamp(x / scale, lo, hi)) · scale`` in fp32, returned in the dtype of ``x``.

    ``lo`` and ``hi`` are numbers or tensors without dimensions.

    ``x / scale`` is computed as ``x · fp32(1 / scale)``, as the kernels do. The gradient is that of the clamp
    (straight-through: Bengio et al., 2013). NaN passes through, so that diverged training shows; kernels give ``lo``.
    """
    t = (x.float() * scale.reciprocal()).clamp(lo, hi)
    # t + (round(t) − t) is exactly round(t): a float minus its nearest integer has no rounding error.
    t = t + (t.round() - t).detach()
    return (t * scale).to(x.dtype)


def _per_channel(values: Tensor, weight: Tensor) -> Tensor:
    """(K,) values, to be broadcast with a weight (K, ...)."""
    return values.view(-1, *[1] * (weight.dim() - 1))


def _scale_buffer(scale: Tensor) -> Tensor:
    return scale.detach().clone().to(torch.float32)


class _KeepScale(nn.Module):
    """A module whose float32 buffers move between devices but stay float32 when the model becomes half or double.

    While ``enabled`` is False it passes everything through: for measurements.
    """

    scale: Tensor
    enabled = True

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: t for name, t in self._buffers.items() if t is not None and t.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, t in before.items():
            now = self._buffers[name]
            if now is not None and now.dtype != torch.float32:
                self._buffers[name] = t.to(now.device)
        return self


class FakeQuantizeWeight(_KeepScale, WeightParametrization):
    """Rounds a weight to q·scale + shift with an integer q, −127 to 127. Without a shift, zero stays zero.

    Args:
        scale: (K,) float32, one step of each output channel, above 0.
        shift: (K,) float32, the mean that the "mean-shift" scheme takes off before it rounds; None for the symmetric one.
    """

    shift: Tensor | None

    def __init__(self, scale: Tensor, shift: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", _scale_buffer(scale))
        self.register_buffer("shift", None if shift is None else _scale_buffer(shift))

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        scale = _per_channel(self.scale, weight)
        if self.shift is None:
            return fake_quantize(weight, scale, -WEIGHT_MAX, WEIGHT_MAX)
        shift = _per_channel(self.shift, weight)
        centred = fake_quantize(weight.float() - shift, scale, -WEIGHT_MAX, WEIGHT_MAX)
        return (centred + shift).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"channels={self.scale.numel()}" + ("" if self.shift is None else ", mean-shift")


class FakeQuantizeInput(_KeepScale):
    """Rounds a tensor to 8-bit multiples of one scale, zero point 0.

    Args:
        scale: One step, above 0.
        dtype: torch.uint8 (0 to 255) or torch.int8 (−128 to 127).
    """

    signed: Tensor

    def __init__(self, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        # A buffer, for it belongs to the state_dict. The limits are computed from it without a look at its value,
        # which would stop a GPU and break torch.compile's graph.
        self.register_buffer("signed", torch.tensor(dtype == torch.int8))

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.signed.item() else torch.uint8

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        offset = self.signed.float() * 128
        return fake_quantize(x, self.scale, -offset, 255 - offset)

    def extra_repr(self) -> str:
        return f"scale={self.scale.item():.6g}, dtype={self.dtype}"


class QuantizeInputHook:
    """The forward-pre-hook that sends a layer's input through its ``input_quantizer``. Has no state of its own."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (module.input_quantizer(args[0]), *args[1:]), kwargs  # type: ignore[operator]
        return args, {**kwargs, "input": module.input_quantizer(kwargs["input"])}  # type: ignore[operator]


@dataclass(frozen=True)
class LayerQuantization:
    """How a layer is quantised.

    Attributes:
        weight_scale: (K,) float32, one step of each output channel's weights.
        input_scale: One step of the input, a float32 value.
        input_dtype: torch.uint8 or torch.int8.
        weight_shift: (K,) float32, the mean of each output channel's weights in the "mean-shift" scheme, else None.
    """

    weight_scale: Tensor
    input_scale: float
    input_dtype: torch.dtype
    weight_shift: Tensor | None = None


def quantization_of(layer: nn.Module) -> LayerQuantization | None:
    """How ``layer`` is quantised, or None where it isn't."""
    weight = parametrization_of(layer, FakeQuantizeWeight)
    quantizer = getattr(layer, "input_quantizer", None)
    if weight is None or not isinstance(quantizer, FakeQuantizeInput):
        return None
    return LayerQuantization(weight.scale, quantizer.scale.item(), quantizer.dtype, weight.shift)


def integer_weight(layer: Layer) -> Tensor:
    """The int8 weight, −127 to 127, of a quantised layer, in the shape of ``layer.weight``, masks applied."""
    parametrization = parametrization_of(layer, FakeQuantizeWeight)
    assert parametrization is not None, "the layer isn't quantised"
    weight = layer.weight.detach().float()
    if parametrization.shift is not None:
        weight = weight - _per_channel(parametrization.shift, weight)
    # The weight is an integer times the scale, rounded once: the quotient's nearest integer is that integer.
    return (weight / _per_channel(parametrization.scale, weight)).round().to(torch.int8)


def attach(layer: Layer, weight: FakeQuantizeWeight, input: FakeQuantizeInput) -> None:
    """Make ``layer`` compute with a quantised weight and a quantised input."""
    device = layer.weight.device
    add_parametrization(layer, weight.to(device))
    layer.add_module("input_quantizer", input.to(device))
    layer.register_forward_pre_hook(QuantizeInputHook(), with_kwargs=True)


def remove_layer_quantization(layer: nn.Module) -> bool:
    """Undo :func:`quantize` on one layer, in place; whether it was quantised."""
    if not isinstance(layer, LAYER_TYPES) or quantization_of(layer) is None:
        return False
    drop_parametrization(layer, FakeQuantizeWeight)
    if isinstance(getattr(layer, "input_quantizer", None), FakeQuantizeInput):
        del layer.input_quantizer
    for key in [k for k, hook in layer._forward_pre_hooks.items() if isinstance(hook, QuantizeInputHook)]:
        del layer._forward_pre_hooks[key]
        layer._forward_pre_hooks_with_kwargs.pop(key, None)
    return True


def remove_quantization(model: nn.Module) -> nn.Module:
    """Undo :func:`quantize`, in place: the float weights, as trained since, come back; masks stay.

    What other methods than the default changed besides stays: channels equalised, weights rounded adaptively, biases
    corrected, BatchNorm folded.

    Returns:
        ``model``.
    """
    for layer in layers_of(model).values():
        remove_layer_quantization(layer)
    return model
