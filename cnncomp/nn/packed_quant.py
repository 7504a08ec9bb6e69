"""int8 layers with weights packed for sparse kernels of a GPU: drop-in for :class:`QuantConv2d` and :class:`QuantLinear`, the
same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.nn.quant import QuantConv2d, QuantLinear
from cnncomp.nn.sparse_quant import ZerosQuant
from cnncomp.nn.units import Units, plain
from cnncomp.ops import cuda
from cnncomp.ops.conv2d_blocks import BLOCKS, BLOCKS_TRITON
from cnncomp.ops.conv2d_sparse24 import SPARSE24
from cnncomp.ops.conv2d_vectors import VECTORS, VECTORS_TRITON
from cnncomp.ops.conv2d_vnm import VNM
from cnncomp.ops.packed import Format
from cnncomp.sparsity import pack_2to4, pack_gathered, pack_vectors, pack_vnm
from cnncomp.sparsity.steps import pack_steps
from cnncomp.sparsity.two_four import check_2to4
from cnncomp.sparsity.vnm import check_m


class _PackedQuant(ZerosQuant):
    """The packed weight. On a CPU, which gains nothing by the format, the layer packs and runs as the dense int8 layer.

    Attributes:
        _format: Of the CUDA kernels.
        _twin: Of Triton's kernels for the same blocks, None for none. They run on a GPU for which this build has no others.
        _triton: They run on every GPU.
        _on_twin: The weight lies on a GPU in the format of ``_twin``.

    Raises:
        ArgumentError: a nonlinearity.
    """

    _format: Format
    _twin: Format | None = None
    _triton = False
    _on_twin = False

    def __init__(self, *args: Any, nonlinearity: str = "", **kwargs: Any) -> None:
        if nonlinearity:
            raise ArgumentError("nonlinearity", repr(nonlinearity), "none: other int8 layers have one")
        super().__init__(*args, **kwargs)

    @property
    def on_triton(self) -> bool:
        """Whether Triton's kernels run the layer on its GPU."""
        return self._triton or self._on_twin

    def _packed_as(self) -> Format:
        """The format in which the weight lies on a GPU."""
        return self._twin if self._twin and self._on_twin else self._format

    def _packed_operator(self) -> Callable[..., Tensor]:
        """The operator for it."""
        name = self.kernel.removesuffix(".triton") + self._packed_as().suffix
        operator: Callable[..., Tensor] = getattr(torch.ops.cnncomp, name)
        return operator

    def _pack_cuda(self, weight: Tensor) -> Tensor:
        from cnncomp.ops.cuda_sparse import check_device, check_triton

        weight = weight.reshape(*weight.shape[:2], *self._kernel_size())
        self._on_twin = self._twin is not None and (self._triton or cuda.backend(weight.device) == "triton")
        if block := self._packed_as().block:
            check_triton(weight.device)
            return pack_steps(weight, *block(weight.dtype), self.groups)
        check_device(weight.device)
        return self._pack_format(weight)

    def _pack_format(self, weight: Tensor) -> Tensor:
        raise NotImplementedError


