"""Drop-in layers for inference: packed weights, one fused kernel call per forward."""

from __future__ import annotations

from cnncomp.nn.activation import Activation, ChannelAffine, ScaleChannels
from cnncomp.nn.base import LINEAR, Clamp, ConvertedLayer, Geometry, LayerInfo, QuantSpec
from cnncomp.nn.concat import ConcatChannels
from cnncomp.nn.dense import DenseConv2d, DenseLinear
from cnncomp.nn.packed_quant import (
    BlocksQuantConv2d,
    BlocksQuantLinear,
    GatheredConv2d,
    Sparse24QuantConv2d,
    Sparse24QuantLinear,
    TritonBlocksQuantConv2d,
    TritonBlocksQuantLinear,
    TritonVectorsQuantConv2d,
    TritonVectorsQuantLinear,
    VectorsQuantConv2d,
    VectorsQuantLinear,
    VnmQuantConv2d,
    VnmQuantLinear,
)
from cnncomp.nn.pool import MeanPool2d, QuantMaxPool2d
from cnncomp.nn.quant import (
    QuantConv2d,
    QuantLinear,
    TritonQuantConv2d,
    TritonQuantLinear,
    dequantize_weight,
    quantize_weight,
)
from cnncomp.nn.sparse import SparseConv2d, SparseLinear
from cnncomp.nn.sparse_quant import ScatteredQuantConv2d, SparseQuantConv2d, SparseQuantLinear

#: Every converted layer by class name: what a saved file may name.
LAYERS: dict[str, type[ConvertedLayer]] = {
    cls.__name__: cls
    for cls in (
        BlocksQuantConv2d,
        BlocksQuantLinear,
        DenseConv2d,
        DenseLinear,
        QuantConv2d,
        QuantLinear,
        Sparse24QuantConv2d,
        Sparse24QuantLinear,
        SparseConv2d,
        SparseLinear,
        SparseQuantConv2d,
        ScatteredQuantConv2d,
        SparseQuantLinear,
        TritonBlocksQuantConv2d,
        TritonBlocksQuantLinear,
        TritonQuantConv2d,
        TritonQuantLinear,
        TritonVectorsQuantConv2d,
        TritonVectorsQuantLinear,
        VectorsQuantConv2d,
        VectorsQuantLinear,
        VnmQuantConv2d,
        VnmQuantLinear,
    )
}

#: Modules between layers that have kernels of this package.
KERNEL_MODULES = (Activation, ChannelAffine, ConcatChannels, MeanPool2d, QuantMaxPool2d, ScaleChannels)

__all__ = [
    "KERNEL_MODULES",
    "LAYERS",
    "LINEAR",
    "Activation",
    "BlocksQuantConv2d",
    "BlocksQuantLinear",
    "ChannelAffine",
    "Clamp",
    "ConcatChannels",
    "ConvertedLayer",
    "DenseConv2d",
    "DenseLinear",
    "GatheredConv2d",
    "Geometry",
    "LayerInfo",
    "MeanPool2d",
    "QuantConv2d",
    "QuantLinear",
    "QuantMaxPool2d",
    "QuantSpec",
    "ScaleChannels",
    "Sparse24QuantConv2d",
    "Sparse24QuantLinear",
    "SparseConv2d",
    "SparseLinear",
    "ScatteredQuantConv2d",
    "SparseQuantConv2d",
    "SparseQuantLinear",
    "TritonBlocksQuantConv2d",
    "TritonBlocksQuantLinear",
    "TritonQuantConv2d",
    "TritonQuantLinear",
    "TritonVectorsQuantConv2d",
    "TritonVectorsQuantLinear",
    "VectorsQuantConv2d",
    "VectorsQuantLinear",
    "VnmQuantConv2d",
    "VnmQuantLinear",
    "dequantize_weight",
    "quantize_weight",
]
