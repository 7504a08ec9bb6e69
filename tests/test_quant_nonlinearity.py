"""int8 layers that end in SiLU or hardswish, or give half precision: near float ones, the same on both devices, in files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnncomp.errors import ArgumentError
from cnncomp.nn import (
    BlocksQuantConv2d,
    DenseConv2d,
    QuantConv2d,
    QuantLinear,
    QuantSpec,
)
from cnncomp.ops import cuda
from tests import cuda_emulated as emulated
from tests.cuda_device import emulated_device

FUNCTIONS = {"": lambda t: t, "silu": F.silu, "hardswish": F.hardswish}
SPEC = QuantSpec(0.02, torch.int8)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def conv_layer(name: str) -> tuple[nn.Conv2d, QuantConv2d]:
    conv = nn.Conv2d(16, 24, 3, stride=2, padding=1)
    return conv, QuantConv2d.from_float(conv, SPEC, nonlinearity=name)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("output", [None, QuantSpec(0.015, torch.int8), QuantSpec(0.015, torch.uint8)])
def test_near_the_float_layer(name, output):
    """Quantisation's errors: of the inputs, of the weights, of the output."""
    conv, layer = conv_layer(name)
    layer.set_output(output, 0.5)
    x, residual = torch.randn(2, 16, 9, 7) * 0.8, torch.randint(-4, 5, (2, 24, 5, 4), dtype=torch.int8)
    with torch.no_grad():
        expected = FUNCTIONS[name](conv(x) + residual * 0.5)
    got = layer(x, residual).float() * (1 if output is None else output.scale)
    if output is not None:
        expected = expected.clamp(*((0.0, 255 * 0.015) if output.dtype == torch.uint8 else (-128 * 0.015, 127 * 0.015)))
    assert (got - expected).abs().max() < 0.04 + (0.0 if output is None else 0.0076)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_output_types_and_files(name, dtype):
    conv, layer = conv_layer(name)
    x = torch.randn(2, 16, 9, 7)
    other = QuantConv2d.build(layer.config() | {"float_dtype": str(dtype)[6:]}, layer.tensors())
    assert other(x).dtype == dtype and torch.equal(other(x), layer(x).to(dtype))
    again = QuantConv2d.build(other.config(), other.tensors())
    again.load_state_dict(other.state_dict())
    assert torch.equal(again(x), other(x)) and again.config() == other.config()
    assert ("nonlinearity" in layer.config()) == bool(name) and layer.own_kernels
    assert str(dtype)[6:] in str(other) and name in str(other)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_residual_that_broadcasts_gives_the_same_bits(name):
    _, layer = conv_layer(name)
    layer.set_output(QuantSpec(0.01, torch.int8), 0.01)
    x, residual = torch.randn(2, 16, 8, 8), torch.randint(-90, 90, (1, 24, 4, 4), dtype=torch.int8)
    assert torch.equal(layer(x, residual), layer(x, residual.expand(2, -1, -1, -1).contiguous()))


@pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_bits_on_a_gpu(name):
    pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
    _, layer = conv_layer(name)
    linear = QuantLinear.from_float(nn.Linear(32, 24), SPEC, nonlinearity=name)
    x, rows = (
        torch.randint(-128, 128, (2, 16, 9, 7), dtype=torch.int8),
        torch.randint(-128, 128, (5, 32), dtype=torch.int8),
    )
    for output in (None, QuantSpec(0.015, torch.uint8)):
        layer.set_output(output)
        linear.set_output(output)
        with emulated_device():
            constants, lo, dtype = layer._constants(True)
            packed, g = layer._pack_cuda(layer.weight_int8()), layer.geometry
            where = (g.stride, g.padding, g.dilation, g.groups, dtype)
            got = cuda.conv2d_int8(x, packed, constants, None, 1.0, lo, *where, *layer._ending(True))
            constants, lo, dtype = linear._constants(True)
            flat = cuda.linear_int8(rows, linear.weight_int8(), constants, None, 1.0, lo, dtype, *linear._ending(True))
        assert torch.equal(got, layer(x)) and torch.equal(flat, linear(rows))


def test_bad_arguments():
    conv, layer = conv_layer("silu")
    with pytest.raises(ArgumentError, match="activation: got 'gelu'"):
        QuantConv2d.from_float(conv, SPEC, nonlinearity="gelu")
    with pytest.raises(ArgumentError, match="float_dtype"):
        QuantConv2d.build(layer.config() | {"float_dtype": "float64"}, layer.tensors())
    with pytest.raises(ArgumentError, match="nonlinearity: got 'silu'"):
        BlocksQuantConv2d.from_float(conv, SPEC, nonlinearity="silu")
    with pytest.raises(ArgumentError, match="activation: got 'gelu'"):
        DenseConv2d(layer.geometry, conv.weight, nonlinearity="gelu")
