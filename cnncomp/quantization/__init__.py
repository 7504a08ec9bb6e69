"""Quantisation: 8-bit weights and inputs, chosen by calibration, simulated until the model is converted."""

from __future__ import annotations

from cnncomp.quantization.article import MeanShifted, Quantization, mean_shift
from cnncomp.quantization.calibrate import quantize
from cnncomp.quantization.clamp import ClampChannels
from cnncomp.quantization.fake import (
    FakeQuantizeInput,
    FakeQuantizeWeight,
    LayerQuantization,
    QuantizeInputHook,
    integer_weight,
    quantization_of,
    remove_layer_quantization,
    remove_quantization,
)
from cnncomp.quantization.scales import METHODS

__all__ = [
    "METHODS",
    "ClampChannels",
    "FakeQuantizeInput",
    "FakeQuantizeWeight",
    "LayerQuantization",
    "MeanShifted",
    "Quantization",
    "QuantizeInputHook",
    "integer_weight",
    "mean_shift",
    "quantization_of",
    "quantize",
    "remove_layer_quantization",
    "remove_quantization",
]
