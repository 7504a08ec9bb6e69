"""The table of kernels that can run a layer. Dispatch, tests and benches follow from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnncomp.errors import CnncompError, DeviceError
from cnncomp.nn import (
    BlocksQuantConv2d,
    BlocksQuantLinear,
    ConvertedLayer,
    DenseConv2d,
    DenseLinear,
    LayerInfo,
    QuantConv2d,
    QuantLinear,
    ScatteredQuantConv2d,
    Sparse24QuantConv2d,
    Sparse24QuantLinear,
    SparseConv2d,
    SparseLinear,
    SparseQuantConv2d,
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
    quantize_weight,
)
from cnncomp.nn.dense import DEPTHWISE_KERNEL, DIRECT_KERNEL, HALF_KERNELS, LINEAR_KERNELS, ROWS_KERNEL
from cnncomp.ops import cuda
from cnncomp.ops.packing import quad_sparsity
from cnncomp.sparsity.blocks import kept_fraction
from cnncomp.sparsity.two_four import first_violation
from cnncomp.sparsity.vectors import QUAD, RUN
from cnncomp.sparsity.vnm import find_m, kept_columns
from cnncomp.sparsity.weights import CHUNK_BYTES, SLICE, too_many_taps, why_not

#: Activation formats between layers: float NCHW, float channels_last, 8-bit channels_last; half-precision channels_last.
NCHW, NHWC, Q8 = "nchw", "nhwc", "q8"
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}

#: Below this fraction of zeros no sparse kernel is tried: on every CPU measured, dense wins below about 45 %.
MIN_SPARSITY = 0.3
#: Without measurement, sparse from here on.
HEURISTIC_SPARSITY = 0.6
#: Without measurement, up to so many input channels of a group are convolved by our own dense kernel.
HEURISTIC_DIRECT = 4


def _weight(layer: ConvertedLayer) -> torch.Tensor:
    assert isinstance(layer, (DenseConv2d, DenseLinear))
    return layer.weight


def count_nonzero(layer: ConvertedLayer) -> int:
    """Weights of a dense layer that are not zero."""
    return int(torch.count_nonzero(_weight(layer)))


def sparsity_of_weight(layer: ConvertedLayer) -> float:
    """Fraction of zeros in a dense layer's weight."""
    return 1 - count_nonzero(layer) / max(1, _weight(layer).numel())


def empty_quads(layer: ConvertedLayer) -> float:
    """Fraction of a dense layer's quads of four input channels that hold zeros alone."""
    return quad_sparsity(_weight(layer))


@dataclass(frozen=True)
class Candidate:
    """A kernel that may run a layer.

    ``takes``: the activation format it reads fastest (its residual too); ``applies``: None if it can run the layer, else one
    line why not; ``build``: the layer on this kernel, from the dense one.
    """

    kernel: str
    takes: str
    gives: str
    devices: tuple[str, ...]
    applies: Callable[[ConvertedLayer], str | None]
    build: Callable[[ConvertedLayer], ConvertedLayer]

    @property
    def dense(self) -> bool:
        return self.kernel.startswith("dense.")

    @property
    def half(self) -> torch.dtype | None:
        """What it computes in, None for float32 and int8: its outputs differ from float32's, so the user has to allow it."""
        return HALF_KERNELS.get(self.kernel)


def _always(layer: ConvertedLayer) -> str | None:
    return None


def _has_onednn(layer: ConvertedLayer) -> str | None:
    return None if torch.backends.mkldnn.is_available() else "this torch has no oneDNN"


def _is_depthwise(layer: ConvertedLayer) -> str | None:
    assert isinstance(layer, DenseConv2d)
    return None if layer.geometry.depthwise else "not depthwise"


def _not_depthwise(layer: ConvertedLayer) -> str | None:
    assert isinstance(layer, DenseConv2d)
    return "depthwise" if layer.geometry.depthwise else None


def _is_quantized(layer: ConvertedLayer) -> str | None:
    return None if layer.info.input is not None else "not quantised"


