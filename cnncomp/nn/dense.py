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

    ``kernel`` is one of :data:`CONV_KERNELS`. "dense.fused" runs on the CPU in inference only.
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
        if kernel not in CONV_KERNELS:
            raise ArgumentError("kernel", kernel, f"one of {', '.join(CONV_KERNELS)}")
        self.geometry, self.kernel = geometry, kernel
        self._bound(activation)
        self._packed = _Packed()
        layout = torch.contiguous_format if kernel == "dense.nchw" else torch.channels_last
        with torch.inference_mode(False):  # a tensor born in inference mode does not tell when it is changed
            self.weight = nn.Parameter(weight.detach().clone().contiguous(memory_format=layout), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def _image(self, x: Tensor, residual: Tensor | None, clamped: bool) -> Tensor:
        if not clamped:
            return self._interval_image(x, residual, LINEAR)
        return self._bounded(self._interval_image(x, residual, self._interval))

    def _interval_image(self, x: Tensor, residual: Tensor | None, act: Clamp) -> Tensor:
        g = self.geometry
        if self.kernel == "dense.nchw":
            x = x.contiguous()
        else:
            x = x.contiguous(memory_format=torch.channels_last)
            if self.kernel == "dense.fused" and self._can_fuse(x):
                return self._fused(x, residual, act)
        t = F.conv2d(x, self.weight, self.bias, g.stride, g.padding, g.dilation, g.groups)
        return clamp_add(t, residual, act)

    @staticmethod
    def _can_fuse(x: Tensor) -> bool:
        """oneDNN's fused operators have no gradient and, with a residual, no fake function; a compiler fuses by itself."""
        return x.device.type == "cpu" and x.numel() > 0 and not x.requires_grad and not torch.compiler.is_compiling()

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
        """The same layer on another of :data:`CONV_KERNELS`."""
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
