"""Bias correction: rounded weights shift the mean of a layer's outputs; the bias takes the shift back.

Nagel et al., "Data-free quantization through weight equalization and bias correction" (2019), section 4.2: the shift is
Δw·E[x], here with the mean over calibration batches. What rounding and clipping the *inputs* does to the mean is left alone:
it hangs on a few large values in a few images, and a correction for it does not carry over to others.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp._modules import Layer, parametrization_of, weight_parameter
from cnncomp.quantization.fake import FakeQuantizeWeight
from cnncomp.quantization.feed import Feed


def correct_biases(
    layers: dict[str, Layer], weights: dict[str, Tensor], norms: dict[str, nn.Module], feed: Feed
) -> None:
    """Change the biases of quantised layers in place so that their outputs get the means that float weights give on the same
    inputs.

    While a batch runs, each layer is corrected as soon as it has been computed, so that those behind it see corrected
    inputs. A layer without a bias that a BatchNorm follows has it corrected in the norm's running mean, any other gets a
    bias.

    Args:
        weights: by layer name, the parameter as it was before anything was rounded (adaptive rounding overwrites it).
        norms: by layer name, the BatchNorm that alone reads it.
        feed: runs the model that the layers are of.
    """
    # Means, each with the number of outputs that it is the mean of.
    shifts: dict[str, list[tuple[Tensor, int]]] = defaultdict(list)

    def watch(name: str) -> Any:
        def hook(layer: Layer, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> Tensor:
            quantizer = parametrization_of(layer, FakeQuantizeWeight)
            assert quantizer is not None
            parameter = weight_parameter(layer, name)
            rounded, parameter.data, quantizer.enabled = parameter.data, weights[name], False
            expected = layer.forward(*args, **kwargs)  # past the hooks
            parameter.data, quantizer.enabled = rounded, True
            shift = _mean(layer, expected.float() - out.float())
            shifts[name].append((shift, out.numel()))
            return out + shift.to(out.dtype).view(-1, *[1] * (out.dim() - 1 - _channel_dim(layer, out)))

        return hook

    handles = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        feed("correcting biases")
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for name, found in shifts.items():
            shift = torch.stack([s * n for s, n in found]).sum(0) / sum(n for _, n in found)
            _add_to_bias(layers[name], name, shift, norms.get(name))


def _add_to_bias(layer: Layer, name: str, shift: Tensor, norm: nn.Module | None) -> None:
    shift = shift.to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias += shift
    elif norm is not None:
        norm.running_mean -= shift  # type: ignore[operator]
    else:
        layer.bias = nn.Parameter(shift, requires_grad=weight_parameter(layer, name).requires_grad)


def _channel_dim(layer: nn.Module, out: Tensor) -> int:
    """Where the output channels are, with or without a batch dimension."""
    spatial = {nn.Conv1d: 1, nn.Conv2d: 2}
    return out.dim() - 1 - next((n for kind, n in spatial.items() if isinstance(layer, kind)), 0)


def _mean(layer: nn.Module, out: Tensor) -> Tensor:
    """The mean of each output channel: (K,)."""
    return out.detach().movedim(_channel_dim(layer, out), 0).flatten(1).mean(1)
