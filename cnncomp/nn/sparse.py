"""fp32 layers with unstructured sparse weights, drop-in for ``nn.Conv2d`` and ``nn.Linear``."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp.errors import ArgumentError
from cnncomp.nn.base import (
    LINEAR,
    Clamp,
    ConvertedLayer,
    ConvLayer,
    Geometry,
    LinearLayer,
    check_bias,
    check_layer,
    clamp_config,
    clamp_from_config,
    geometry_config,
)
from cnncomp.nn.dense import DenseConv2d, DenseLinear
from cnncomp.ops.packing import PackedSparse, default_block, pack_sparse, unpack_sparse


def cuda_kernels() -> ModuleType:
    """Imported where a layer meets a GPU, not before."""
    from cnncomp.ops import cuda

    return cuda


def _number(bound: float | tuple[float, ...]) -> float:
    assert not isinstance(bound, tuple)
    return bound


class _SparseLayer(ConvertedLayer):
    """The packed weight as buffers, shared by the sparse conv and linear."""

    values: Tensor
    index: Tensor
    row_ptr: Tensor
    bias: Tensor | None
    block: int
    groups = 1

    def _setup(self, weight: Tensor, bias: Tensor | None, activation: Clamp) -> None:
        if isinstance(activation.hi, tuple):
            raise ArgumentError("activation", "upper bounds per channel", "one bound: the sparse kernels take no other")
        check_bias(bias, weight.shape[0])
        self.activation = activation
        self.shape4d = tuple(weight.shape)
        for name in ("values", "index", "row_ptr"):
            self.register_buffer(name, torch.empty(0))
        self._pack(weight)
        if not bool(
            torch.isfinite(self.values).all()
        ):  # asked of the few that are left: of all it takes twice their memory
            raise ArgumentError("weight", "NaN or infinite values", "finite weights")
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def _pack(self, weight: Tensor) -> None:
        """Take ``weight`` (K, C/G, R, S), in the format of the kernels of its device."""
        if weight.device.type == "cpu":
            packed = pack_sparse(weight, self.groups, default_block(weight, isinstance(self, SparseLinear)))
        else:
            packed = cuda_kernels().pack_sparse(weight, self.groups)
        self.values, self.index, self.row_ptr, self.block = packed

    def _weight4d(self) -> Tensor:
        packed = PackedSparse(self.values, self.index, self.row_ptr, self.block)
        if self.values.device.type != "cpu":
            return cuda_kernels().unpack_sparse(packed, self.shape4d, self.groups)
        k, channels, r, s = self.shape4d
        return unpack_sparse(packed, channels * self.groups, k, (r, s), self.groups)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConvertedLayer:
        before, after = self.values.device.type, fn(self.values[:0]).device.type
        weight = self._weight4d() if "meta" not in (before, after) and before != after else None
        super()._apply(fn, recurse)
        if weight is not None:
            self._pack(weight.to(self.values.device))
        return self

    def weight_dense(self) -> Tensor:
        """The unpacked float32 weight, zeros included."""
        raise NotImplementedError

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        total = math.prod(self.shape4d)
        return 1 - int(torch.count_nonzero(self.values)) / total if total else 0.0

    def config(self) -> dict[str, Any]:
        return {"activation": clamp_config(self.activation)}

    def tensors(self) -> dict[str, Tensor]:
        out = {"weight": self.weight_dense()}
        return out if self.bias is None else {**out, "bias": self.bias}


class SparseConv2d(_SparseLayer, ConvLayer):
    """Sparse fp32 convolution with fused bias, residual and clamp; the zeros of ``weight`` cost nothing.

    Input (N, C, H, W) (or (N, C, L)) float32, output (N, K, P, Q) float32, within 1e-5 relative of torch's dense one.

    Args:
        weight: float32 ``(K, C/G, R, S)``; ``bias``: float32 ``(K,)`` or None.

    Raises:
        ArgumentError: NaN or infinite weights, an input with another number of channels.
    """

    kernel = "conv2d_sparse"

    def __init__(
        self,
        geometry: Geometry,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: Clamp = LINEAR,
    ) -> None:
        super().__init__()
        geometry.check(weight)
        self.geometry, self.groups = geometry, geometry.groups
        self._setup(weight, bias, activation)

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d | nn.Conv1d,
        activation: Clamp = LINEAR,
    ) -> SparseConv2d:
        """From a torch convolution, masked (:func:`cnncomp.prune`) or with zeros in its weight."""
        geometry = Geometry.of(conv)
        weight = conv.weight.detach().reshape(geometry.out_channels, -1, *geometry.kernel_size)
        return cls(geometry, weight, conv.bias, activation)

    def weight_dense(self) -> Tensor:
        return self._weight4d()

    def _image(self, x: Tensor, residual: Tensor | None, clamped: bool) -> Tensor:
        g, act = self.geometry, self.activation if clamped else LINEAR
        return torch.ops.cnncomp.conv2d_sparse(
            x, self.values, self.index, self.row_ptr, self.block, self.bias, residual, act.lo, _number(act.hi),
            g.out_channels, g.kernel_size, g.stride, g.padding, g.dilation, g.groups,
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        return {"geometry": geometry_config(self.geometry), **super().config()}

    @classmethod
    def build(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> SparseConv2d:
        return cls(
            Geometry.from_config(config["geometry"]),
            tensors["weight"],
            tensors.get("bias"),
            clamp_from_config(config["activation"]),
        )

    def to_dense(self) -> DenseConv2d:
        """The dense convolution with the same weights."""
        dense = DenseConv2d(self.geometry, self.weight_dense(), self.bias, self.activation)
        dense.info = self.info
        return dense

    def extra_repr(self) -> str:
        return f"{self.geometry} {self.sparsity:.0%} zeros {self.activation}"


class SparseLinear(_SparseLayer, LinearLayer):
    """Sparse fp32 linear with the same epilogue. Input (..., C), output (..., K). See :class:`SparseConv2d`."""

    kernel = "linear_sparse"

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: Clamp = LINEAR,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._setup(weight.reshape(*weight.shape, 1, 1), bias, activation)

    @classmethod
    def from_float(cls, linear: nn.Linear, activation: Clamp = LINEAR) -> SparseLinear:
        """From a torch linear, masked or with zeros in its weight.

        Raises:
            ArgumentError: another module.
        """
        check_layer("linear", linear, nn.Linear)
        return cls(linear.weight.detach(), linear.bias, activation)

    def weight_dense(self) -> Tensor:
        return self._weight4d().flatten(1)

    def _run(self, x: Tensor, residual: Tensor | None, clamped: bool = True) -> Tensor:
        act = self.activation if clamped else LINEAR
        return torch.ops.cnncomp.linear_sparse(
            x,
            self.values,
            self.index,
            self.row_ptr,
            self.block,
            self.bias,
            residual,
            act.lo,
            _number(act.hi),
            self.out_features,
        )

    @classmethod
    def build(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> SparseLinear:
        return cls(tensors["weight"], tensors.get("bias"), clamp_from_config(config["activation"]))

    def to_dense(self) -> DenseLinear:
        """The dense linear with the same weights."""
        dense = DenseLinear(self.weight_dense(), self.bias, self.activation)
        dense.info = self.info
        return dense

    def extra_repr(self) -> str:
        return f"{self.in_features}→{self.out_features} {self.sparsity:.0%} zeros {self.activation}"
