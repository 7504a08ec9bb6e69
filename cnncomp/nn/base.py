"""What all converted layers share: geometry, activation, and how they describe themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp.errors import ArgumentError, DtypeError
from cnncomp.ops.library import conv_out_size

INF = math.inf


@dataclass(frozen=True)
class Clamp:
    """An activation as the interval it clamps to: none is (-inf, inf), ReLU (0, inf), ReLU6 (0, 6).

    ``hi`` is a number, or one for each output channel.
    """

    lo: float = -INF
    hi: float | tuple[float, ...] = INF

    def __post_init__(self) -> None:
        if any(bound != bound for bound in (self.lo, *(self.hi if isinstance(self.hi, tuple) else (self.hi,)))):
            raise ArgumentError("activation", f"bounds {self.lo} and {self.hi}", "numbers")

    def __bool__(self) -> bool:
        return self.lo != -INF or self.hi != INF

    def __str__(self) -> str:
        if isinstance(self.hi, tuple):
            return f"clamp({self.lo:g}, per channel)"
        names = {(-INF, INF): "", (0.0, INF): "relu", (0.0, 6.0): "relu6"}
        return names.get((self.lo, self.hi), f"clamp({self.lo:g}, {self.hi:g})")


#: No activation.
LINEAR = Clamp()


def check_bias(bias: Tensor | None, channels: int) -> None:
    """Raise :class:`ArgumentError` unless ``bias``, if it is there, has one value for each output channel."""
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ArgumentError("bias", f"shape {tuple(bias.shape)}", f"({channels},)")


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

    def check(self, weight: Tensor) -> None:
        """Raise :class:`ArgumentError` unless ``weight`` is (K, C/G, R, S) of these sizes: kernels trust them."""
        expected = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        if tuple(weight.shape) != expected:
            raise ArgumentError("weight", f"shape {tuple(weight.shape)}", f"{expected}, as the geometry says")

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The output's shape for an input of ``shape``, (N, C, H, W) or, with ``conv1d``, (N, C, L)."""
        pairs = (self.kernel_size, self.stride, self.padding, self.dilation)
        axes = zip(shape[2:], *(pair[1:] if self.conv1d else pair for pair in pairs), strict=True)
        return (shape[0], self.out_channels, *(conv_out_size(*axis) for axis in axes))

    @classmethod
    def of(cls, conv: nn.Conv1d | nn.Conv2d) -> Geometry:
        """Geometry of a torch convolution.

        Raises:
            ArgumentError: another module than a Conv1d or Conv2d with torch's own forward; a padding that the kernels can't
                do (mode other than zeros, uneven "same").
        """
        check_layer("conv", conv, nn.Conv1d, nn.Conv2d)
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
        if not isinstance(self.scale, (int, float)) or not (math.isfinite(self.scale) and self.scale > 0):
            raise ArgumentError("input_scale", repr(self.scale), "a finite number above 0")
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


def runs_float_kernels(*tensors: Tensor) -> bool:
    """Whether the float kernels between layers take these: they are for float32 on a CPU and have no gradient."""
    return all(t.device.type == "cpu" and t.dtype == torch.float32 and not t.requires_grad for t in tensors)


#: Kernels that need no residual after they have written the output in its place.
IN_PLACE_KERNELS = frozenset(("conv2d_sparse", "dense.direct"))
#: The kernel of two layers of a recorded network that run in one where the second adds what the first gives.
JOINED_KERNEL = "conv2d_sparse_int8"


class ConvertedLayer(nn.Module):
    """A drop-in layer for inference. ``forward(x, residual=None)`` gives ``clamp(layer(x) + residual)``.

    Computes in float32 or int8, also inside ``torch.autocast``. ``kernel`` names what runs; ``config()`` with ``tensors()``
    is all that is needed to build the layer again, on any machine; ``to_dense()`` gives the float layer that computes the
    same.
    """

    kernel: str = ""
    activation: Clamp

    @property
    def own_kernels(self) -> bool:
        """Whether all that it runs on a CPU are kernels of this package."""
        return not self.kernel.startswith("dense.")

    @property
    def writes_over_residual(self) -> bool:
        """Whether, on a CPU, the output may be where the residual is: each of its elements is read before that one is
        written."""
        return self.kernel in IN_PLACE_KERNELS

    def __init__(self) -> None:
        super().__init__()
        self.info = LayerInfo()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layer's output.

        Args:
            x: as the class says.
            residual: added before the clamp, by torch's rules of broadcasting; one of the output's shape is fused.

        Raises:
            ArgumentError: another number of dimensions or channels.
            DtypeError: a dtype that the layer doesn't compute in.
        """
        if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(_widened(x), None if residual is None else _widened(residual))
        self._check_dtype(x)
        self._check_shape(x)
        if residual is not None and residual.shape != self._output_shape(x):
            # The shapes agreed on the example input, and need not on others: y.mean(0, keepdim=True), at batch 1.
            return self._epilogue(self._run(x, None, clamped=False), residual)
        return self._run(x, residual)

    def _check_dtype(self, x: Tensor) -> None:
        if x.dtype != torch.float32:
            expected = "torch.float32, in which converted layers compute, whatever the model is cast to"
            raise DtypeError("x", x.dtype, expected)

    def _check_shape(self, x: Tensor) -> None:
        """Raise :class:`ArgumentError` unless ``x`` has the layer's dimensions and channels."""
        raise NotImplementedError

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        raise NotImplementedError

    def _run(self, x: Tensor, residual: Tensor | None, clamped: bool = True) -> Tensor:
        """The layer, with a residual of the output's shape; ``clamped=False``: in floats, without its activation."""
        raise NotImplementedError

    def _epilogue(self, t: Tensor, residual: Tensor) -> Tensor:
        """What ``_run`` fuses, on its unclamped result ``t``."""
        return clamp_add(t, residual, self.activation)

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
        """Move between devices, but never change a dtype: weights and constants are exact as they are."""
        super()._apply(keeping_dtype(fn), recurse)
        return self


