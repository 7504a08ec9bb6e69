"""Dense float layers with a fused epilogue: what a compressed kernel has to beat, and what stays where none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from cnncomp.errors import ArgumentError
from cnncomp.nn.activation import activated
from cnncomp.nn.base import (
    LINEAR,
    Clamp,
    ConvertedLayer,
    ConvLayer,
    Geometry,
    LinearLayer,
    check_bias,
    clamp_add,
    clamp_config,
    clamp_from_config,
    geometry_config,
    nonlinearity_config,
)
from cnncomp.ops.conv2d_int8 import check_activation
from cnncomp.ops.packing import dense_block, pack_dense, unpack_dense

#: Kernels of a dense convolution: torch's conv2d in either layout, and oneDNN's with the epilogue fused and its weight laid
#: out once, as torch.compile does it when weights are frozen.
CONV_KERNELS = ("dense.nchw", "dense.channels_last", "dense.fused")
#: This package's own, on a CPU: for depthwise convolutions, and for all others.
DEPTHWISE_KERNEL = "dense.depthwise"
DIRECT_KERNEL = "dense.direct"
OWN_KERNELS = frozenset((DEPTHWISE_KERNEL, DIRECT_KERNEL))
#: torch's in half precision, channels_last: on a GPU what int8 kernels have to beat, and what may run where the user allows it.
HALF_KERNELS = {"dense.fp16": torch.float16, "dense.bf16": torch.bfloat16}
#: Those that read and write contiguous images; the others take channels_last.
NCHW_KERNELS = frozenset(("dense.nchw", *OWN_KERNELS))


#: Kernels of a dense linear layer: torch's, and this package's own for few rows, on a CPU.
ROWS_KERNEL = "dense.rows"
LINEAR_KERNELS = ("dense.linear", ROWS_KERNEL, *HALF_KERNELS)
#: The most rows that it takes: with more, torch's is faster on every CPU measured.
MAX_ROWS = 16


def dense_kernels(geometry: Geometry, device: str) -> tuple[str, ...]:
    """The dense fp32 kernels that can run a convolution on a kind of device ("cpu", "cuda")."""
    if device != "cpu":
        return tuple(k for k in CONV_KERNELS if k != "dense.fused")
    return (*CONV_KERNELS, DEPTHWISE_KERNEL if geometry.depthwise else DIRECT_KERNEL)


def _can_fuse(x: Tensor, residual: Tensor | None) -> bool:
    """Fused operators have no gradient, and oneDNN's with a residual no fake function; a compiler fuses by itself."""
    if x.requires_grad or (residual is not None and residual.requires_grad) or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and x.numel() > 0


class _Dense(ConvertedLayer):
    """Bounds of the activation: one interval, and ``upper`` (K,) where each channel has its own.

    ``nonlinearity``: "silu" or "hardswish" before the clamp, or "": of layers that :func:`cnncomp.quantize` has seen, whose
    int8 kernels have it too.

    On one of :data:`HALF_KERNELS`, weight and bias are held in its dtype, ``half_dtype``; inputs of any float dtype are rounded
    to it. ``float_dtype``, float32 or ``half_dtype``, is the output's.
    """

    upper: Tensor | None
    float_dtype = torch.float32

    @property
    def half_dtype(self) -> torch.dtype | None:
        """What the layer computes in, None for float32."""
        return HALF_KERNELS.get(self.kernel)

    def _check_dtype(self, x: Tensor) -> None:
        if self.half_dtype is None or x.dtype not in (torch.float32, *HALF_KERNELS.values()):
            super()._check_dtype(x)

    def _held(self, t: Tensor) -> nn.Parameter:
        """A copy of a weight or a bias, as the kernel takes it."""
        return nn.Parameter(t.detach().clone().to(self.half_dtype or torch.float32), requires_grad=False)

    def _configured(self, config: dict[str, Any]) -> dict[str, Any]:
        """``config`` with what few layers have."""
        if self.float_dtype != torch.float32:
            config["float_dtype"] = str(self.float_dtype).removeprefix("torch.")
        return {**config, **nonlinearity_config(self.nonlinearity)}

    def _read_float_dtype(self, config: dict[str, Any]) -> None:
        name = config.get("float_dtype", "float32")
        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, self.half_dtype) if dtype}
        if name not in dtypes:
            raise ArgumentError("float_dtype", name, " or ".join(dtypes))
        self.float_dtype = dtypes[name]

    def _end_in(self, activation: Clamp, nonlinearity: str) -> None:
        check_activation(nonlinearity, 1.0)
        self.activation, self.nonlinearity = activation, nonlinearity
        self._interval = Clamp(activation.lo) if isinstance(activation.hi, tuple) else activation
        upper = torch.tensor(activation.hi) if isinstance(activation.hi, tuple) else None
        self.register_buffer("upper", upper, persistent=False)

    @property
    def _fused_interval(self) -> Clamp:
        """What the kernel clamps to; behind a nonlinearity, nothing yet."""
        return LINEAR if self.nonlinearity else self._interval

    def _bounded(self, t: Tensor) -> Tensor:
        if self.nonlinearity:
            t = clamp_add(activated(t, self.nonlinearity), None, self._interval)
        if self.upper is not None:
            behind = 0 if isinstance(self, LinearLayer) else t.dim() - 2  # dimensions behind the channels
            t = torch.minimum(t, self.upper.view(-1, *[1] * behind))
        return t.to(self.float_dtype)

    def _epilogue(self, t: Tensor, residual: Tensor) -> Tensor:
        return self._bounded(clamp_add(t, residual, self._fused_interval))

    def _ending(self) -> str:
        return f"{self.nonlinearity} {self.activation}".strip()

    @property
    def writes_over_residual(self) -> bool:
        return super().writes_over_residual and not self.nonlinearity


