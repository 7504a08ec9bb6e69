"""int8 layers: 8-bit activations and int8 weights, drop-in for ``nn.Conv2d`` and ``nn.Linear``."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cnncomp.errors import ArgumentError, DtypeError
from cnncomp.nn.base import (
    INF,
    LINEAR,
    Clamp,
    ConvertedLayer,
    ConvLayer,
    Geometry,
    LinearLayer,
    QuantSpec,
    check_bias,
    check_layer,
    clamp_config,
    clamp_from_config,
    geometry_config,
    nonlinearity_config,
)
from cnncomp.nn.dense import DenseConv2d, DenseLinear
from cnncomp.ops.conv2d_int8 import check_activation
from cnncomp.ops.library import check_factor, check_reduction
from cnncomp.ops.packing import pack_int8, unpack_int8
from cnncomp.ops.reference import QRANGE, finish
from cnncomp.quantization import quantization_of

Dense = TypeVar("Dense", DenseConv2d, DenseLinear)


def quantize_weight(weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 weights per output channel, w ≈ scale·q, or scale·q + shift: (q, fp32 scale (K,)).

    Without ``scale``: the largest magnitude of w, or of w − shift, divided by 127.

    Raises:
        ArgumentError: NaN or infinite weights.
    """
    w = weight.detach().double()
    if not bool(torch.isfinite(w).all()):
        raise ArgumentError("weight", "NaN or infinite values", "finite weights")
    rows = w.flatten(1)
    if shift is not None:
        rows = rows - shift.detach().to(w.device).double().unsqueeze(1)
    s = rows.abs().amax(1) / 127 if scale is None else scale.detach().to(w.device).double()
    s = torch.where(s > 0, s, torch.ones_like(s)).float()
    q = torch.round(rows / s.double().unsqueeze(1)).clamp(-127, 127)
    return q.to(torch.int8).reshape(weight.shape), s