def _has_twin(layer: ConvertedLayer) -> str | None:
    """Why Triton's kernel can't be tried beside the other int8 one: not both are there, or Triton's would not be fast:
    depthwise convolutions are no matrix products, and what a mean shift adds it has no kernel for."""
    if reason := _is_quantized(layer):
        return reason
    if not cuda.has_both(_weight(layer).device):
        return "int8 has one kernel here, not two"
    depthwise = isinstance(layer, DenseConv2d) and layer.geometry.depthwise
    return "Triton's int8 kernels are not tried" if depthwise or layer.info.weight_shift is not None else None


def _is_sparse(layer: ConvertedLayer) -> str | None:
    if layer.info.input is not None:
        return "quantised: runs in int8 or dense"
    zeros = sparsity_of_weight(layer)
    return None if zeros >= MIN_SPARSITY else f"{zeros:.0%} zeros: sparse kernels need {MIN_SPARSITY:.0%}"


def _why_no_zeros_in_int8(layer: ConvertedLayer) -> str | None:
    """Why a layer has no int8 weights that may be zero, None if it has."""
    if layer.info.input is None:
        return "not quantised"
    return None if layer.info.weight_shift is None else "mean-shift weights have no zeros"


def _why_not_sparse_on_cpu(layer: ConvertedLayer) -> str | None:
    depthwise = isinstance(layer, DenseConv2d) and layer.geometry.depthwise
    reason = "sparse int8 kernels have no depthwise convolution" if depthwise else None
    return _why_no_zeros_in_int8(layer) or reason


def _is_scattered_quantized(layer: ConvertedLayer) -> str | None:
    if reason := _why_not_sparse_on_cpu(layer):
        return reason
    zeros = sparsity_of_weight(layer)
    return None if zeros >= MIN_SPARSITY else f"{zeros:.0%} zeros: sparse int8 kernels need {MIN_SPARSITY:.0%}"


def _is_sparse_quantized(layer: ConvertedLayer) -> str | None:
    if reason := _why_not_sparse_on_cpu(layer):
        return reason
    empty = empty_quads(layer)
    if empty >= MIN_SPARSITY:
        return None
    return f"{empty:.0%} of the quads of input channels are zero: sparse int8 kernels need {MIN_SPARSITY:.0%}"


def _why_not_on_gpu(layer: ConvertedLayer) -> str | None:
    """Why no sparse kernel of a GPU can run a layer, None if one can."""
    if reason := _why_no_zeros_in_int8(layer):
        return reason
    assert isinstance(layer, (DenseConv2d, DenseLinear))
    name = layer.nonlinearity
    return f"a GPU's sparse int8 kernels end in a clamp, not in {name}" if name else None


def _why_not_packed(layer: ConvertedLayer) -> str | None:
    """Why no kernel with packed sparse weights can run a layer, None if one can."""
    if reason := _why_not_on_gpu(layer):
        return reason
    if isinstance(layer, DenseConv2d):
        g = layer.geometry
        return why_not(g.in_channels, g.kernel_size, g.groups)
    return why_not(_weight(layer).shape[1], (1, 1), 1)


def _is_2to4_quantized(layer: ConvertedLayer) -> str | None:
    reason = _why_not_packed(layer)
    if reason is None and (where := first_violation(weight4d(layer))):
        reason = f"not 2:4: {where}"
    return reason


def _has_empty_blocks(layer: ConvertedLayer) -> str | None:
    if reason := _why_not_packed(layer):
        return reason
    empty = 1 - kept_fraction(weight4d(layer), SLICE, CHUNK_BYTES, groups_of(layer))
    if empty >= MIN_SPARSITY:
        return None
    return f"{empty:.0%} of the {SLICE}x{CHUNK_BYTES} blocks are zero: their kernel needs {MIN_SPARSITY:.0%}"


