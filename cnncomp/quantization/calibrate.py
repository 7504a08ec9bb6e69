"""Post-training quantisation: run the model on sample inputs, choose the scales, attach the simulated quantisation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp._modules import (
    Layer,
    check_fraction,
    layers_of,
    reduction_length,
    resolve_device,
    select,
    weight_parameter,
)
from cnncomp.errors import ArgumentError, CalibrationError, OverflowRiskError
from cnncomp.ops.library import MAX_REDUCTION
from cnncomp.quantization.bias import correct_biases
from cnncomp.quantization.equalize import CRITERIA
from cnncomp.quantization.equalize import equalize as equalize_layers
from cnncomp.quantization.fake import (
    FakeQuantizeInput,
    FakeQuantizeWeight,
    attach,
    quantization_of,
    remove_layer_quantization,
)
from cnncomp.quantization.feed import Feed
from cnncomp.quantization.links import layer_graph, norm_after, unpooled_readers
from cnncomp.quantization.qat import TrainedWeight, fold_norms, trained_input
from cnncomp.quantization.rounding import round_adaptively
from cnncomp.quantization.scales import METHODS, RangeObserver, weight_scales
from cnncomp.quantization.sensitivity import most_sensitive, multiplications, sensitivities

SCHEMES = ("symmetric", "mean-shift")
ROUNDINGS = ("nearest", "adaptive")


def quantize(
    model: nn.Module,
    calibration: Tensor | Iterable[Any],
    *,
    method: str = "mse",
    scheme: str = "symmetric",
    equalize: str | None = None,
    rounding: str = "nearest",
    correct_bias: bool = False,
    float_budget: float = 0.0,
    qat: bool = False,
    exclude: str | Sequence[str] = (),
    device: torch.device | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Quantise weights and inputs of the Conv1d, Conv2d and Linear layers to 8 bit, simulated, in place.

    Weights get int8 steps per output channel; each layer's input gets one step, uint8 where calibration saw nothing
    negative and int8 elsewhere; zero points are 0 and biases stay float. The model goes on training (straight-through
    gradients), pruned weights stay zero. A layer behind a max-pool has the step of the layers that read the same values
    before it. Layers that calibration never reaches stay float, with a warning.

    Args:
        model: The model; runs in eval mode, its training flags are restored.
        calibration: Batches: tensors, sequences whose first element is the input (labels may follow), or mappings of
            keyword arguments; or one tensor, a single batch. A few hundred typical inputs are enough. They are kept in
            memory if they are needed more than once: for all that follows ``scheme`` but ``qat``.
        method: "mse" chooses the scales with the least squared error, "minmax" those that clip nothing, "percentile" clips
            one input in 10,000, "entropy" changes the inputs' distribution least (KL divergence).
        scheme: "symmetric", w ≈ s·q, or "mean-shift", w ≈ α·q + μ with μ the mean of the output channel's weights.
        equalize: "activations" or "weights" rescales channels between layers before all else, so that one step suits
            all of a tensor's channels, as :mod:`cnncomp.quantization.equalize` explains. The float model computes what it
            did; a ReLU6 between such layers becomes a clamp per channel.
        rounding: "nearest", or "adaptive": up or down, whichever changes the layer's output least on the calibration
            batches (:mod:`cnncomp.quantization.rounding`).
        correct_bias: Change the biases so that each layer's output has the mean that float weights give it on the
            calibration batches. A convolution without one has it taken from the running mean of the BatchNorm behind
            it, or gets one.
        float_budget: The most sensitive layers stay float, as long as together they take at most this fraction of the
            multiplications. Sensitivity is the change of the model's output when the layer alone is quantised.
        qat: Prepare for training: BatchNorm is folded into the convolution before it (its module becomes an Identity),
            and in train mode the scales follow weights and inputs.
        exclude: Names of layers, or of modules that hold them, to leave float; fnmatch patterns.
        device: Where to calibrate: the model moves there and stays. None: where its first parameter is.
        progress: Show a bar on a terminal when it takes more than a second.

    Returns:
        ``model``.

    Raises:
        ArgumentError: an unknown method, scheme or other choice, a model that is quantised already or holds NaN or
            infinity, a pattern in ``exclude`` that matches nothing, no layer left, a mean shift for pruned weights.
        OverflowRiskError: a layer sums more than 66,311 products.
        DeviceError: a ``device`` that is not there.
        CalibrationError: no batch, or one that is no tensor, or NaN or infinity in one or in a layer's input. The model
            is unchanged then, but for what ``equalize`` rescaled and ``qat`` folded.
    """
    check_choices(method, scheme, equalize, rounding, float_budget)
    layers = _layers_to_quantize(model, exclude, scheme)
    if device is not None:
        model.to(resolve_device(device))
    again = equalize is not None or rounding != "nearest" or correct_bias or float_budget > 0
    feed = Feed(model, calibration, again, progress)
    if equalize is not None:
        equalize_layers(model, feed, equalize)
    observers = _observe(layers, feed, histogram=method != "minmax")
    layers = _reached(layers, observers)
    readers = unpooled_readers(model, layer_graph(model, warn=False), layers)
    observers |= {name: observers[other] for name, other in readers.items()}
    if qat:
        fold_norms(model)
    changed = correct_bias or rounding != "nearest"
    weights = {n: weight_parameter(m, n).detach().clone() for n, m in layers.items()} if changed else {}
    done = False
    try:
        for name, layer in layers.items():
            attach(layer, *_quantizers(layer, observers[name], method, scheme, qat))
        if float_budget > 0:
            _keep_sensitive(model, layers, feed, float_budget)
        if rounding == "adaptive" and (skipped := round_adaptively(layers, feed)):
            warnings.warn(f"layers too large for adaptive rounding: {', '.join(skipped)}", UserWarning, stacklevel=2)
        if correct_bias:
            norms = {name: model.get_submodule(norm) for name, norm in norm_after(model, layer_graph(model)).items()}
            correct_biases(layers, weights, norms, feed)
        done = True
    finally:
        if not done:
            _detach(layers, weights)
    return model


