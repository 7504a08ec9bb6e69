"""int8 layers with 2:4 sparse weights: drop-in for :class:`QuantConv2d` and :class:`QuantLinear`, the same bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.nn.quant import QuantConv2d, QuantLinear, _QuantLayer
from cnncomp.sparsity.two_four import check_2to4, pack_2to4, unpack_2to4


class _Sparse24Quant(_QuantLayer):
    """The packed weight. On a CPU, which gains nothing by the pattern, the layer packs and runs as the dense int8 layer."""

    def __init__(self, *args: Any, weight_shift: Tensor | None = None, **kwargs: Any) -> None:
        if weight_shift is not None:
            expected = "None: weights that are all shifted have no zeros"
            raise ArgumentError("weight_shift", "mean-shift weights", expected)
        super().__init__(*args, **kwargs)

    def _pack(self, weight: Tensor) -> Tensor:
        check_2to4(weight.reshape(*weight.shape[:2], *self._kernel_size()), self.groups)
        return super()._pack(weight)

    def _pack_cuda(self, weight: Tensor) -> Tensor:
        from cnncomp.ops.cuda_sparse import check_device

        check_device(weight.device)
        return pack_2to4(weight.reshape(*weight.shape[:2], *self._kernel_size()), self.groups)


class Sparse24QuantConv2d(_Sparse24Quant, QuantConv2d):
    """int8 convolution whose weights have at most two non-zeros in four neighbouring input channels, on a GPU's sparse tensor
    cores.

    Arguments, input, output and errors as :class:`QuantConv2d`, bit-equal to it.

    Raises:
        PatternError: a weight that is not 2:4; the message names the first four channels that are not.
        DeviceError: a GPU before sm_80.
        ArgumentError: mean-shift weights.
    """

    kernel = "conv2d_sparse24_int8"

    def weight_int8(self) -> Tensor:
        if self.weight.device.type == "cpu":
            return super().weight_int8()
        g = self.geometry
        shape = (g.out_channels, g.in_channels // g.groups, *g.kernel_size)
        return unpack_2to4(self.weight, shape, torch.int8, g.groups)

    def _image(self, x: Tensor, residual: Tensor | None, clamped: bool) -> Tensor:
        if self.weight.device.type == "cpu":
            return super()._image(x, residual, clamped)
        g = self.geometry
        constants, lo, dtype = self._constants(clamped)
        return torch.ops.cnncomp.conv2d_sparse24_int8(
            self._input(x), self.weight, constants, residual, self.residual_scale, lo,
            g.kernel_size, g.stride, g.padding, g.dilation, g.groups, dtype,
        )  # fmt: skip


class Sparse24QuantLinear(_Sparse24Quant, QuantLinear):
    """int8 linear with 2:4 sparse weights. See :class:`Sparse24QuantConv2d`."""

    kernel = "linear_sparse24_int8"

    def weight_int8(self) -> Tensor:
        if self.weight.device.type == "cpu":
            return super().weight_int8()
        return unpack_2to4(self.weight, (self.out_features, self.in_features, 1, 1), torch.int8).flatten(1)

    def _run(self, x: Tensor, residual: Tensor | None, clamped: bool = True) -> Tensor:
        if self.weight.device.type == "cpu":
            return super()._run(x, residual, clamped)
        constants, lo, dtype = self._constants(clamped)
        args = (self._input(x), self.weight, constants, residual, self.residual_scale, lo, dtype)
        return torch.ops.cnncomp.linear_sparse24_int8(*args)