def dequantize_weight(q: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """The fp32 weight, scale·q, or scale·q + shift, that int8 ``q`` (K, ...) stands for. ``scale``, ``shift``: (K,)."""
    shape = (-1, *[1] * (q.dim() - 1))
    weight = q.float() * scale.reshape(shape)
    return weight if shift is None else weight + shift.reshape(shape)


_DTYPES = (torch.uint8, torch.int8)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _spec_numbers(spec: QuantSpec | None) -> tuple[float, int]:
    """Scale, 0 for None, and the dtype's place in ``_DTYPES``."""
    return (0.0, 0) if spec is None else (spec.scale, _DTYPES.index(spec.dtype))


class _QuantLayer(ConvertedLayer):
    """State and constants that the int8 conv and linear share.

    ``weight_shift`` (K,): the weights are weight_scale·q + weight_shift (the mean-shift scheme).

    ``nonlinearity``: "silu" or "hardswish" before the clamp of ``activation``, or "".

    ``output``: how the result is quantised, None for ``float_dtype``: float32, float16 or bfloat16. ``residual_scale``: one
    step of an 8-bit residual (1 for a float one). The buffer ``steps`` holds these and ``input`` as numbers, so that a state
    dict is all of a layer's state.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_shift: Tensor | None
    nonlinearity: str
    float_dtype: torch.dtype
    constants: Tensor
    steps: Tensor
    bias: Tensor | None
    groups = 1

    def _setup(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        input: QuantSpec,
        activation: Clamp,
        output: QuantSpec | None,
        residual_scale: float,
        weight_shift: Tensor | None,
        nonlinearity: str,
        float_dtype: torch.dtype,
    ) -> None:
        check_activation(nonlinearity, 1.0)
        if float_dtype not in _FLOATS:
            raise ArgumentError("float_dtype", float_dtype, " or ".join(map(str, _FLOATS)))
        if weight.dtype != torch.int8:
            raise ArgumentError("weight", weight.dtype, "torch.int8")
        positive = (weight_scale > 0) & torch.isfinite(weight_scale)
        if weight_scale.shape != (weight.shape[0],) or not bool(positive.all()):
            got = f"shape {tuple(weight_scale.shape)}, {int((~positive).sum())} of them not finite and above 0"
            raise ArgumentError("weight_scale", got, f"({weight.shape[0]},) finite scales above 0")
        if weight_shift is not None and (
            weight_shift.shape != (weight.shape[0],) or not bool(torch.isfinite(weight_shift).all())
        ):
            raise ArgumentError("weight_shift", tuple(weight_shift.shape), f"({weight.shape[0]},) finite numbers")
        check_bias(bias, weight.shape[0])
        if isinstance(activation.hi, tuple) and len(activation.hi) != weight.shape[0]:
            raise ArgumentError("activation", f"{len(activation.hi)} upper bounds", f"one, or {weight.shape[0]}")
        check_reduction(weight[0].numel())
        self.input, self.activation = input, activation
        self.nonlinearity, self.float_dtype = nonlinearity, float_dtype
        self.register_buffer("weight", self._pack(weight))
        self.register_buffer("weight_scale", weight_scale.detach().float().clone())
        self.register_buffer("weight_shift", None if weight_shift is None else weight_shift.detach().float().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.register_buffer("constants", torch.empty(0), persistent=False)
        self.register_buffer("steps", torch.empty(0))
        self.set_output(output, residual_scale)

    def _pack(self, weight: Tensor) -> Tensor:
        if weight.device.type == "cpu":
            return pack_int8(weight.reshape(*weight.shape[:2], *self._kernel_size()), self.groups)
        if weight.device.type == "cuda":
            from cnncomp.ops import cuda

            cuda.backend(weight.device)  # raises where no kernel can run, before anything is packed for it
        return self._pack_cuda(weight)

    def _pack_cuda(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _kernel_size(self) -> tuple[int, int]:
        return (1, 1)

    def set_output(self, output: QuantSpec | None, residual_scale: float = 1.0) -> None:
        """Fix what the layer returns (8 bit with a scale, or floats) and what one step of its residual is worth.

        Raises:
            ArgumentError: a ``residual_scale`` that is not a finite number above 0.
        """
        check_factor("residual_scale", residual_scale)
        self.output, self.residual_step = output, residual_scale
        s_out = 1.0 if output is None else output.scale
        step = 1.0 if self.nonlinearity else s_out  # in which sums are, before the clamp
        self.out_factor = float(torch.tensor(step / s_out, dtype=torch.float32))
        scale = self.weight_scale.double() * self.input.scale / step
        bias = torch.zeros_like(scale) if self.bias is None else self.bias.double() / step
        lo = self.activation.lo / s_out
        hi = torch.zeros_like(scale) + torch.tensor(self.activation.hi).to(scale) / s_out
        if output is not None:
            qlo, qhi = QRANGE[output.dtype]
            lo, hi = max(lo, qlo), hi.clamp(max=qhi)
        self.lo = lo
        rows = [scale, bias, hi]
        if self.weight_shift is not None:
            rows.append(self.weight_shift.double() * self.input.scale / step)
        self.constants = torch.stack(rows).float().contiguous()
        self.residual_scale = float(torch.tensor(residual_scale / step, dtype=torch.float32))
        self.inv_scale = float(torch.tensor(1.0 / self.input.scale, dtype=torch.float32))
        self.out_dtype = self.float_dtype if output is None else output.dtype
        numbers = [*_spec_numbers(self.input), *_spec_numbers(output), residual_scale]
        self.steps = torch.tensor(numbers, dtype=torch.float64, device=self.weight_scale.device)

    def _check_dtype(self, x: Tensor) -> None:
        if x.dtype not in (self.input.dtype, torch.float32, torch.float16, torch.bfloat16):
            expected = f"float32, float16, bfloat16, or {self.input.dtype} with a step of {self.input.scale:g}"
            raise DtypeError("x", x.dtype, expected)

    def _input(self, x: Tensor) -> Tensor:
        return x if x.dtype == self.input.dtype else torch.ops.cnncomp.quantize(x, self.inv_scale, self.input.dtype)

    @property
    def own_kernels(self) -> bool:
        return super().own_kernels and self.float_dtype == torch.float32

    def _constants(self, clamped: bool) -> tuple[Tensor, float, torch.dtype]:
        """The operator's constants, lower bound and output dtype; with ``clamped=False``, up to the residual only."""
        if clamped:
            return self.constants, self.lo, self.out_dtype
        constants = self.constants.clone()
        constants[2] = INF
        return constants, -INF, torch.float32

    def _ending(self, clamped: bool) -> tuple[str, float]:
        """The operator's last arguments: nonlinearity and the factor behind it."""
        return (self.nonlinearity, self.out_factor) if clamped else ("", 1.0)

    def _epilogue(self, t: Tensor, residual: Tensor) -> Tensor:
        t = t + residual.float() * self.residual_scale
        hi = self.constants[2] if isinstance(self, LinearLayer) else self.constants[2].view(-1, *[1] * (t.dim() - 2))
        return finish(t, self.lo, hi, self.out_dtype, *self._ending(True))

    def weight_int8(self) -> Tensor:
        """The unpacked int8 weight."""
        raise NotImplementedError

    def _dequantized(self) -> Tensor:
        return dequantize_weight(self.weight_int8(), self.weight_scale, self.weight_shift)

    def _noted(self, dense: Dense) -> Dense:
        """``dense`` with this layer's quantisation in its info, so that it can be converted again."""
        dense.info = dataclasses.replace(
            self.info, input=self.input, weight_scale=self.weight_scale, weight_shift=self.weight_shift
        )
        return dense

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        scale, dtype, out_scale, out_dtype, residual_step = self.steps.tolist()
        self.input = QuantSpec(scale, _DTYPES[int(dtype)])
        self.set_output(QuantSpec(out_scale, _DTYPES[int(out_dtype)]) if out_scale else None, residual_step)

    def _apply(self, fn: Any, recurse: bool = True) -> ConvertedLayer:
        before = self.weight.device.type
        logical = self.weight_int8() if fn(self.weight[:0]).device.type != before else None
        super()._apply(fn, recurse)
        if logical is not None and self.weight.device.type != "meta":
            self.weight = self._pack(logical.to(self.weight.device))
        return self

    def config(self) -> dict[str, Any]:
        out = self.output
        more = nonlinearity_config(self.nonlinearity)
        if self.float_dtype != torch.float32:
            more["float_dtype"] = str(self.float_dtype).removeprefix("torch.")
        return {
            **more,
            "activation": clamp_config(self.activation),
            "input": [self.input.scale, str(self.input.dtype).removeprefix("torch.")],
            "output": None if out is None else [out.scale, str(out.dtype).removeprefix("torch.")],
            "residual_scale": self.residual_step,
        }

    def tensors(self) -> dict[str, Tensor]:
        out = {"weight": self.weight_int8(), "weight_scale": self.weight_scale}
        if self.weight_shift is not None:
            out["weight_shift"] = self.weight_shift
        return out if self.bias is None else {**out, "bias": self.bias}

    @staticmethod
    def _parse(config: dict[str, Any]) -> dict[str, Any]:
        return {
            "input": _spec_from_config(config["input"]),
            "activation": clamp_from_config(config["activation"]),
            "output": None if config["output"] is None else _spec_from_config(config["output"]),
            "residual_scale": float(config["residual_scale"]),
            "nonlinearity": str(config.get("nonlinearity", "")),
            "float_dtype": _float_from_config(config.get("float_dtype", "float32")),
        }

    def _io(self) -> str:
        out = str(self.out_dtype).removeprefix("torch.")
        return f"{str(self.input.dtype).removeprefix('torch.')}→{out} {self.nonlinearity} {self.activation}".rstrip()


def _float_from_config(name: Any) -> torch.dtype:
    dtype = getattr(torch, str(name), None)
    if dtype not in _FLOATS:
        raise ArgumentError("float_dtype", name, " or ".join(map(str, _FLOATS)))
    assert isinstance(dtype, torch.dtype)
    return dtype


def _spec_from_config(config: list[Any]) -> QuantSpec:
    scale, dtype = config
    if dtype not in ("uint8", "int8"):
        raise ArgumentError("dtype", dtype, "'uint8' or 'int8'")
    return QuantSpec(float(scale), getattr(torch, dtype))


def _spec_of(layer: nn.Module, input: QuantSpec | None) -> tuple[QuantSpec, Tensor | None, Tensor | None]:
    """Input spec, weight scale and weight shift of a quantised torch layer, or of a plain one with ``input`` given."""
    found = quantization_of(layer)
    if input is None:
        if found is None:
            raise ArgumentError(
                "input", None, "how the input is quantised, for a layer that cnncomp.quantize has not seen"
            )
        input = QuantSpec(found.input_scale, found.input_dtype)
    return (input, None, None) if found is None else (input, found.weight_scale, found.weight_shift)


class QuantConv2d(_QuantLayer, ConvLayer):
    """int8 convolution with fused bias, residual, clamp and requantisation.

    Input: (N, C, H, W) (or (N, C, L) if ``geometry.conv1d``), floats, which it quantises, or 8 bit as ``input`` says.
    Output: floats, or 8 bit as ``output`` says. Bit-equal to :func:`cnncomp.ops.reference.conv2d_int8`.

    Args:
        weight: int8 ``(K, C/G, R, S)``; ``weight_scale``: float32 ``(K,)``; ``bias``: float32 ``(K,)`` or None.
        weight_shift: float32 ``(K,)`` for weights ``weight_scale·weight + weight_shift``, else None.
        nonlinearity: "silu", "hardswish" or "", before the clamp that ``activation`` is.
        float_dtype: Of the output where ``output`` is None: float32, float16 or bfloat16.

    Raises:
        OverflowRiskError: a reduction too long for int32.
        ArgumentError: scales that are not positive, weights that are not int8.
    """

    kernel = "conv2d_int8"
    _operator = "conv2d_int8"

    def __init__(
        self,
        geometry: Geometry,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        input: QuantSpec,
        activation: Clamp = LINEAR,
        output: QuantSpec | None = None,
        residual_scale: float = 1.0,
        weight_shift: Tensor | None = None,
        nonlinearity: str = "",
        float_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        geometry.check(weight)
        self.geometry, self.groups = geometry, geometry.groups
        more = (residual_scale, weight_shift, nonlinearity, float_dtype)
        self._setup(weight, weight_scale, bias, input, activation, output, *more)

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d | nn.Conv1d,
        input: QuantSpec | None = None,
        activation: Clamp = LINEAR,
        nonlinearity: str = "",
    ) -> QuantConv2d:
        """From a torch convolution that :func:`cnncomp.quantize` has seen, or a plain one with ``input`` given."""
        geometry = Geometry.of(conv)
        spec, scale, shift = _spec_of(conv, input)
        weight = conv.weight.detach().reshape(geometry.out_channels, -1, *geometry.kernel_size)
        q, s = quantize_weight(weight, scale, shift)
        return cls(geometry, q, s, conv.bias, spec, activation, weight_shift=shift, nonlinearity=nonlinearity)

    def _kernel_size(self) -> tuple[int, int]:
        return self.geometry.kernel_size

    def _pack_cuda(self, weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1).contiguous()

    def weight_int8(self) -> Tensor:
        g = self.geometry
        if self.weight.device.type == "cpu":
            return unpack_int8(self.weight, g.in_channels, g.out_channels, g.kernel_size, g.groups)
        return self.weight.permute(0, 3, 1, 2).contiguous()

    def _image(self, x: Tensor, residual: Tensor | None, clamped: bool) -> Tensor:
        g = self.geometry
        constants, lo, dtype = self._constants(clamped)
        return getattr(torch.ops.cnncomp, self._operator)(
            self._input(x), self.weight, constants, residual, self.residual_scale, lo,
            g.kernel_size, g.stride, g.padding, g.dilation, g.groups, dtype, *self._ending(clamped),
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        return {"geometry": geometry_config(self.geometry), **super().config()}

    @classmethod
    def build(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> QuantConv2d:
        return cls(
            Geometry.from_config(config["geometry"]),
            tensors["weight"],
            tensors["weight_scale"],
            tensors.get("bias"),
            **cls._parse(config),
            weight_shift=tensors.get("weight_shift"),
        )

    def to_dense(self) -> DenseConv2d:
        """The float convolution on the dequantised weights."""
        weight = self._dequantized()
        return self._noted(
            DenseConv2d(self.geometry, weight, self.bias, self.activation, nonlinearity=self.nonlinearity)
        )

    def extra_repr(self) -> str:
        return f"{self.geometry} {self._io()}"


class QuantLinear(_QuantLayer, LinearLayer):
    """int8 linear with the same epilogue. Input (..., C) floats or 8 bit, output (..., K). See :class:`QuantConv2d`."""

    kernel = "linear_int8"
    _operator = "linear_int8"

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        input: QuantSpec,
        activation: Clamp = LINEAR,
        output: QuantSpec | None = None,
        residual_scale: float = 1.0,
        weight_shift: Tensor | None = None,
        nonlinearity: str = "",
        float_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        more = (residual_scale, weight_shift, nonlinearity, float_dtype)
        self._setup(weight, weight_scale, bias, input, activation, output, *more)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        input: QuantSpec | None = None,
        activation: Clamp = LINEAR,
        nonlinearity: str = "",
    ) -> QuantLinear:
        """From a torch linear that :func:`cnncomp.quantize` has seen, or a plain one with ``input`` given."""
        check_layer("linear", linear, nn.Linear)
        spec, scale, shift = _spec_of(linear, input)
        q, s = quantize_weight(linear.weight, scale, shift)
        return cls(q, s, linear.bias, spec, activation, weight_shift=shift, nonlinearity=nonlinearity)

    def _pack_cuda(self, weight: Tensor) -> Tensor:
        return weight.contiguous()

    def weight_int8(self) -> Tensor:
        if self.weight.device.type != "cpu":
            return self.weight
        return unpack_int8(self.weight, self.in_features, self.out_features, (1, 1)).flatten(1)

    def _run(self, x: Tensor, residual: Tensor | None, clamped: bool = True) -> Tensor:
        constants, lo, dtype = self._constants(clamped)
        args = (self._input(x), self.weight, constants, residual, self.residual_scale, lo, dtype)
        return getattr(torch.ops.cnncomp, self._operator)(*args, *self._ending(clamped))

    @classmethod
    def build(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> QuantLinear:
        shift = tensors.get("weight_shift")
        return cls(
            tensors["weight"], tensors["weight_scale"], tensors.get("bias"), **cls._parse(config), weight_shift=shift
        )

    def to_dense(self) -> DenseLinear:
        """The float linear on the dequantised weights."""
        return self._noted(DenseLinear(self._dequantized(), self.bias, self.activation, nonlinearity=self.nonlinearity))

    def extra_repr(self) -> str:
        return f"{self.in_features}→{self.out_features} {self._io()}"


class TritonQuantConv2d(QuantConv2d):
    """:class:`QuantConv2d` on Triton's kernel where a GPU has others too. The same bits."""

    kernel = "conv2d_int8.triton"
    _operator = "conv2d_int8_triton"


class TritonQuantLinear(QuantLinear):
    """:class:`QuantLinear` on Triton's kernel where a GPU has others too. The same bits."""

    kernel = "linear_int8.triton"
    _operator = "linear_int8_triton"