class DenseConv2d(_Dense, ConvLayer):
    """fp32 convolution, bias, residual and clamp. Input (N, C, H, W) (or (N, C, L)), output (N, K, P, Q).

    ``kernel`` is one of :func:`dense_kernels` or :data:`HALF_KERNELS`. "dense.fused", "dense.depthwise" and "dense.direct" run
    on the CPU in inference only; elsewhere torch's kernels stand in. The weight is held once, as the kernel takes it:
    "dense.direct" packs it at once, "dense.fused" into oneDNN's own layout at the first call.
    """

    plain: nn.Parameter | None
    packed: Tensor | None

    def __init__(
        self,
        geometry: Geometry,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: Clamp = LINEAR,
        kernel: str = "dense.nchw",
        nonlinearity: str = "",
    ) -> None:
        super().__init__()
        if kernel not in (known := (*dense_kernels(geometry, "cpu"), *HALF_KERNELS)):
            raise ArgumentError("kernel", kernel, f"one of {', '.join(known)}")
        geometry.check(weight)
        check_bias(bias, geometry.out_channels)
        self.geometry, self.kernel = geometry, kernel
        self._end_in(activation, nonlinearity)
        self._onednn: Tensor | None = None  # the weight in a layout that can't be copied or stored
        self.register_buffer("packed", None)
        if kernel == DIRECT_KERNEL:
            g = geometry
            block = dense_block(g.kernel_size, g.in_channels // g.groups)
            self.packed = pack_dense(weight.detach(), g.groups, block)
            self.plain = None
        else:
            layout = torch.contiguous_format if kernel in NCHW_KERNELS else torch.channels_last
            self.plain = self._held(weight.detach().contiguous(memory_format=layout))
        self.bias = None if bias is None else self._held(bias)

    @property
    def weight(self) -> Tensor:
        """(K, C/G, R, S): the parameter, or a copy where the kernel holds it packed."""
        plain, packed, g = self.plain, self.packed, self.geometry
        if plain is not None:
            return plain
        if packed is not None:
            return unpack_dense(packed, g.in_channels, g.out_channels)
        return self._from_onednn()

    @torch.compiler.assume_constant_result
    def _from_onednn(self) -> Tensor:
        """The weight in torch's layout. To a compiler it is a constant: it can't see into oneDNN's."""
        assert self._onednn is not None
        with unset_fake_temporarily():
            return self._onednn.to_dense().contiguous(memory_format=torch.channels_last)

    def weight_bytes(self) -> int:
        held = 0 if self._onednn is None else self._onednn.numel() * self._onednn.element_size()
        return super().weight_bytes() + held

    def _unpack(self) -> None:
        """Hold the weight as a parameter again, if oneDNN has it."""
        if self._onednn is not None:
            self.plain, self._onednn = nn.Parameter(self._from_onednn(), requires_grad=False), None

    def __getstate__(self) -> dict[str, Any]:
        self._unpack()
        return self.__dict__.copy()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConvertedLayer:
        self._unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any) -> None:
        self._unpack()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args)

    @property
    def own_kernels(self) -> bool:
        return self.kernel in OWN_KERNELS

    def _image(self, x: Tensor, residual: Tensor | None, clamped: bool) -> Tensor:
        if not clamped:
            return self._interval_image(x, residual, LINEAR)
        return self._bounded(self._interval_image(x, residual, self._fused_interval))

    def _interval_image(self, x: Tensor, residual: Tensor | None, act: Clamp) -> Tensor:
        g = self.geometry
        if self.kernel in NCHW_KERNELS:
            x = x.contiguous()
            if self.kernel in OWN_KERNELS and _can_fuse(x, residual):
                where, epilogue = (g.stride, g.padding, g.dilation), (self.bias, residual, act.lo, act.hi)
                if self.kernel == DEPTHWISE_KERNEL:
                    return torch.ops.cnncomp.conv2d_depthwise(x, self.plain, *epilogue, *where)
                return torch.ops.cnncomp.conv2d_dense(x, self.packed, *epilogue, g.out_channels, *where)
        else:
            x = x.to(self.half_dtype or x.dtype).contiguous(memory_format=torch.channels_last)
            if self.kernel == "dense.fused" and _can_fuse(x, residual):
                return self._fused(x, residual, act)
        t = F.conv2d(x, self.weight, self.bias, g.stride, g.padding, g.dilation, g.groups)
        return clamp_add(t, residual, act)

    def _fused(self, x: Tensor, residual: Tensor | None, act: Clamp) -> Tensor:
        g = self.geometry
        attr, scalars = ("none", []) if not act else ("hardtanh", [act.lo, act.hi])
        if act == Clamp(0.0):
            attr, scalars = "relu", []
        where = (list(g.padding), list(g.stride), list(g.dilation), g.groups)
        op = torch.ops.mkldnn._convolution_pointwise
        weight = self._onednn
        if weight is None:  # inputs of other shapes give the same, perhaps slower
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight.detach(), *where, list(x.shape))
            self._onednn = weight
            self.plain = None
        if residual is None:
            return op.default(x, weight, self.bias, *where, attr, scalars, "")
        residual = residual.contiguous(memory_format=torch.channels_last)
        if act and attr != "relu":  # oneDNN's binary form takes no hardtanh after the sum
            t = op.binary(x, residual, weight, self.bias, *where, "add", 1.0, None, [], None)
            return t.clamp_(act.lo, act.hi)
        return op.binary(x, residual, weight, self.bias, *where, "add", 1.0, "relu" if act else None, [], None)

    def config(self) -> dict[str, Any]:
        where = {"geometry": geometry_config(self.geometry), "activation": clamp_config(self.activation)}
        return self._configured({**where, "kernel": self.kernel})

    def tensors(self) -> dict[str, Tensor]:
        out = {"weight": self.weight.detach()}
        return out if self.bias is None else {**out, "bias": self.bias.detach()}

    @classmethod
    def build(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> DenseConv2d:
        layer = cls(
            Geometry.from_config(config["geometry"]),
            tensors["weight"],
            tensors.get("bias"),
            clamp_from_config(config["activation"]),
            config["kernel"],
            str(config.get("nonlinearity", "")),
        )
        layer._read_float_dtype(config)
        return layer

    def to_dense(self) -> DenseConv2d:
        return self

    def with_kernel(self, kernel: str) -> DenseConv2d:
        """The same layer on another of its :func:`dense_kernels`, or of :data:`HALF_KERNELS`."""
        return DenseConv2d(self.geometry, self.weight, self.bias, self.activation, kernel, self.nonlinearity)

    def extra_repr(self) -> str:
        return f"{self.geometry} {self._ending()} kernel={self.kernel}"


class DenseLinear(_Dense, LinearLayer):
    """fp32 linear, bias, residual and clamp. Input (..., C), output (..., K).

    ``kernel`` is one of :data:`LINEAR_KERNELS`. :data:`ROWS_KERNEL` runs on the CPU in inference only, and on few rows;
    elsewhere torch's stands in.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: Clamp = LINEAR,
        kernel: str = "dense.linear",
        nonlinearity: str = "",
    ) -> None:
        super().__init__()
        if kernel not in LINEAR_KERNELS:
            raise ArgumentError("kernel", kernel, f"one of {', '.join(LINEAR_KERNELS)}")
        self.kernel = kernel
        self.out_features, self.in_features = weight.shape
        check_bias(bias, self.out_features)
        self._end_in(activation, nonlinearity)
        self.weight = self._held(weight.detach().contiguous())
        self.bias = None if bias is None else self._held(bias)

    @property
    def own_kernels(self) -> bool:
        return self.kernel == ROWS_KERNEL

    def _run(self, x: Tensor, residual: Tensor | None, clamped: bool = True) -> Tensor:
        act = self._fused_interval if clamped else LINEAR
        if self.own_kernels and _can_fuse(x, residual) and x.numel() <= MAX_ROWS * self.in_features:
            t = torch.ops.cnncomp.linear_dense(x, self.weight, self.bias, residual, act.lo, act.hi)
        else:
            t = clamp_add(F.linear(x.to(self.half_dtype or x.dtype), self.weight, self.bias), residual, act)
        return self._bounded(t) if clamped else t

    def config(self) -> dict[str, Any]:
        return self._configured({"activation": clamp_config(self.activation), "kernel": self.kernel})

    def tensors(self) -> dict[str, Tensor]:
        out = {"weight": self.weight.detach()}
        return out if self.bias is None else {**out, "bias": self.bias.detach()}

    @classmethod
    def build(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> DenseLinear:
        activation = clamp_from_config(config["activation"])
        kernel, nonlinearity = config.get("kernel", "dense.linear"), str(config.get("nonlinearity", ""))
        layer = cls(tensors["weight"], tensors.get("bias"), activation, kernel, nonlinearity)
        layer._read_float_dtype(config)
        return layer

    def to_dense(self) -> DenseLinear:
        return self

    def with_kernel(self, kernel: str) -> DenseLinear:
        """The same layer on another of :data:`LINEAR_KERNELS`."""
        return DenseLinear(self.weight, self.bias, self.activation, kernel, self.nonlinearity)

    def extra_repr(self) -> str:
        return f"{self.in_features}→{self.out_features} {self._ending()} kernel={self.kernel}"
