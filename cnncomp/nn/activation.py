"""Activations that no layer takes in as a clamp, factors of channels, and BatchNorm that no layer takes in, on kernels of this
package."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnncomp._norms import fold_batch_norm
from cnncomp.errors import ArgumentError
from cnncomp.nn.base import INF, Clamp, runs_float_kernels
from cnncomp.ops.activate import is_dense

_IN_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
}
_OF_TORCH = {nn.Sigmoid: "sigmoid", nn.SiLU: "silu", nn.Hardsigmoid: "hardsigmoid", nn.Hardswish: "hardswish"}


def activated(t: Tensor, kind: str) -> Tensor:
    """The activation ``kind`` of floats, on the kernel of this package where that takes them."""
    if runs_float_kernels(t) and is_dense(t):
        return torch.ops.cnncomp.activate(t, kind)
    return _IN_TORCH[kind](t)


class Activation(nn.Module):
    """``nn.SiLU``, ``nn.Sigmoid``, ``nn.Hardswish`` or ``nn.Hardsigmoid``, within 1e-6 relative of torch's.

    Args:
        kind: "silu", "sigmoid", "hardswish" or "hardsigmoid".

    Raises:
        ArgumentError: another kind.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind not in _IN_TORCH:
            raise ArgumentError("kind", repr(kind), f"one of {', '.join(_IN_TORCH)}")
        self.kind = kind

    def forward(self, input: Tensor) -> Tensor:
        return activated(input, self.kind)

    @classmethod
    def of(cls, module: nn.Module) -> Activation | None:
        """The same as a module of torch's; None for another one."""
        kind = _OF_TORCH.get(type(module))
        return None if kind is None else cls(kind)

    def extra_repr(self) -> str:
        return self.kind


class ScaleChannels(nn.Module):
    """``input * scale``: images (N, C, H, W) and a factor for each channel, (N, C, 1, 1), as in squeeze and excitation."""

    def forward(self, input: Tensor, scale: Tensor) -> Tensor:
        each = input.dim() == 4 and tuple(scale.shape) == (
            *input.shape[:2],
            1,
            1,
        )  # or broadcast, at another batch than traced
        if each and runs_float_kernels(input, scale) and input.is_contiguous():
            return torch.ops.cnncomp.scale_channels(input, scale)
        return input * scale


class ChannelAffine(nn.Module):
    """``clamp(input * scale[c] + shift[c], lo, hi)`` for images (N, C, H, W): BatchNorm in inference, and the clamp behind it.

    Args:
        channels: C.
        lo, hi: The clamp's bounds.

    The factors ``scale`` (C,) and ``shift`` (C,) are buffers, one and zero until they are set.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, channels: int, lo: float = -INF, hi: float = INF) -> None:
        super().__init__()
        self.channels, self.lo, self.hi = channels, lo, hi
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("shift", torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        if runs_float_kernels(input) and input.dim() == 4 and input.is_contiguous():
            return torch.ops.cnncomp.affine_channels(input, self.scale, self.shift, self.lo, self.hi)
        scale, shift = (t.to(input.dtype).view(-1, 1, 1) for t in (self.scale, self.shift))
        return torch.addcmul(shift, input, scale).clamp(self.lo, self.hi)

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, activation: Clamp) -> ChannelAffine:
        """BatchNorm with running statistics and a clamp with one upper bound."""
        assert not isinstance(activation.hi, tuple)
        made = cls(norm.num_features, activation.lo, activation.hi)
        _, shift, scale = fold_batch_norm(torch.ones(norm.num_features, 1), None, norm)
        made.scale, made.shift = scale, shift
        return made

    def extra_repr(self) -> str:
        return f"{self.channels} {Clamp(self.lo, self.hi)}"
