"""What all converted layers share: geometry, activation, and how they describe themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp.errors import ArgumentError

INF = math.inf


@dataclass(frozen=True)
class Clamp:
    """An activation as the interval it clamps to: none is (-inf, inf), ReLU (0, inf), ReLU6 (0, 6).

    ``hi`` is a number, or one for each output channel.
    """

    lo: float = -INF
    hi: float | tuple[float, ...] = INF

    def __bool__(self) -> bool:
        return self.lo != -INF or self.hi != INF

    def __str__(self) -> str:
        if isinstance(self.hi, tuple):
            return f"clamp({self.lo:g}, per channel)"
        names = {(-INF, INF): "", (0.0, INF): "relu", (0.0, 6.0): "relu6"}
        return names.get((self.lo, self.hi), f"clamp({self.lo:g}, {self.hi:g})")


#: No activation.
LINEAR = Clamp()


@dataclass(frozen=True)
class Geometry:
    """The sizes of a convolution, in (height, width) pairs. ``conv1d``: tensors are (N, C, L), run as images of height 1."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    conv1d: bool = False

    @property
    def reduction(self) -> int:
        """Products summed for one output."""
        return self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.in_channels == self.out_channels

    @classmethod
    def of(cls, conv: nn.Conv1d | nn.Conv2d) -> Geometry:
        """Geometry of a torch convolution.

        Raises:
            ArgumentError: a padding that the kernels can't do (mode other than zeros, uneven "same").
        """
        if conv.padding_mode != "zeros":
            raise ArgumentError("padding_mode", conv.padding_mode, "'zeros'")
        one = isinstance(conv, nn.Conv1d)

        def pair(v: Any, first: int) -> tuple[int, int]:
            return (first, int(v[0])) if one else (int(v[0]), int(v[1]))

        kernel, dilation = pair(conv.kernel_size, 1), pair(conv.dilation, 1)
        if conv.padding == "valid":
            padding = (0, 0)
        elif conv.padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            if any(t % 2 for t in total):
                raise ArgumentError("padding", "'same' with an even kernel", "the same padding on both sides")
            padding = (total[0] // 2, total[1] // 2)
        else:
            padding = pair(conv.padding, 0)
        return cls(
            conv.in_channels, conv.out_channels, kernel, pair(conv.stride, 1), padding, dilation, conv.groups, one
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Geometry:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        return cls(**values)

    def __str__(self) -> str:
        (r, s), (sh, sw) = self.kernel_size, self.stride
        text = f"{self.in_channels}→{self.out_channels} {r}×{s}"
        text += f" /{sh}" if sh == sw and sh > 1 else f" /{sh}×{sw}" if sh != sw else ""
        text += f" d{self.dilation[0]}" if self.dilation != (1, 1) else ""
        return text + (" depthwise" if self.depthwise else f" g{self.groups}" if self.groups > 1 else "")


@dataclass(frozen=True)
class QuantSpec:
    """How a layer's input is quantised: scale (one step, in units of the input) and dtype, uint8 or int8."""

    scale: float
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ArgumentError("input_scale", self.scale, "a finite number above 0")
        if self.dtype not in (torch.uint8, torch.int8):
            raise ArgumentError("input_dtype", self.dtype, "torch.uint8 or torch.int8")


@dataclass
class LayerInfo:
    """Where a converted layer came from: name, pattern of its weights, how it is quantised, and why it runs this kernel."""

    name: str = ""
    pattern: str = "dense"
    reason: str = ""
    timings: dict[str, float] = field(default_factory=dict)  # candidate kernel -> ms
    input: QuantSpec | None = None  # set where cnncomp.quantize has been
    weight_scale: Tensor | None = None
    weight_shift: Tensor | None = None  # set for the mean-shift scheme


class ConvertedLayer(nn.Module):
    """A drop-in layer for inference. ``forward(x, residual=None)`` gives ``clamp(layer(x) + residual)``.

    ``kernel`` names what runs; ``config()`` with ``tensors()`` is all that is needed to build the layer again, on any
    machine; ``to_dense()`` gives the float layer that computes the same.
    """

    kernel: str = ""
    activation: Clamp

    def __init__(self) -> None:
        super().__init__()
        self.info = LayerInfo()

    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Machine-independent tensors: unpacked weights, scales, biases."""
        raise NotImplementedError

    @classmethod
    def build(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> ConvertedLayer:
        """The layer from :meth:`config` and :meth:`tensors`."""
        raise NotImplementedError

    def to_dense(self) -> ConvertedLayer:
        raise NotImplementedError

    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        return sum(t.numel() * t.element_size() for t in [*self.parameters(), *self.buffers()])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConvertedLayer:
        """Move between devices, but never change a dtype: packed weights and their constants are exact as they are."""
        before = {name: t.dtype for name, t in self._buffers.items() if t is not None}
        originals = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, dtype in before.items():
            now = self._buffers[name]
            assert now is not None
            if now.dtype != dtype:
                original = originals[name]
                assert original is not None
                self._buffers[name] = original.to(now.device)
        return self


def clamp_config(c: Clamp) -> list[Any]:
    """JSON form of a Clamp (JSON has no infinity)."""

    def finite(v: float) -> float | None:
        return None if math.isinf(v) else v

    return [finite(c.lo), [finite(v) for v in c.hi] if isinstance(c.hi, tuple) else finite(c.hi)]


def clamp_from_config(v: list[Any]) -> Clamp:
    lo, hi = v
    bounds = tuple(INF if b is None else float(b) for b in (hi if isinstance(hi, list) else [hi]))
    return Clamp(-INF if lo is None else float(lo), bounds if isinstance(hi, list) else bounds[0])


def geometry_config(g: Geometry) -> dict[str, Any]:
    return asdict(g)


def as_image(x: Tensor | None) -> Tensor | None:
    """(N, C, L) as an image of height 1."""
    return None if x is None else x.unsqueeze(2)


def check_channels(x: Tensor, dim: int, expected: int) -> None:
    """Raise :class:`ArgumentError` unless ``x.shape[dim] == expected``."""
    if x.shape[dim] != expected:
        raise ArgumentError("x", f"shape {tuple(x.shape)}", f"{expected} channels in dimension {dim % x.dim()}")