def check_choices(
    method: str = "mse",
    scheme: str = "symmetric",
    equalize: str | None = None,
    rounding: str = "nearest",
    float_budget: float = 0.0,
) -> None:
    """Raise :class:`ArgumentError` for what :func:`quantize` does not take."""
    choices = {"method": (method, METHODS), "scheme": (scheme, SCHEMES), "rounding": (rounding, ROUNDINGS)}
    for argument, (got, known) in choices.items():
        if got not in known:
            raise ArgumentError(argument, repr(got), f"one of {', '.join(map(repr, known))}")
    if equalize is not None and equalize not in CRITERIA:
        raise ArgumentError("equalize", repr(equalize), f"None or one of {', '.join(map(repr, CRITERIA))}")
    check_fraction("float_budget", float_budget, "multiplications that stay float")


def _detach(layers: dict[str, Layer], weights: dict[str, Tensor]) -> None:
    """Undo a quantisation that failed half-way; ``weights`` are the parameters as they were before."""
    for name, layer in layers.items():
        remove_layer_quantization(layer)
        if name in weights:
            weight_parameter(layer, name).data.copy_(weights[name])


def attach_mean_shift(
    model: nn.Module,
    calibration: Tensor | Iterable[Any],
    method: str,
    scheme: Callable[[str, Layer], tuple[Tensor, Tensor]],
    progress: bool,
) -> nn.Module:
    """:func:`quantize` in place with given weights: ``scheme`` tells the scale (K,) and shift (K,) of a layer."""
    check_choices(method)
    layers = _layers_to_quantize(model, (), "mean-shift")
    observers = _observe(layers, Feed(model, calibration, False, progress), histogram=method != "minmax")
    for name, layer in _reached(layers, observers).items():
        observer = observers[name]
        attach(
            layer, FakeQuantizeWeight(*scheme(name, layer)), FakeQuantizeInput(observer.scale(method), observer.dtype)
        )
    return model


def _quantizers(
    layer: Layer, observer: RangeObserver, method: str, scheme: str, qat: bool
) -> tuple[FakeQuantizeWeight, FakeQuantizeInput]:
    """How a layer's weight and input are quantised."""
    weight = layer.weight.detach()
    shift = weight.float().flatten(1).mean(1) if scheme == "mean-shift" else None
    centred = weight if shift is None else weight.float() - shift.view(-1, *[1] * (weight.dim() - 1))
    scale = weight_scales(centred, method)
    if qat:
        return TrainedWeight(scale, shift, weight), trained_input(observer, method)
    return FakeQuantizeWeight(scale, shift), FakeQuantizeInput(observer.scale(method), observer.dtype)


def _keep_sensitive(model: nn.Module, layers: dict[str, Layer], feed: Feed, budget: float) -> None:
    """Undo the quantisation of the most sensitive layers; they are taken out of ``layers``."""
    cost = multiplications(layers, feed)
    for name in most_sensitive(sensitivities(model, layers, feed), cost, budget):
        remove_layer_quantization(layers.pop(name))


def _reached(layers: dict[str, Layer], observers: dict[str, RangeObserver]) -> dict[str, Layer]:
    """The layers that calibration reached; a warning names the others."""
    unreached = [name for name in layers if observers[name].seen == 0]
    if len(unreached) == len(layers):
        raise CalibrationError("calibration reached none of the model's Conv and Linear layers")
    if unreached:
        message = f"layers that calibration never reached stay float: {', '.join(unreached)}"
        warnings.warn(message, UserWarning, stacklevel=3)
    return {name: layer for name, layer in layers.items() if observers[name].seen}


def _layers_to_quantize(model: nn.Module, exclude: str | Sequence[str], scheme: str) -> dict[str, Layer]:
    from cnncomp.pruning.mask import mask_of  # which imports this package

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
        if scheme == "mean-shift" and mask_of(layer) is not None:
            got = f"'mean-shift' for layer {name!r}, which is pruned: its zeros would become the mean"
            raise ArgumentError("scheme", got, "'symmetric'")
        length = reduction_length(layer)
        if length > MAX_REDUCTION:
            got = f"layer {name!r}, which sums {length:,} products"
            raise OverflowRiskError("model", got, f"at most {MAX_REDUCTION:,} (name it in exclude)")
    return layers


def _observe(layers: dict[str, Layer], feed: Feed, histogram: bool) -> dict[str, RangeObserver]:
    """Run all batches and collect the ranges of the layers' inputs."""
    observers = {name: RangeObserver() for name in layers}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if not observers[name].update(x, histogram):
                raise CalibrationError(
                    f"calibration batch {feed.index}: NaN or infinity in the input of layer {name!r}"
                )

        return hook

    handles = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        feed()
    finally:
        for handle in handles:
            handle.remove()
    return observers
