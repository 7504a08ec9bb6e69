"""Random layers and inputs for tests, and the environment of their processes."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor, nn

from cnncomp.nn import LINEAR, Clamp, Geometry, QuantConv2d, QuantSpec, quantize_weight
from cnncomp.ops import reference


def outside_xdist() -> dict[str, str]:
    """The environment for a pytest of its own, which isn't one of the processes that the tests run in."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


def random_8bit(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    lo, hi = (0, 256) if dtype == torch.uint8 else (-128, 128)
    return torch.randint(lo, hi, shape, dtype=dtype)


def reference_conv(layer: QuantConv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """What the reference says a QuantConv2d gives for ``x`` (float or 8 bit)."""
    g = layer.geometry
    if x.is_floating_point():
        x = reference.quantize(x, layer.inv_scale, layer.input.dtype)
    return reference.conv2d_int8(
        x, layer.weight_int8(), layer.constants, residual, layer.residual_scale, layer.lo,
        g.stride, g.padding, g.dilation, g.groups, layer.out_dtype, *layer._ending(True),
    )  # fmt: skip


def make_quant_conv(
    geometry: Geometry,
    dtype: torch.dtype = torch.uint8,
    output: QuantSpec | None = None,
    activation: Clamp = LINEAR,
    residual_scale: float = 1.0,
) -> QuantConv2d:
    g = geometry
    weight = torch.randn(g.out_channels, g.in_channels // g.groups, *g.kernel_size)
    q, scale = quantize_weight(weight / math.sqrt(g.reduction))
    bias = torch.randn(g.out_channels)
    return QuantConv2d(g, q, scale, bias, QuantSpec(0.02, dtype), activation, output, residual_scale)


def mask_weights(model: nn.Module, sparsity: float) -> nn.Module:
    """Zero a random fraction of every conv and linear weight."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                m.weight.mul_(torch.rand_like(m.weight) >= sparsity)
    return model


def randomize_norms(model: nn.Module) -> nn.Module:
    """BatchNorm statistics and affine parameters that are not the identity."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                m.running_mean.uniform_(-0.5, 0.5)
                m.running_var.uniform_(0.5, 2.0)
                m.weight.uniform_(-1.5, 1.5)
                m.bias.uniform_(-0.5, 0.5)
    return model


def noise(got: Tensor, expected: Tensor) -> float:
    """Mean square of the error over that of what is expected."""
    return ((got - expected).square().mean() / expected.square().mean()).item()