class ConvLayer(ConvertedLayer):
    """A convolution. Subclasses give ``_image``: ``_run`` on images (N, C, H, W)."""

    geometry: Geometry

    def _check_shape(self, x: Tensor) -> None:
        dims = 3 if self.geometry.conv1d else 4
        if x.dim() != dims:
            raise ArgumentError(
                "x", f"shape {tuple(x.shape)}", f"{dims} dimensions (N, C, {'L' if dims == 3 else 'H, W'})"
            )
        check_channels(x, 1, self.geometry.in_channels)

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        return self.geometry.output_shape(x.shape)

    def _run(self, x: Tensor, residual: Tensor | None, clamped: bool = True) -> Tensor:
        if self.geometry.conv1d:
            image = None if residual is None else residual.unsqueeze(2)
            return self._image(x.unsqueeze(2), image, clamped).squeeze(2)
        return self._image(x, residual, clamped)

    def _image(self, x: Tensor, residual: Tensor | None, clamped: bool) -> Tensor:
        raise NotImplementedError


class LinearLayer(ConvertedLayer):
    """A linear map of the last dimension."""

    in_features: int
    out_features: int

    def _check_shape(self, x: Tensor) -> None:
        if x.dim() < 1:
            raise ArgumentError("x", "a number", "at least one dimension, (..., C)")
        check_channels(x, -1, self.in_features)

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        return (*x.shape[:-1], self.out_features)


def _widened(x: Tensor) -> Tensor:
    """What autocast made half precision as float32 again."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` of ``nn.Module._apply``, as far as it moves tensors: they keep their dtype, with all digits."""

    def moved(t: Tensor) -> Tensor:
        out = fn(t)
        return out if out.dtype == t.dtype else t.to(out.device)

    return moved


def clamp_config(c: Clamp) -> list[Any]:
    """JSON form of a Clamp (JSON has no infinity)."""

    def finite(v: float) -> float | None:
        return None if math.isinf(v) else v

    return [finite(c.lo), [finite(v) for v in c.hi] if isinstance(c.hi, tuple) else finite(c.hi)]


def clamp_from_config(v: list[Any]) -> Clamp:
    lo, hi = v
    bounds = tuple(INF if b is None else float(b) for b in (hi if isinstance(hi, list) else [hi]))
    return Clamp(-INF if lo is None else float(lo), bounds if isinstance(hi, list) else bounds[0])


def nonlinearity_config(name: str) -> dict[str, str]:
    """JSON form of a nonlinearity, none of none."""
    return {"nonlinearity": name} if name else {}


def geometry_config(g: Geometry) -> dict[str, Any]:
    return asdict(g)


def clamp_add(t: Tensor, residual: Tensor | None, act: Clamp) -> Tensor:
    """The epilogue of float layers on a fresh tensor ``t``, in place where it can be; ``act`` has one upper bound."""
    assert not isinstance(act.hi, tuple)
    if residual is not None:
        t = t + residual if t.requires_grad or t.shape != residual.shape else t.add_(residual)
    if not act:
        return t
    if t.requires_grad:
        return t.clamp(act.lo, act.hi)
    return t.relu_() if act == Clamp(0.0) else t.clamp_(act.lo, act.hi)


def check_layer(argument: str, layer: object, *types: type[nn.Module]) -> None:
    """Raise :class:`ArgumentError` unless ``layer`` computes what one of ``types``, torch's own classes, does."""
    if not any(isinstance(layer, cls) and type(layer).forward is cls.forward for cls in types):
        names = " or ".join(cls.__name__ for cls in types)
        raise ArgumentError(argument, type(layer).__name__, f"a torch.nn.{names} with torch's own forward")


def check_channels(x: Tensor, dim: int, expected: int) -> None:
    """Raise :class:`ArgumentError` unless ``x.shape[dim] == expected``."""
    if x.shape[dim] != expected:
        raise ArgumentError("x", f"shape {tuple(x.shape)}", f"{expected} channels in dimension {dim % x.dim()}")
