"""Dense float layers with a fused epilogue: what a compressed kernel has to beat, and what stays where none does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnncomp.errors import ArgumentError
from cnncomp.nn.base import (
    LINEAR,
    Clamp,
    ConvertedLayer,
    ConvLayer,
    Geometry,
    LinearLayer,
    clamp_add,
    clamp_config,
    clamp_from_config,
    geometry_config,
)

#: Kernels of a dense convolution: torch's conv2d in either layout, and oneDNN's with the epilogue fused and its weight laid
#: out once, as torch.compile does it when weights are frozen.
CONV_KERNELS = ("dense.nchw", "dense.channels_last", "dense.fused")
#: For depthwise convolutions also this package's own, on a CPU.
DEPTHWISE_KERNEL = "dense.depthwise"
#: Those that read and write contiguous images; the others take channels_last.
NCHW_KERNELS = frozenset(("dense.nchw", DEPTHWISE_KERNEL))


def dense_kernels(geometry: Geometry, device: str) -> tuple[str, ...]:
    """The dense kernels that can run a convolution on a kind of device ("cpu", "cuda")."""
    if device != "cpu":
        return tuple(k for k in CONV_KERNELS if k != "dense.fused")
    return (*CONV_KERNELS, DEPTHWISE_KERNEL) if geometry.depthwise else CONV_KERNELS


class _Packed:
    """A weight in oneDNN's own layout, made at the first call. Copies start empty: the layout can't be copied or stored."""

    def __init__(self) -> None:
        self._made: tuple[tuple[int, int], Tensor] | None = None  # of which weight, and what

    def __deepcopy__(self, memo: dict[int, Any]) -> _Packed:
        return _Packed()

    def __reduce__(self) -> tuple[type[_Packed], tuple[()]]:
        return _Packed, ()

    def get(self, weight: Tensor, g: Geometry, shape: torch.Size) -> Tensor:
        """``weight`` packed for inputs of ``shape``; those of other shapes give the same, perhaps slower."""
        key = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        made = self._made
        if made is None or made[0] != key:
            where = (list(g.padding), list(g.stride), list(g.dilation), g.groups)
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *where, list(shape))
            self._made = made = (key, packed)
        return made[1]


class _Dense(ConvertedLayer):
    """Bounds of the activation: one interval, and ``upper`` (K,) where each channel has its own."""

    upper: Tensor | None

    def _bound(self, activation: Clamp) -> None:
        self.activation = activation
        self._interval = Clamp(activation.lo) if isinstance(activation.hi, tuple) else activation
        upper = torch.tensor(activation.hi) if isinstance(activation.hi, tuple) else None
        self.register_buffer("upper", upper, persistent=False)

    def _bounded(self, t: Tensor) -> Tensor:
        if self.upper is None:
            return t
        behind = 0 if isinstance(self, LinearLayer) else t.dim() - 2  # dimensions behind the channels
        return torch.minimum(t, self.upper.view(-1, *[1] * behind))

    def _epilogue(self, t: Tensor, residual: Tensor) -> Tensor:
        return self._bounded(clamp_add(t, residual, self._interval))


class DenseConv2d(_Dense, ConvLayer):
    """fp32 convolution, bias, residual and clamp. Input (N, C, H, W) (or (N, C, L)), output (N, K, P, Q).

    ``kernel`` is one of :data:`CONV_KERNELS`, or :data:`DEPTHWISE_KERNEL` for a depthwise one. "dense.fused" and
    "dense.depthwise" run on the CPU in inference only; elsewhere torch's kernels stand in.
    """

    def __init__(
        self,
        geometry: Geometry,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: Clamp = LINEAR,
        kernel: str = "dense.nchw",
    ) -> None:
        super().__init__()
        if kernel not in (known := dense_kernels(geometry, "cpu")):
            raise ArgumentError("kernel", kernel, f"one of {', '.join(known)}")
        self.geometry, self.kernel = geometry, kernel
        self._bound(activation)
        self._packed = _Packed()
        layout = torch.contiguous_format if kernel in NCHW_KERNELS else torch.channels_last
        with torch.inference_mode(False):  # a tensor born in inference mode does not tell when it is changed
            self.weight = nn.Parameter(weight.detach().clone().contiguous(memory_format=layout), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def own_kernels(self) -> bool:
        return self.kernel == DEPTHWISE_KERNEL

    def _image(self, x: Tensor, residual: Tensor | None, clamped: bool) -> Tensor:
        if not clamped:
            return self._interval_image(x, residual, LINEAR)
        return self._bounded(self._interval_image(x, residual, self._interval))

    def _interval_image(self, x: Tensor, residual: Tensor | None, act: Clamp) -> Tensor:
        g = self.geometry
        if self.kernel in NCHW_KERNELS:
            x = x.contiguous()
            if self.kernel == DEPTHWISE_KERNEL and self._can_fuse(x, residual):
                lo, hi = act.lo, act.hi
                where = (g.stride, g.padding, g.dilation)
                return torch.ops.cnncomp.conv2d_depthwise(x, self.weight, self.bias, residual, lo, hi, *where)
        else:
            x = x.contiguous(memory_format=torch.channels_last)
            if self.kernel == "dense.fused" and self._can_fuse(x, residual):
                return self._fused(x, residual, act)
        t = F.conv2d(x, self.weight, self.bias, g.stride, g.padding, g.dilation, g.groups)
        return clamp_add(t, residual, act)

    @staticmethod
    def _can_fuse(x: Tensor, residual: Tensor | None) -> bool:
        """Fused operators have no gradient, and oneDNN's with a residual no fake function; a compiler fuses by itself."""
        if x.requires_grad or (residual is not None and residual.requires_grad) or torch.compiler.is_compiling():
            return False
        return x.device.type == "cpu" and x.numel() > 0

    def _fused(self, x: Tensor, residual: Tensor | None, act: Clamp) -> Tensor:
        g = self.geometry
        attr, scalars = ("none", []) if not act else ("hardtanh", [act.lo, act.hi])
        if act == Clamp(0.0):
            attr, scalars = "relu", []
        where = (list(g.padding), list(g.stride), list(g.dilation), g.groups)
        op = torch.ops.mkldnn._convolution_pointwise
        weight = self._packed.get(self.weight, g, x.shape)
        if residual is None:
            return op.default(x, weight, self.bias, *where, attr, scalars, "")
        residual = residual.contiguous(memory_format=torch.channels_last)
        if act and attr != "relu":  # oneDNN's binary form takes no hardtanh after the sum
            t = op.binary(x, residual, weight, self.bias, *where, "add", 1.0, None, [], None)
            return t.clamp_(act.lo, act.hi)
        return op.binary(x, residual, weight, self.bias, *where, "add", 1.0, "relu" if act else None, [], None)

    def config(self) -> dict[str, Any]:
        return {
            "geometry": geometry_config(self.geometry),
            "activation": clamp_config(self.activation),
            "kernel": self.kernel,
        }

    def tensors(self) -> dict[str, Tensor]:
        out = {"weight": self.weight.detach()}
        return out if self.bias is None else {**out, "bias": self.bias.detach()}

    @classmethod
    def build(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> DenseConv2d:
        return cls(
            Geometry.from_config(config["geometry"]),
            tensors["weight"],
            tensors.get("bias"),
            clamp_from_config(config["activation"]),
            config["kernel"],
        )

    def to_dense(self) -> DenseConv2d:
        return self

    def with_kernel(self, kernel: str) -> DenseConv2d:
        """The same layer on another of its :func:`dense_kernels`."""
        return DenseConv2d(self.geometry, self.weight, self.bias, self.activation, kernel)

    def extra_repr(self) -> str:
        return f"{self.geometry} {self.activation} kernel={self.kernel}"


class DenseLinear(_Dense, LinearLayer):
    """fp32 linear, bias, residual and clamp. Input (..., C), output (..., K)."""

    kernel = "dense.linear"

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: Clamp = LINEAR,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._bound(activation)
        self.weight = nn.Parameter(weight.detach().clone().contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def _run(self, x: Tensor, residual: Tensor | None, clamped: bool = True) -> Tensor:
        t = F.linear(x, self.weight, self.bias)
        return self._bounded(clamp_add(t, residual, self._interval)) if clamped else clamp_add(t, residual, LINEAR)

    def config(self) -> dict[str, Any]:
        return {"activation": clamp_config(self.activation)}

    def tensors(self) -> dict[str, Tensor]:
        out = {"weight": self.weight.detach()}
        return out if self.bias is None else {**out, "bias": self.bias.detach()}

    @classmethod
    def build(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> DenseLinear:
        return cls(tensors["weight"], tensors.get("bias"), clamp_from_config(config["activation"]))

    def to_dense(self) -> DenseLinear:
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}→{self.out_features} {self.activation}"
