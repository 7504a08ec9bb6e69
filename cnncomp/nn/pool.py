"""Max-pool that takes 8 bit as well as floats."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class QuantMaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` that keeps 8-bit images in 8 bit: max-pool changes no value, so scale and zero point stay.

    Ceil mode and returned indices are for float images only.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.is_floating_point() or self.ceil_mode or self.return_indices:
            return super().forward(input)

        def pair(v: int | tuple[int, ...]) -> list[int]:
            return [v, v] if isinstance(v, int) else list(v)

        stride = self.kernel_size if self.stride is None else self.stride
        return torch.ops.cnncomp.max_pool2d_int8(
            input, pair(self.kernel_size), pair(stride), pair(self.padding), pair(self.dilation)
        )

    @classmethod
    def from_float(cls, pool: nn.MaxPool2d) -> QuantMaxPool2d:
        """From torch's max-pool."""
        return cls(pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.return_indices, pool.ceil_mode)
