"""An activation with an upper bound of its own for each channel: what ReLU6 becomes when channels are rescaled."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClampChannels(nn.Module):
    """``min(max(x, lo), hi[c])`` for x (N, C, ...).

    Args:
        channels: C.
        lo: the lower bound of all channels.

    The upper bounds ``hi`` (C,) are a buffer, infinite until they are set.
    """

    hi: Tensor

    def __init__(self, channels: int, lo: float = 0.0) -> None:
        super().__init__()
        self.channels, self.lo = channels, lo
        self.register_buffer("hi", torch.full((channels,), torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(x.clamp(min=self.lo), self.hi.to(x.dtype).view(-1, *[1] * (x.dim() - 2)))

    def extra_repr(self) -> str:
        return f"{self.channels}, lo={self.lo:g}"