def _why_not_gathered(layer: ConvertedLayer) -> str | None:
    """Why no kernel that gathers rows of inputs for runs of outputs can run a layer, None if one can."""
    if reason := _why_not_on_gpu(layer):
        return reason
    conv = layer.geometry if isinstance(layer, DenseConv2d) else None
    if conv and conv.depthwise:
        return "depthwise: no outputs share their inputs"
    return too_many_taps(conv.kernel_size) if conv else None


def _has_empty_runs(layer: ConvertedLayer) -> str | None:
    if reason := _why_not_gathered(layer):
        return reason
    empty = 1 - kept_fraction(weight4d(layer), RUN, QUAD, groups_of(layer))
    if empty >= MIN_SPARSITY:
        return None
    return f"{empty:.0%} of the runs of {RUN}x{QUAD} weights are zero: their kernel needs {MIN_SPARSITY:.0%}"


def _is_vnm_quantized(layer: ConvertedLayer) -> str | None:
    if reason := _why_not_gathered(layer):
        return reason
    weight, groups = weight4d(layer), groups_of(layer)
    if (m := find_m(weight, groups)) is None:
        return "not 64:2:M for any M of at least 8"
    empty = 1 - kept_columns(weight, m, groups)
    if empty >= MIN_SPARSITY:
        return None
    return f"{max(0.0, empty):.0%} of the input channels of 64 outputs are zero: V:2:M needs {MIN_SPARSITY:.0%}"


def _twin_of(applies: Callable[[ConvertedLayer], str | None]) -> Callable[[ConvertedLayer], str | None]:
    """Why Triton's sparse kernel can't be tried beside the CUDA one, to which ``applies`` belongs."""

    def why_not(layer: ConvertedLayer) -> str | None:
        both = cuda.has_both(_weight(layer).device)
        return applies(layer) if both else "sparse int8 has one kernel here for each pattern, not two"

    return why_not


def groups_of(layer: ConvertedLayer) -> int:
    """Groups of a convolution; 1 of a linear layer."""
    return layer.geometry.groups if isinstance(layer, DenseConv2d) else 1


def weight4d(layer: ConvertedLayer) -> Tensor:
    """The weight (K, C/G, R, S) of a dense layer."""
    weight = _weight(layer)
    return weight if weight.dim() == 4 else weight[..., None, None]


def _dense(kernel: str) -> Callable[[ConvertedLayer], ConvertedLayer]:
    def build(layer: ConvertedLayer) -> ConvertedLayer:
        assert isinstance(layer, (DenseConv2d, DenseLinear))
        return layer.with_kernel(kernel)

    return build


def _plain_linear(layer: ConvertedLayer) -> ConvertedLayer:
    return layer if layer.kernel == LINEAR_KERNELS[0] else _dense(LINEAR_KERNELS[0])(layer)


