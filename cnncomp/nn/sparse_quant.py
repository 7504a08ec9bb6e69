"""int8 layers with sparse weights: drop-in for :class:`QuantConv2d` and :class:`QuantLinear`, the same bits, on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.nn.quant import QuantConv2d, QuantLinear, _QuantLayer
from cnncomp.ops.packing import (
    PackedSparse,
    pack_scattered_int8,
    pack_sparse_int8,
    unpack_scattered_int8,
    unpack_sparse_int8,
)


class ZerosQuant(_QuantLayer):
    """An int8 layer that gains by zeros in its weights.

    Raises:
        ArgumentError: mean-shift weights; an output in half precision.
    """

    def __init__(self, *args: Any, weight_shift: Tensor | None = None, **kwargs: Any) -> None:
        if weight_shift is not None:
            expected = "None: weights that are all shifted have no zeros"
            raise ArgumentError("weight_shift", "mean-shift weights", expected)
        super().__init__(*args, **kwargs)
        if self.float_dtype != torch.float32:
            raise ArgumentError("float_dtype", self.float_dtype, "torch.float32: dense int8 layers have others")


class _SparseQuant(ZerosQuant):
    """The packed weight: ``weight`` holds the quads with any non-zero, and where they belong is in two more buffers. On a GPU,
    which has no kernel for it, the layer keeps the dense int8 weight and runs as the dense int8 layer."""

    index: Tensor
    row_ptr: Tensor
    block: int
    _pack_kept = staticmethod(pack_sparse_int8)
    _unpack_kept = staticmethod(unpack_sparse_int8)

    def _pack(self, weight: Tensor) -> Tensor:
        if weight.device.type != "cpu":
            empty = torch.empty(0, dtype=torch.int32, device=weight.device)
            self._place(empty.to(torch.int16), empty, 1)
            return super()._pack(weight)
        packed = self._pack_kept(weight.reshape(*weight.shape[:2], *self._kernel_size()), self.groups)
        self._place(packed.positions, packed.row_ptr, packed.block)
        return packed.values

    def _place(self, index: Tensor, row_ptr: Tensor, block: int) -> None:
        self.register_buffer("index", index)
        self.register_buffer("row_ptr", row_ptr)
        self.block = block

    def _packed(self) -> PackedSparse:
        return PackedSparse(self.weight, self.index, self.row_ptr, self.block)


class SparseQuantConv2d(_SparseQuant, QuantConv2d):
    """int8 convolution that leaves out the quads of four input channels whose weights are all zero.

    Arguments, input, output and errors as :class:`QuantConv2d`, bit-equal to it.

    Raises:
        ArgumentError: mean-shift weights.
    """

    kernel = "conv2d_sparse_int8"

    def weight_int8(self) -> Tensor:
        g = self.geometry
        if self.weight.device.type != "cpu":
            return super().weight_int8()
        return self._unpack_kept(self._packed(), g.in_channels, g.out_channels, g.kernel_size, g.groups)

    def _image(self, x: Tensor, residual: Tensor | None, clamped: bool) -> Tensor:
        if x.device.type != "cpu":
            return super()._image(x, residual, clamped)
        g = self.geometry
        constants, lo, dtype = self._constants(clamped)
        return torch.ops.cnncomp.conv2d_sparse_int8(
            self._input(x), *self._packed(), constants, residual, self.residual_scale, lo,
            g.kernel_size, g.stride, g.padding, g.dilation, g.groups, dtype, *self._ending(clamped),
        )  # fmt: skip


class ScatteredQuantConv2d(SparseQuantConv2d):
    """int8 convolution that leaves out every zero, wherever it is: for weights without runs. See :class:`SparseQuantConv2d`."""

    kernel = "conv2d_scattered_int8"
    _pack_kept = staticmethod(pack_scattered_int8)
    _unpack_kept = staticmethod(unpack_scattered_int8)


class SparseQuantLinear(_SparseQuant, QuantLinear):
    """int8 linear that leaves out the quads of four inputs whose weights are all zero. See :class:`SparseQuantConv2d`."""

    kernel = "linear_sparse_int8"

    def weight_int8(self) -> Tensor:
        if self.weight.device.type != "cpu":
            return super().weight_int8()
        return self._unpack_kept(self._packed(), self.in_features, self.out_features, (1, 1)).flatten(1)

    def _run(self, x: Tensor, residual: Tensor | None, clamped: bool = True) -> Tensor:
        if x.device.type != "cpu":
            return super()._run(x, residual, clamped)
        constants, lo, dtype = self._constants(clamped)
        args = (self._input(x), *self._packed(), constants, residual, self.residual_scale, lo, dtype)
        return torch.ops.cnncomp.linear_sparse_int8(*args, *self._ending(clamped))
