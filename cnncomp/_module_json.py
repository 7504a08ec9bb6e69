"""Modules of a network as JSON and tensors, and back: converted layers, and the layers of torch in the table here."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp._graph_json import DTYPES, decode_value, encode_value
from cnncomp.errors import SerializationError
from cnncomp.graph.trace import base_type
from cnncomp.nn import (
    LAYERS,
    Activation,
    ChannelAffine,
    ConcatChannels,
    ConvertedLayer,
    Geometry,
    LayerInfo,
    MeanPool2d,
    QuantConv2d,
    QuantLinear,
    QuantMaxPool2d,
    QuantSpec,
    ScaleChannels,
    dequantize_weight,
    quantize_weight,
)
from cnncomp.quantization import ClampChannels

_CONV = "in_channels out_channels kernel_size stride padding dilation groups bias padding_mode"
_CONV_TRANSPOSE = _CONV + " output_padding"
_MAX_POOL = "kernel_size stride padding dilation return_indices ceil_mode"
_AVG_POOL = "kernel_size stride padding ceil_mode count_include_pad"
_BATCH_NORM = "num_features eps momentum affine track_running_stats"

#: torch's layers that a file may hold, with the constructor arguments that are attributes of the same name. ``bias`` is
#: whether there is one.
TORCH_MODULES: dict[type[nn.Module], str] = {
    nn.AdaptiveAvgPool1d: "output_size",
    nn.AdaptiveAvgPool2d: "output_size",
    nn.AdaptiveMaxPool1d: "output_size return_indices",
    nn.AdaptiveMaxPool2d: "output_size return_indices",
    nn.AlphaDropout: "p inplace",
    nn.AvgPool1d: _AVG_POOL,
    nn.AvgPool2d: _AVG_POOL + " divisor_override",
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.CELU: "alpha inplace",
    nn.ChannelShuffle: "groups",
    nn.ConstantPad1d: "padding value",
    nn.ConstantPad2d: "padding value",
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.ConvTranspose1d: _CONV_TRANSPOSE,
    nn.ConvTranspose2d: _CONV_TRANSPOSE,
    nn.Dropout: "p inplace",
    nn.Dropout1d: "p inplace",
    nn.Dropout2d: "p inplace",
    nn.ELU: "alpha inplace",
    nn.Embedding: "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse",
    nn.Flatten: "start_dim end_dim",
    nn.GELU: "approximate",
    nn.GLU: "dim",
    nn.GroupNorm: "num_groups num_channels eps affine",
    nn.Hardsigmoid: "inplace",
    nn.Hardswish: "inplace",
    nn.Hardtanh: "min_val max_val inplace",
    nn.Identity: "",
    nn.InstanceNorm1d: _BATCH_NORM,
    nn.InstanceNorm2d: _BATCH_NORM,
    nn.LayerNorm: "normalized_shape eps elementwise_affine bias",
    nn.LeakyReLU: "negative_slope inplace",
    nn.Linear: "in_features out_features bias",
    nn.LocalResponseNorm: "size alpha beta k",
    nn.LogSigmoid: "",
    nn.LogSoftmax: "dim",
    nn.MaxPool1d: _MAX_POOL,
    nn.MaxPool2d: _MAX_POOL,
    nn.Mish: "inplace",
    nn.PReLU: "num_parameters",
    nn.PixelShuffle: "upscale_factor",
    nn.PixelUnshuffle: "downscale_factor",
    nn.ReLU: "inplace",
    nn.ReLU6: "inplace",
    nn.ReflectionPad1d: "padding",
    nn.ReflectionPad2d: "padding",
    nn.ReplicationPad1d: "padding",
    nn.ReplicationPad2d: "padding",
    nn.SELU: "inplace",
    nn.SiLU: "inplace",
    nn.Sigmoid: "",
    nn.Softmax: "dim",
    nn.Softplus: "beta threshold",
    nn.Tanh: "",
    nn.Unflatten: "dim unflattened_size",
    nn.Upsample: "size scale_factor mode align_corners recompute_scale_factor",
    nn.UpsamplingBilinear2d: "size scale_factor",
    nn.UpsamplingNearest2d: "size scale_factor",
    nn.ZeroPad1d: "padding",
    nn.ZeroPad2d: "padding",
    Activation: "kind",
    ChannelAffine: "channels lo hi",
    ConcatChannels: "",
    ClampChannels: "channels lo",
    MeanPool2d: "",
    QuantMaxPool2d: _MAX_POOL,
    ScaleChannels: "",
}
_TORCH_BY_NAME = {cls.__name__: cls for cls in TORCH_MODULES}

#: Tensors of a converted layer, and those that its info holds.
_LAYER_TENSORS = {"weight", "bias", "weight_scale", "weight_shift"}
_INFO_TENSORS = ("weight_scale", "weight_shift")

Encoded = tuple[dict[str, Any], dict[str, Tensor]]


def encode_module(path: str, module: nn.Module) -> Encoded:
    """A module as (JSON, tensors by name), on any device. Parametrised weights are stored as they are computed with.

    Raises:
        SerializationError: a class that is not in the tables; names the module and says what to do.
    """
    if isinstance(module, ConvertedLayer) and LAYERS.get(type(module).__name__) is type(module):
        return _encode_layer(module)
    cls = base_type(module)
    if cls not in TORCH_MODULES:
        raise SerializationError(
            f"layer {path!r} is a {cls.__module__}.{cls.__qualname__}, which can't be saved: build it from torch's own "
            "layers before cnncomp.convert, or save its weights with torch.save(model.state_dict(), ...)"
        )
    try:
        config = {name: encode_value(_argument(module, name)) for name in TORCH_MODULES[cls].split()}
        with torch.no_grad():
            tensors = {name: getattr(module, name).detach() for name in _empty(cls, config).state_dict()}
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise SerializationError(f"layer {path!r}, a {cls.__name__}, can't be saved: {error}") from error
    return {"torch": cls.__name__, "config": config}, tensors


def _argument(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    return value is not None if name == "bias" else value


def _empty(cls: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    """The module without memory for its tensors."""
    with torch.device("meta"):
        return cls(**{name: decode_value(v, {}) for name, v in config.items()})


def decode_module(encoded: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The inverse of :func:`encode_module`, on the CPU.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError, CnncompError: what :func:`encode_module` did not make.
    """
    if "layer" in encoded:
        return _decode_layer(encoded, tensors)
    cls = _TORCH_BY_NAME[encoded["torch"]]
    config = encoded["config"]
    if list(config) != TORCH_MODULES[cls].split():
        raise ValueError(f"a {cls.__name__} with the arguments {list(config)}")
    module = _empty(cls, config)
    module.load_state_dict({name: t.clone() for name, t in tensors.items()}, assign=True)
    return module