def _int8_weight(weight: Tensor, info: LayerInfo) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 weight, its scale and its shift."""
    return *quantize_weight(weight, info.weight_scale, info.weight_shift), info.weight_shift


def _quant_conv(cls: type[QuantConv2d]) -> Callable[[ConvertedLayer], ConvertedLayer]:
    def build(layer: ConvertedLayer) -> ConvertedLayer:
        assert isinstance(layer, DenseConv2d) and layer.info.input is not None
        q, scale, shift = _int8_weight(layer.weight, layer.info)
        more: dict[str, Any] = {"weight_shift": shift, "nonlinearity": layer.nonlinearity}
        return cls(layer.geometry, q, scale, layer.bias, layer.info.input, layer.activation, **more)

    return build


def _quant_linear(cls: type[QuantLinear]) -> Callable[[ConvertedLayer], ConvertedLayer]:
    def build(layer: ConvertedLayer) -> ConvertedLayer:
        assert isinstance(layer, DenseLinear) and layer.info.input is not None
        q, scale, shift = _int8_weight(layer.weight, layer.info)
        more: dict[str, Any] = {"weight_shift": shift, "nonlinearity": layer.nonlinearity}
        return cls(q, scale, layer.bias, layer.info.input, layer.activation, **more)

    return build


def _sparse_conv(layer: ConvertedLayer) -> ConvertedLayer:
    assert isinstance(layer, DenseConv2d)
    return SparseConv2d(layer.geometry, layer.weight.detach(), layer.bias, layer.activation)


def _sparse_linear(layer: ConvertedLayer) -> ConvertedLayer:
    assert isinstance(layer, DenseLinear)
    return SparseLinear(layer.weight.detach(), layer.bias, layer.activation)


_ANY = ("cpu", "cuda")
_IN_HALF = tuple(Candidate(f"dense.{fmt}", fmt, fmt, ("cuda",), _always, _dense(f"dense.{fmt}")) for fmt in HALVES)
CONV_CANDIDATES = (
    Candidate("dense.nchw", NCHW, NCHW, _ANY, _always, _dense("dense.nchw")),
    Candidate("dense.channels_last", NHWC, NHWC, _ANY, _always, _dense("dense.channels_last")),
    Candidate("dense.fused", NHWC, NHWC, ("cpu",), _has_onednn, _dense("dense.fused")),
    Candidate(DEPTHWISE_KERNEL, NCHW, NCHW, ("cpu",), _is_depthwise, _dense(DEPTHWISE_KERNEL)),
    Candidate(DIRECT_KERNEL, NCHW, NCHW, ("cpu",), _not_depthwise, _dense(DIRECT_KERNEL)),
    *_IN_HALF,
    Candidate("conv2d_int8", Q8, NHWC, _ANY, _is_quantized, _quant_conv(QuantConv2d)),
    Candidate("conv2d_int8.triton", Q8, NHWC, ("cuda",), _has_twin, _quant_conv(TritonQuantConv2d)),
    Candidate("conv2d_sparse_int8", Q8, NHWC, ("cpu",), _is_sparse_quantized, _quant_conv(SparseQuantConv2d)),
    Candidate("conv2d_scattered_int8", Q8, NHWC, ("cpu",), _is_scattered_quantized, _quant_conv(ScatteredQuantConv2d)),
    Candidate("conv2d_sparse24_int8", Q8, NHWC, ("cuda",), _is_2to4_quantized, _quant_conv(Sparse24QuantConv2d)),
    Candidate("conv2d_blocks_int8", Q8, NHWC, ("cuda",), _has_empty_blocks, _quant_conv(BlocksQuantConv2d)),
    Candidate("conv2d_vectors_int8", Q8, NHWC, ("cuda",), _has_empty_runs, _quant_conv(VectorsQuantConv2d)),
    Candidate(
        "conv2d_blocks_int8.triton",
        Q8,
        NHWC,
        ("cuda",),
        _twin_of(_has_empty_blocks),
        _quant_conv(TritonBlocksQuantConv2d),
    ),
    Candidate(
        "conv2d_vectors_int8.triton",
        Q8,
        NHWC,
        ("cuda",),
        _twin_of(_has_empty_runs),
        _quant_conv(TritonVectorsQuantConv2d),
    ),
    Candidate("conv2d_vnm_int8", Q8, NHWC, ("cuda",), _is_vnm_quantized, _quant_conv(VnmQuantConv2d)),
    Candidate("conv2d_sparse", NCHW, NCHW, _ANY, _is_sparse, _sparse_conv),
)
LINEAR_CANDIDATES = (
    Candidate("dense.linear", NCHW, NCHW, _ANY, _always, _plain_linear),
    Candidate(ROWS_KERNEL, NCHW, NCHW, ("cpu",), _always, _dense(ROWS_KERNEL)),
    *_IN_HALF,
    Candidate("linear_int8", Q8, NCHW, _ANY, _is_quantized, _quant_linear(QuantLinear)),
    Candidate("linear_int8.triton", Q8, NCHW, ("cuda",), _has_twin, _quant_linear(TritonQuantLinear)),
    Candidate("linear_sparse_int8", Q8, NCHW, ("cpu",), _is_sparse_quantized, _quant_linear(SparseQuantLinear)),
    Candidate("linear_sparse24_int8", Q8, NCHW, ("cuda",), _is_2to4_quantized, _quant_linear(Sparse24QuantLinear)),
    Candidate("linear_blocks_int8", Q8, NCHW, ("cuda",), _has_empty_blocks, _quant_linear(BlocksQuantLinear)),
    Candidate("linear_vectors_int8", Q8, NCHW, ("cuda",), _has_empty_runs, _quant_linear(VectorsQuantLinear)),
    Candidate(
        "linear_blocks_int8.triton",
        Q8,
        NCHW,
        ("cuda",),
        _twin_of(_has_empty_blocks),
        _quant_linear(TritonBlocksQuantLinear),
    ),
    Candidate(
        "linear_vectors_int8.triton",
        Q8,
        NCHW,
        ("cuda",),
        _twin_of(_has_empty_runs),
        _quant_linear(TritonVectorsQuantLinear),
    ),
    Candidate("linear_vnm_int8", Q8, NCHW, ("cuda",), _is_vnm_quantized, _quant_linear(VnmQuantLinear)),
    Candidate("linear_sparse", NCHW, NCHW, _ANY, _is_sparse, _sparse_linear),
)


def table(layer: ConvertedLayer) -> tuple[Candidate, ...]:
    """All candidates for this type of layer, whether they apply or not."""
    return CONV_CANDIDATES if isinstance(layer, DenseConv2d) else LINEAR_CANDIDATES


@dataclass
class Option:
    """A candidate that can run one particular layer, built, with its median seconds (NaN until measured)."""

    candidate: Candidate
    layer: ConvertedLayer
    seconds: float = float("nan")


def options_for(layer: ConvertedLayer, device: str) -> tuple[list[Option], str]:
    """The candidates that can run ``layer`` on ``device`` (dense first), and one line why compressed ones can't."""
    options: list[Option] = []
    reasons: list[str] = []
    for candidate in table(layer):
        if device in candidate.devices:
            reason = candidate.applies(layer)
        elif candidate.devices == ("cuda",):
            continue  # on a CPU nobody misses it
        else:
            reason = f"{candidate.kernel} needs a CPU"
        if reason is None:
            try:
                built = candidate.build(layer)
            except CnncompError as error:  # e.g. a reduction too long for int32: the layer stays dense and says so
                reason = str(error)
                if isinstance(error, DeviceError) and candidate.kernel in ("conv2d_int8", "linear_int8"):
                    warnings.warn(f"quantised layers run in float: {reason}", UserWarning, stacklevel=2)
            else:
                built.info = layer.info
                options.append(Option(candidate, built))
        if reason is not None and not candidate.dense:
            reasons.append(reason)
    return options, "; ".join(dict.fromkeys(reasons))


