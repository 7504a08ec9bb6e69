"""Pools on kernels of this package."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from cnncomp.nn.base import runs_float_kernels
from cnncomp.nn.units import Units, as_images, from_images


def _ours(x: Tensor) -> bool:
    """Whether the float kernels of a CPU can take ``x``, images."""
    return runs_float_kernels(x) and x.dim() == 4


def _on_gpu(x: Tensor) -> bool:
    """Whether a GPU has a mean of its own for ``x``: NHWC, as int8 layers give it."""
    ours = x.device.type == "cuda" and x.dtype == torch.float32 and x.dim() == 4 and not x.requires_grad
    return ours and x.is_contiguous(memory_format=torch.channels_last)


class QuantMaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` that keeps 8-bit images in 8 bit: max-pool changes no value, so scale and zero point stay.

    Float images run in torch, but those in NCHW on a CPU. Returned indices are for float images only. Images in units
    (:class:`cnncomp.nn.units.Units`) stay in them.
    """

    def forward(self, input: Any) -> Any:
        if isinstance(input, Units):
            return Units(from_images(self.forward(as_images(input.tensor)), input.tensor))
        eight_bit = input.dtype in (torch.uint8, torch.int8)
        if self.return_indices or not (eight_bit or (_ours(input) and input.is_contiguous())):
            return super().forward(input)

        def pair(v: int | tuple[int, ...]) -> list[int]:
            return [v, v] if isinstance(v, int) else list(v)

        stride = self.kernel_size if self.stride is None else self.stride
        window = (pair(self.kernel_size), pair(stride), pair(self.padding), pair(self.dilation))
        if eight_bit:
            return torch.ops.cnncomp.max_pool2d_int8(input, *window, self.ceil_mode)
        return torch.ops.cnncomp.max_pool2d(input, *window, self.ceil_mode)

    @classmethod
    def applies(cls, pool: nn.Module) -> TypeGuard[nn.MaxPool2d]:
        """Whether a module of torch's does the same."""
        return type(pool) is nn.MaxPool2d and not pool.return_indices

    @classmethod
    def from_float(cls, pool: nn.MaxPool2d) -> QuantMaxPool2d:
        """From torch's max-pool."""
        return cls(pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.return_indices, pool.ceil_mode)


class MeanPool2d(nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d(1)``: the mean of each channel."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.cnncomp.mean_pool2d(input) if _ours(input) or _on_gpu(input) else super().forward(input)

    @classmethod
    def applies(cls, pool: nn.Module) -> bool:
        """Whether a module of torch's does the same."""
        return type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1), [1, 1])