def _spec_json(spec: QuantSpec | None) -> list[Any] | None:
    return None if spec is None else [spec.scale, str(spec.dtype).removeprefix("torch.")]


def _note_place(tensors: dict[str, Tensor], name: str, noted: Tensor | None) -> str | None:
    """Where a tensor of the layer's info is found: None if there is none, "layer" if it is the layer's own, else "info",
    and then it is added to ``tensors``."""
    if noted is None:
        return None
    own = tensors.get(name)
    if own is not None and torch.equal(own.cpu(), noted.detach().cpu()):
        return "layer"
    tensors[f"info.{name}"] = noted.detach()
    return "info"


def _from_place(tensors: dict[str, Tensor], name: str, place: str | None) -> Tensor | None:
    """The inverse of :func:`_note_place`; takes what was added out of ``tensors``."""
    places = {None: None, "layer": tensors.get(name), "info": tensors.pop(f"info.{name}", None)}
    found = places[place]
    if (found is None) != (place is None):
        raise ValueError(f"a layer whose {name} is missing")
    return None if found is None else found.clone()


def _encode_layer(layer: ConvertedLayer) -> Encoded:
    info, tensors = layer.info, dict(layer.tensors())
    where = {name: _note_place(tensors, name, getattr(info, name)) for name in _INFO_TENSORS}
    if layer.info.weight_scale is not None and tensors["weight"].is_floating_point():
        tensors["weight"] = _integers(tensors["weight"], layer.info.weight_scale, layer.info.weight_shift)
    encoded = {
        "layer": type(layer).__name__,
        "config": layer.config(),
        "info": {
            "name": info.name,
            "pattern": info.pattern,
            "reason": info.reason,
            "timings": {k: float(ms) for k, ms in info.timings.items() if math.isfinite(ms)},
            "input": _spec_json(info.input),
            **where,
        },
    }
    return encoded, tensors