def heuristic(layer: ConvertedLayer, options: list[Option]) -> Option:
    """The choice without measurement: int8 where quantised, sparse from 60 % zeros, else dense, our own if depthwise or a
    network's first layer."""
    by_name = {o.candidate.kernel: o for o in options}
    if "conv2d_scattered_int8" in by_name and sparsity_of_weight(layer) >= HEURISTIC_SPARSITY:
        # A quad takes about as long as two non-zeros on their own.
        few_quads = 1 - empty_quads(layer) <= 2 * (1 - sparsity_of_weight(layer))
        return by_name[
            "conv2d_sparse_int8" if few_quads and "conv2d_sparse_int8" in by_name else "conv2d_scattered_int8"
        ]
    for name in ("conv2d_int8", "linear_int8"):
        if name in by_name:
            return by_name[name]
    for name in ("conv2d_sparse", "linear_sparse"):
        if name in by_name and sparsity_of_weight(layer) >= HEURISTIC_SPARSITY:
            return by_name[name]
    if DIRECT_KERNEL in by_name and isinstance(layer, DenseConv2d):
        g = layer.geometry
        if g.in_channels // g.groups <= HEURISTIC_DIRECT:
            return by_name[DIRECT_KERNEL]
    return by_name.get(DEPTHWISE_KERNEL, options[0])