class _PackedConv2d(_PackedQuant, QuantConv2d):
    def weight_int8(self) -> Tensor:
        if self.weight.device.type == "cpu":
            return super().weight_int8()
        g = self.geometry
        shape = (g.out_channels, g.in_channels // g.groups, *g.kernel_size)
        return self._packed_as().unpack(self.weight, shape, torch.int8, g.groups)

    def _image(self, x: Tensor, residual: Tensor | None, clamped: bool) -> Tensor:
        if self.weight.device.type == "cpu":
            return super()._image(x, residual, clamped)
        return self.run_on(self._packed_operator(), self.weight, x, residual, clamped)

    def run_on(
        self, operator: Callable[..., Tensor], weight: Tensor, x: Any, residual: Any, clamped: bool, **more: Any
    ) -> Any:
        """What the format's operator, or another function with its arguments, gives for the packed ``weight``."""
        g = self.geometry
        constants, lo, dtype = self._constants(clamped)
        return operator(
            self._input(x), weight, constants, residual, self.residual_scale, lo,
            g.kernel_size, g.stride, g.padding, g.dilation, g.groups, dtype, **more,
        )  # fmt: skip


class GatheredConv2d(_PackedConv2d):
    """A convolution whose kernels gather activations in units of images, and can give them so to the next such layer.

    Attributes:
        out_units: Whether the output is :class:`cnncomp.nn.units.Units`, of a batch that fills them, on a GPU. The input and
            the residual may be such in any case.
    """

    out_units = False

    @property
    def gathers(self) -> str | None:
        """The format's name, if the input and the output may lie in its units, for batches that fill them. Triton's int8
        kernels gather pixels as they are."""
        g, units = self.geometry, self._format.units
        if self._on_twin:
            return None
        assert units is not None
        whole = g.in_channels // g.groups % units.columns(torch.int8) == g.out_channels // g.groups % units.VECTOR == 0
        return self._format.name if whole and not g.conv1d else None

    def _epilogue(self, t: Tensor, residual: Any) -> Tensor:
        return super()._epilogue(t, residual.images() if isinstance(residual, Units) else residual)

    def run_on(
        self, operator: Callable[..., Tensor], weight: Tensor, x: Any, residual: Any, clamped: bool, **more: Any
    ) -> Any:
        units, n = self._format.units, x.shape[0]
        assert units is not None
        out_units = self.out_units and clamped and n > 0 and n % units.unit(torch.int8, n) == 0
        out = super().run_on(operator, weight, plain(x), plain(residual), clamped, out_units=out_units, **more)
        return Units(out) if out_units else out


class _PackedLinear(_PackedQuant, QuantLinear):
    def weight_int8(self) -> Tensor:
        if self.weight.device.type == "cpu":
            return super().weight_int8()
        shape = (self.out_features, self.in_features, 1, 1)
        return self._packed_as().unpack(self.weight, shape, torch.int8, 1).flatten(1)

    def _run(self, x: Tensor, residual: Tensor | None, clamped: bool = True) -> Tensor:
        if self.weight.device.type == "cpu":
            return super()._run(x, residual, clamped)
        constants, lo, dtype = self._constants(clamped)
        args = (self._input(x), self.weight, constants, residual, self.residual_scale, lo, dtype)
        return self._packed_operator()(*args)


class _Sparse24(_PackedQuant):
    _format = SPARSE24

    def _pack(self, weight: Tensor) -> Tensor:
        check_2to4(weight.reshape(*weight.shape[:2], *self._kernel_size()), self.groups)
        return super()._pack(weight)

    def _pack_format(self, weight: Tensor) -> Tensor:
        return pack_2to4(weight, self.groups)


class _Blocks(_PackedQuant):
    _format = BLOCKS
    _twin = BLOCKS_TRITON

    def _pack_format(self, weight: Tensor) -> Tensor:
        return pack_gathered(weight, self.groups)


class _Vectors(_PackedQuant):
    _format = VECTORS
    _twin = VECTORS_TRITON

    def _pack_format(self, weight: Tensor) -> Tensor:
        return pack_vectors(weight, self.groups)


class _Vnm(_PackedQuant):
    _format = VNM

    def _pack(self, weight: Tensor) -> Tensor:
        check_m(weight.reshape(*weight.shape[:2], *self._kernel_size()), self.groups)
        return super()._pack(weight)

    def _pack_format(self, weight: Tensor) -> Tensor:
        return pack_vnm(weight, check_m(weight, self.groups), self.groups)


class Sparse24QuantConv2d(_Sparse24, _PackedConv2d):
    """int8 convolution whose weights have at most two non-zeros in four neighbouring input channels, on a GPU's sparse tensor
    cores.

    Arguments, input, output and errors as :class:`QuantConv2d`, bit-equal to it.

    Raises:
        PatternError: a weight that is not 2:4; the message names the first four channels that are not.
        DeviceError: a GPU before sm_80.
        ArgumentError: mean-shift weights; a nonlinearity.
    """

    kernel = "conv2d_sparse24_int8"


class Sparse24QuantLinear(_Sparse24, _PackedLinear):
    """int8 linear with 2:4 sparse weights. See :class:`Sparse24QuantConv2d`."""

    kernel = "linear_sparse24_int8"


class BlocksQuantConv2d(_Blocks, _PackedConv2d):
    """int8 convolution on a GPU that leaves out all blocks of 64 outputs by 16 inputs at one tap that are zero.

    Arguments, input, output and errors as :class:`QuantConv2d`, bit-equal to it.

    Raises:
        DeviceError: a GPU before sm_80.
        ArgumentError: mean-shift weights; a nonlinearity.
    """

    kernel = "conv2d_blocks_int8"


class BlocksQuantLinear(_Blocks, _PackedLinear):
    """int8 linear with block sparse weights. See :class:`BlocksQuantConv2d`."""

    kernel = "linear_blocks_int8"


class VectorsQuantConv2d(_Vectors, GatheredConv2d):
    """int8 convolution on a GPU that leaves out all runs of 32 outputs by 4 inputs at one tap that are zero.

    Arguments, input, output and errors as :class:`QuantConv2d`, bit-equal to it. Batches of less than 8 are filled up.

    Raises:
        DeviceError: a GPU before sm_80.
        ArgumentError: mean-shift weights; a nonlinearity.
    """

    kernel = "conv2d_vectors_int8"


class VectorsQuantLinear(_Vectors, _PackedLinear):
    """int8 linear with runs of 32 outputs. See :class:`VectorsQuantConv2d`."""

    kernel = "linear_vectors_int8"


class TritonBlocksQuantConv2d(BlocksQuantConv2d):
    """:class:`BlocksQuantConv2d` on Triton's kernel where a GPU has others too. The same bits."""

    kernel = "conv2d_blocks_int8.triton"
    _triton = True


class TritonBlocksQuantLinear(BlocksQuantLinear):
    """:class:`BlocksQuantLinear` on Triton's kernel where a GPU has others too. The same bits."""

    kernel = "linear_blocks_int8.triton"
    _triton = True


class TritonVectorsQuantConv2d(VectorsQuantConv2d):
    """:class:`VectorsQuantConv2d` on Triton's kernel where a GPU has others too. The same bits."""

    kernel = "conv2d_vectors_int8.triton"
    _triton = True


class TritonVectorsQuantLinear(VectorsQuantLinear):
    """:class:`VectorsQuantLinear` on Triton's kernel where a GPU has others too. The same bits."""

    kernel = "linear_vectors_int8.triton"
    _triton = True


class VnmQuantConv2d(_Vnm, GatheredConv2d):
    """int8 convolution whose weights are 64:2:M (:mod:`cnncomp.sparsity.vnm`), on a GPU's sparse tensor cores.

    Arguments, input, output and errors as :class:`QuantConv2d`, bit-equal to it. Batches are filled up to 8, or to whole 16.

    M is the one that packs the weights most tightly.

    Raises:
        PatternError: a weight that is 64:2:M for no M; the message names what breaks the smallest one.
        DeviceError: a GPU before sm_80.
        ArgumentError: mean-shift weights; a nonlinearity.
    """

    kernel = "conv2d_vnm_int8"


class VnmQuantLinear(_Vnm, _PackedLinear):
    """int8 linear with 64:2:M weights. See :class:`VnmQuantConv2d`."""

    kernel = "linear_vnm_int8"