def _integers(weight: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """The int8 weight of a quantised layer that runs in float; the float one if it is no longer what they stand for."""
    q, step = quantize_weight(weight, scale, shift)
    same = torch.equal(step, scale.to(step)) and torch.equal(dequantize_weight(q, step, shift), weight)
    return q if same else weight


def _decode_layer(encoded: dict[str, Any], tensors: dict[str, Tensor]) -> ConvertedLayer:
    cls, config, info = LAYERS[encoded["layer"]], encoded["config"], encoded["info"]
    tensors = dict(tensors)
    noted = {name: _from_place(tensors, name, info.get(name)) for name in _INFO_TENSORS}
    _check_sizes(config, tensors)
    if not issubclass(cls, (QuantConv2d, QuantLinear)) and tensors["weight"].dtype == torch.int8:
        scale = noted["weight_scale"]
        if scale is None:
            raise ValueError("an int8 weight without a scale")
        tensors["weight"] = dequantize_weight(tensors["weight"], scale, noted["weight_shift"])
    layer = cls.build(config, tensors)
    if json.loads(json.dumps(layer.config())) != config or not set(tensors) <= _LAYER_TENSORS:
        raise ValueError(f"a {cls.__name__} with the arguments {config} and the tensors {sorted(tensors)}")
    layer.info = LayerInfo(
        str(info["name"]), str(info["pattern"]), str(info["reason"]),
        {str(k): float(ms) for k, ms in info["timings"].items()}, _spec(info["input"]),
        noted["weight_scale"], noted["weight_shift"],
    )  # fmt: skip
    return layer


def _spec(value: Any) -> QuantSpec | None:
    if value is None:
        return None
    scale, dtype = value
    return QuantSpec(float(scale), DTYPES[dtype])


def _check_sizes(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless the tensors fit each other and the geometry: kernels trust these sizes."""
    weight = tensors["weight"]
    if (raw := config.get("geometry")) is None:
        expected: tuple[int, ...] = (weight.shape[0], weight.shape[-1])
    else:
        g = Geometry.from_config(raw)
        sizes = (g.in_channels, g.out_channels, g.groups, *g.kernel_size, *g.stride, *g.dilation)
        pairs = (g.kernel_size, g.stride, g.padding, g.dilation)
        if any(len(p) != 2 for p in pairs) or any(type(v) is not int for v in (*sizes, *g.padding)):
            raise ValueError(f"a convolution with the sizes {raw}")
        if min(sizes) < 1 or min(g.padding) < 0 or g.in_channels % g.groups or g.out_channels % g.groups:
            raise ValueError(f"a convolution with the sizes {raw}")
        expected = (g.out_channels, g.in_channels // g.groups, *g.kernel_size)
    vectors = [t for name, t in tensors.items() if name != "weight"]
    if tuple(weight.shape) != expected or any(tuple(t.shape) != expected[:1] for t in vectors):
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        raise ValueError(f"tensors of the shapes {shapes} where the weight's is {expected}")
