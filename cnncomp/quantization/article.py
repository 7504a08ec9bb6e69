"""Mean-shift quantisation as the introductory article on CNN compression has it: of tensors, and of a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cnncomp._modules import weight_parameter
from cnncomp.errors import ArgumentError, DtypeError
from cnncomp.quantization.calibrate import attach_mean_shift
from cnncomp.quantization.fake import WEIGHT_MAX
from cnncomp.quantization.scales import safe_scale


@dataclass(frozen=True)
class MeanShifted:
    """x ≈ q·α + μ: ``q`` int8 (−127 to 127), ``ratio`` α and ``mean`` μ float32, without dimensions or broadcast with q."""

    q: Tensor
    ratio: Tensor
    mean: Tensor

    def value(self, normalized: bool = False) -> Tensor:
        """x̂ = q·α + μ, or x̂/α, float32."""
        x = self.q.float() * self.ratio + self.mean
        return x / self.ratio if normalized else x


def mean_shift(x: Tensor, ratio: float | None = None, per_channel: int | None = None) -> MeanShifted:
    """μ = mean(x), q = round((x − μ)/α), half to even.

    Args:
        x: floats, at least one.
        ratio: α, above 0; None: the largest |x − μ| divided by 127.
        per_channel: the dimension, from the end where negative, along which each index has its own μ, and its own α where
            ``ratio`` is None; None: one of each for the tensor.

    Raises:
        ArgumentError: a ratio that is not above 0 or so small that q overflows int8 (the message names the smallest that
            fits); an empty ``x``, or NaN or infinity in it; a dimension that it does not have.
        DtypeError: ``x`` is no tensor of real numbers.
    """
    if not isinstance(x, Tensor) or x.is_complex():
        raise DtypeError("x", x.dtype if isinstance(x, Tensor) else type(x).__name__, "a tensor of floats")
    if not x.numel() or not torch.isfinite(x).all():
        got = "NaN or infinity" if x.numel() else f"an empty tensor, {tuple(x.shape)}"
        raise ArgumentError("x", got, "finite values, at least one")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < ratio < float("inf")):
        raise ArgumentError("quantization_ratio", repr(ratio), "a number above 0, or None")
    x64 = x.detach().double()
    other = None if per_channel is None else _other_dimensions(x, per_channel)
    mean = (x64.mean() if other is None else x64.mean(other, keepdim=True)).float()
    centred = x64 - mean.double()
    largest = centred.abs().amax() if other is None else centred.abs().amax(other, keepdim=True)
    if ratio is None:
        alpha = safe_scale((largest / WEIGHT_MAX).float())
    else:
        alpha = torch.tensor(ratio, dtype=torch.float32, device=x.device)
        if alpha == 0 or (largest / alpha.double()).round().max() > WEIGHT_MAX:
            fits = smallest_ratio(largest.max().item())
            raise ArgumentError("quantization_ratio", ratio, f"at least {fits!r}: below, q overflows int8")
    return MeanShifted((centred / alpha.double()).round().to(torch.int8), alpha, mean)


def _other_dimensions(x: Tensor, dim: int) -> list[int]:
    """All dimensions of ``x`` but ``dim``."""
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        raise ArgumentError("per_channel", repr(dim), f"None or a dimension of a tensor with {x.dim()}")
    return [d for d in range(x.dim()) if d != dim % x.dim()]


def smallest_ratio(largest: float) -> float:
    """The smallest float32 α with round(largest/α) ≤ 127."""
    alpha = torch.tensor(largest / (WEIGHT_MAX + 0.5), dtype=torch.float32)
    zero, inf = torch.zeros(()), torch.tensor(torch.inf)

    def fits(a: Tensor) -> bool:
        return a.item() > 0 and round(largest / a.item()) <= WEIGHT_MAX

    while not fits(alpha):
        alpha = torch.nextafter(alpha, inf)
    while fits(below := torch.nextafter(alpha, zero)):
        alpha = below
    return alpha.item()


class _Stored(nn.Module):
    """A parameter as int8, α and μ in buffers, and the dtype that it is computed in."""

    q: Tensor
    ratio: Tensor
    mean: Tensor

    def __init__(self, value: MeanShifted, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        for name in ("q", "ratio", "mean"):
            self.register_buffer(name, getattr(value, name))

    def value(self, normalized: bool) -> Tensor:
        return MeanShifted(self.q, self.ratio, self.mean).value(normalized).to(self.dtype)


class Quantization(nn.Module):
    """A model with its parameters quantised to int8 about their means. Called like the model.

    The article's formula is μ = mean(x), q = round((x − μ)/α), x̂ = q·α + μ, with α the *quantization ratio*. What is
    ambiguous or wrong in it, and what is done here:

    - Its last formula divides once more by α, which gives the normalised value x̂/α and not an approximation of x; its code
      does not. Here it is x̂ = q·α + μ; ``normalized=True`` gives x̂/α.
    - Its text quantises the model's parameters, its code the output. Here it is the parameters, all of them, and with
      ``outputs=True`` also the output of each call.
    - It never stores an integer. Here q is int8, −127 to 127, in the ``state_dict``; floats are made of it in each call.
    - Nothing keeps q within its 8 bits. Here an α for which it would overflow is an error that names the smallest that
      fits; without an α, each tensor gets max|x − μ|/127.
    - μ is one mean per tensor. ``per_channel=True`` takes one for each output channel of each weight (with an α each, if
      that is not given): a row of a weight, a channel (dimension 1) of an output. Biases and the like keep one.

    Running statistics and other buffers stay as they are. The model is copied; for inference only.

    Args:
        model: any module with floating-point parameters.
        quantization_ratio: α; None derives it from the range of each tensor.
        per_channel: as above.
        outputs: quantise what the model returns, too, with the same α, or one derived in each call.
        normalized: give x̂/α in place of x̂.

    Raises:
        ArgumentError: not a module, no parameters, an α that is not above 0 or too small, NaN or infinity.
    """

    def __init__(
        self,
        model: nn.Module,
        quantization_ratio: float | None = None,
        *,
        per_channel: bool = False,
        outputs: bool = False,
        normalized: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
        self.quantization_ratio, self.per_channel = quantization_ratio, per_channel
        self.outputs, self.normalized = outputs, normalized
        named = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()}
        if not named:
            raise ArgumentError("model", "no floating-point parameters", "at least one")
        # A parameter that several modules share is stored once. Paths hold no slash, and keys of a ModuleDict no dot.
        first: dict[int, str] = {}
        self.keys = {name: first.setdefault(id(p), name).replace(".", "/") for name, p in named.items()}
        self.stored = nn.ModuleDict()
        for name, p in named.items():
            if first[id(p)] == name:
                self.stored[self.keys[name]] = _Stored(self._quantize(name, p), p.dtype)
        self.model = copy.deepcopy(model).requires_grad_(False)
        for name in named:
            owner, _, parameter = name.rpartition(".")
            self.model.get_submodule(owner)._parameters[parameter] = None

    def _quantize(self, name: str, p: Tensor) -> MeanShifted:
        try:
            return mean_shift(p, self.quantization_ratio, 0 if self.per_channel and p.dim() > 1 else None)
        except ArgumentError as error:
            raise ArgumentError(error.argument, error.got, f"{error.expected} (parameter {name!r})") from error

    def parameters_by_name(self) -> dict[str, Tensor]:
        """The values that the model computes with, by the names of its parameters."""
        values = {key: stored.value(self.normalized) for key, stored in self.stored.items()}  # type: ignore[operator]
        return {name: values[key] for name, key in self.keys.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = functional_call(self.model, self.parameters_by_name(), args, kwargs)
        return self._quantize_output(result) if self.outputs else result

    def _quantize_output(self, y: Any) -> Any:
        if isinstance(y, Tensor) and y.is_floating_point() and y.numel():
            channel = 1 if self.per_channel and y.dim() > 1 else None
            return mean_shift(y, self.quantization_ratio, channel).value(self.normalized).to(y.dtype)
        if isinstance(y, dict):
            return {key: self._quantize_output(v) for key, v in y.items()}
        return type(y)(map(self._quantize_output, y)) if type(y) in (list, tuple) else y

    def to_int8(self, calibration: Tensor | Iterable[Any], method: str = "mse", progress: bool = True) -> nn.Module:
        """The model for :func:`cnncomp.convert`: convolutions and linears keep the q, α and μ they have here, and get 8-bit
        inputs, so that the int8 kernels run them.

        Args:
            calibration, method, progress: as in :func:`cnncomp.quantize`.

        Raises:
            ArgumentError: ``normalized``, whose values do not approximate the model; and as :func:`cnncomp.quantize`.
            CalibrationError: as :func:`cnncomp.quantize`.
        """
        if self.normalized:
            raise ArgumentError("normalized", True, "False: x̂/α is not the model's weight")
        model = copy.deepcopy(self.model)
        for name, value in self.parameters_by_name().items():
            owner, _, parameter = name.rpartition(".")
            model.get_submodule(owner)._parameters[parameter] = nn.Parameter(value)
        names = {id(weight): name for name, weight in model.named_parameters()}

        def scheme(name: str, layer: Any) -> tuple[Tensor, Tensor]:
            stored = self.stored[self.keys[names[id(weight_parameter(layer, name))]]]
            channels = layer.weight.shape[0]
            return tuple(t.flatten().expand(channels) for t in (stored.ratio, stored.mean))  # type: ignore[return-value, operator]

        return attach_mean_shift(model, calibration, method, scheme, progress)

    def extra_repr(self) -> str:
        ratio = "by range" if self.quantization_ratio is None else f"{self.quantization_ratio:g}"
        flags = [name for name in ("per_channel", "outputs", "normalized") if getattr(self, name)]
        return ", ".join([f"quantization_ratio={ratio}", *flags])
