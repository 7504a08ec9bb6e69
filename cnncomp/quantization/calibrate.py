"""Post-training quantisation: run the model on sample inputs, choose the scales, attach the simulated quantisation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp._batches import evaluating, inputs_of, with_progress
from cnncomp._modules import Layer, layers_of, reduction_length, select, weight_parameter
from cnncomp.errors import ArgumentError, CalibrationError, OverflowRiskError
from cnncomp.quantization.fake import attach, quantization_of
from cnncomp.quantization.scales import METHODS, RangeObserver, weight_scales

# 2**31 − 1 divided by 255 · 127: the longest sum of u8 × s8 products that int32 always holds.
MAX_REDUCTION = 66_311


def quantize(
    model: nn.Module,
    calibration: Tensor | Iterable[Any],
    *,
    method: str = "mse",
    exclude: str | Sequence[str] = (),
    device: torch.device | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Quantise weights and inputs of the Conv1d, Conv2d and Linear layers to 8 bit, simulated, in place.

    Weights get int8 steps per output channel; each layer's input gets one step, uint8 where calibration saw nothing
    negative and int8 elsewhere; zero points are 0 and biases stay float. The model goes on training (straight-through
    gradients), pruned weights stay zero. Layers that calibration never reaches stay float, with a warning.

    Args:
        model: The model; runs in eval mode, its training flags are restored.
        calibration: Batches: tensors, sequences whose first element is the input (labels may follow), or mappings of
            keyword arguments; or one tensor, a single batch. A few hundred typical inputs are enough.
        method: "mse" chooses the scales with the least squared error, "minmax" those that clip nothing.
        exclude: Names of layers, or of modules that hold them, to leave float; fnmatch patterns.
        device: Where to calibrate: the model moves there and stays. None: where its first parameter is.
        progress: Show a bar on a terminal when it takes more than a second.

    Returns:
        ``model``.

    Raises:
        ArgumentError: an unknown method, a model that is quantised already or holds NaN or infinity, a pattern in
            ``exclude`` that matches nothing, no layer left.
        OverflowRiskError: a layer sums more than 66,311 products.
        CalibrationError: no batch, or one that is no tensor, or NaN or infinity in one or in a layer's input. The model
            is unchanged then.
    """
    if method not in METHODS:
        raise ArgumentError("method", repr(method), f"one of {', '.join(map(repr, METHODS))}")
    layers = _layers_to_quantize(model, exclude)
    if device is not None:
        model.to(device)
    batches = [calibration] if isinstance(calibration, Tensor) else calibration
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Mapping)):
        raise CalibrationError(f"calibration: got {type(calibration).__name__}, expected batches of input tensors")
    observers = _observe(model, layers, with_progress(batches, "calibrating") if progress else batches, method)
    unreached = [name for name in layers if observers[name].seen == 0]
    if len(unreached) == len(layers):
        raise CalibrationError("calibration reached none of the model's Conv and Linear layers")
    if unreached:
        message = f"layers that calibration never reached stay float: {', '.join(unreached)}"
        warnings.warn(message, UserWarning, stacklevel=2)
    for name, layer in layers.items():
        if observers[name].seen:
            scale = weight_scales(layer.weight, method)
            attach(layer, scale, observers[name].scale(method), observers[name].dtype)
    return model


def _layers_to_quantize(model: nn.Module, exclude: str | Sequence[str]) -> dict[str, Layer]:
    every = layers_of(model)
    done = [name for name, layer in every.items() if quantization_of(layer) is not None]
    if done:
        raise ArgumentError("model", f"{done[0]!r} quantised already", "a float model (see remove_quantization)")
    layers = {name: every[name] for name in select(list(every), exclude)}
    if not layers:
        raise ArgumentError("model", "no Conv1d, Conv2d or Linear to quantise", "at least one")
    for name, layer in layers.items():
        weight_parameter(layer, name)
        if not torch.isfinite(layer.weight).all():
            raise ArgumentError("model", f"NaN or infinity in the weight of layer {name!r}", "finite weights")
        length = reduction_length(layer)
        if length > MAX_REDUCTION:
            got = f"layer {name!r}, which sums {length:,} products"
            raise OverflowRiskError("model", got, f"at most {MAX_REDUCTION:,} (name it in exclude)")
    return layers


def _observe(
    model: nn.Module, layers: dict[str, Layer], batches: Iterable[Any], method: str
) -> dict[str, RangeObserver]:
    """Run all batches and collect the ranges of the layers' inputs."""
    observers = {name: RangeObserver() for name in layers}
    index = -1

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if not observers[name].update(x, histogram=method == "mse"):
                raise CalibrationError(f"calibration batch {index}: NaN or infinity in the input of layer {name!r}")

        return hook

    handles = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            parameter = next(model.parameters())
            for index, batch in enumerate(batches):
                args, kwargs = inputs_of(batch, index, parameter.device)
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if index < 0:
        raise CalibrationError("calibration: got no batches, expected at least one (was an iterator used up before?)")
    return observers
