"""2:4 operators and layers up to the launch: on a CPU as dense ones, and through the launch glue into the emulator."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cnncomp.dispatch.candidates import table
from cnncomp.errors import ArgumentError, DeviceError, PatternError
from cnncomp.nn import (
    BlocksQuantConv2d,
    BlocksQuantLinear,
    Clamp,
    DenseConv2d,
    Geometry,
    QuantConv2d,
    QuantLinear,
    QuantMaxPool2d,
    QuantSpec,
    Sparse24QuantConv2d,
    Sparse24QuantLinear,
    VectorsQuantConv2d,
    VectorsQuantLinear,
    VnmQuantConv2d,
    VnmQuantLinear,
)
from cnncomp.nn.units import Units
from cnncomp.ops import cuda_sparse, reference
from cnncomp.sparsity import pack_2to4, pack_gathered, pack_vectors, pack_vnm, vectors, vnm
from tests import cuda_emulated as emulated
from tests.cuda_device import emulated_device
from tests.helpers import random_8bit
from tests.test_packers import masked_2to4, masked_blocks, masked_vnm

needs_nvcc = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")
INT8 = torch.int8


def random_constants(k: int) -> torch.Tensor:
    return torch.stack([torch.rand(k) * 2e-3, torch.randn(k) * 20 + 60, torch.full((k,), 240.0)])


@needs_nvcc
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("groups, out_dtype, residual", [(1, torch.uint8, INT8), (2, torch.float32, torch.float32)])
def test_launch_of_a_conv(layout, groups, out_dtype, residual):
    """Every argument differs from its neighbours, so none can change places unnoticed."""
    x = random_8bit((2, 32, 9, 11), torch.uint8).contiguous(memory_format=layout)
    weight = masked_2to4(torch.randint(-127, 128, (16, 32 // groups, 3, 2), dtype=INT8))
    geometry, constants = ((2, 1), (1, 0), (1, 2), groups), random_constants(16)
    shape = torch.nn.functional.conv2d(x.float(), weight.float(), None, *geometry).shape
    res = torch.randint(-128, 128, shape).to(residual).contiguous(memory_format=layout)
    expected = reference.conv2d_int8(x, weight, constants, res, 0.25, 3.0, *geometry, out_dtype)
    args = (x, pack_2to4(weight, groups), constants, res, 0.25, 3.0, (3, 2), *geometry, out_dtype)
    with emulated_device():
        got = cuda_sparse.conv2d("sparse24", *args)
    assert got.is_contiguous(memory_format=torch.channels_last) and torch.equal(got, expected)
    assert torch.equal(torch.ops.cnncomp.conv2d_sparse24_int8(*args), expected)  # on the CPU


@needs_nvcc
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_launch_of_a_conv_of_halves(dtype):
    """Small integers, so that every sum is exact."""
    x, geometry = torch.randint(-2, 3, (2, 32, 9, 11)).to(dtype), ((2, 1), (1, 0), (1, 2), 2)
    weight = masked_2to4(torch.randint(-2, 3, (16, 16, 3, 2)).to(dtype))
    acc = torch.nn.functional.conv2d(x.float(), weight.float(), None, *geometry)
    res, constants = torch.randint(-8, 9, acc.shape).to(dtype), random_constants(16).round()
    expected = reference.epilogue(acc, constants, res, 0.25, 3.0, dtype)
    args = (x, pack_2to4(weight, 2), constants, res, 0.25, 3.0, (3, 2), *geometry, dtype)
    with emulated_device():
        got = cuda_sparse.conv2d("sparse24", *args)
    assert got.is_contiguous(memory_format=torch.channels_last) and torch.equal(got, expected)
    assert torch.equal(torch.ops.cnncomp.conv2d_sparse24_f16(*args), expected)  # on the CPU


def test_halves_that_do_not_belong_together():
    x, packed = torch.zeros(1, 16, 4, 4, dtype=torch.float16), pack_2to4(torch.zeros(8, 16, 1, 1, dtype=torch.float16))
    one, op = (1, 1), torch.ops.cnncomp.conv2d_sparse24_f16
    rest = (None, 0.0, 0.0, one, one, (0, 0), one, 1)
    with pytest.raises(ArgumentError, match="packed shape"):
        op(x, pack_2to4(torch.zeros(8, 16, 1, 1, dtype=INT8)), random_constants(8), *rest, torch.float16)
    with pytest.raises(ArgumentError, match="out_dtype"):
        op(x, packed, random_constants(8), *rest, torch.bfloat16)
    with pytest.raises(ArgumentError, match="constants"):
        op(x, packed, torch.zeros(4, 8), *rest, torch.float16)


@needs_nvcc
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_launch_of_blocks(dtype):
    half = dtype == torch.float16
    x, kind = torch.randint(0, 3, (2, 64, 7, 9)).to(dtype), dtype if half else INT8
    weight = masked_blocks(torch.randint(-2, 3, (80, 32, 3, 2)).to(kind), 64, 16 // dtype.itemsize, 2, 0.4)
    geometry, constants = ((2, 1), (1, 0), (1, 2), 2), random_constants(80)
    acc = torch.nn.functional.conv2d(x.float(), weight.float(), None, *geometry)
    res = torch.randint(-8, 9, acc.shape).to(kind)
    expected = reference.epilogue(acc, constants, res, 0.25, 3.0, dtype)
    args = (x, pack_gathered(weight, 2), constants, res, 0.25, 3.0, (3, 2), *geometry, dtype)
    with emulated_device():
        assert torch.equal(cuda_sparse.conv2d("blocks", *args), expected)
    op = torch.ops.cnncomp.conv2d_blocks_f16 if half else torch.ops.cnncomp.conv2d_blocks_int8
    assert torch.equal(op(*args), expected)  # on the CPU


@needs_nvcc
def test_launch_of_linear_blocks():
    x, weight = (
        random_8bit((5, 48), INT8),
        masked_blocks(torch.randint(-127, 128, (70, 48, 1, 1), dtype=INT8), 64, 16, 1, 0.5),
    )
    constants, rest = random_constants(70), (None, 0.0, 0.0, torch.uint8)
    expected = reference.linear_int8(x, weight.flatten(1), constants, *rest)
    packed = pack_gathered(weight)
    with emulated_device():
        assert torch.equal(cuda_sparse.linear("blocks", x, packed, constants, *rest), expected)
    assert torch.equal(torch.ops.cnncomp.linear_blocks_int8(x, packed, constants, *rest), expected)
    with pytest.raises(ArgumentError, match="whole steps of 8224"):
        torch.ops.cnncomp.linear_blocks_int8(x, packed[:-1], constants, *rest)


@pytest.mark.parametrize(
    "conv, linear, channels, block",
    [(BlocksQuantConv2d, BlocksQuantLinear, 32, (64, 16)), (VectorsQuantConv2d, VectorsQuantLinear, 30, (32, 4))],
)
def test_gathering_layers_on_a_cpu_are_the_dense_ones(conv, linear, channels, block):
    geometry, spec = Geometry(channels, 24, (3, 3), padding=(1, 1)), QuantSpec(0.02, torch.uint8)
    weight = masked_blocks(torch.randint(-127, 128, (24, channels, 3, 3), dtype=INT8), *block, 1, 0.5)
    args = (torch.rand(24) / 1000 + 1e-4, torch.randn(24), spec, Clamp(0.0))
    x = torch.rand(2, channels, 5, 6)
    sparse, dense = conv(geometry, weight, *args), QuantConv2d(geometry, weight, *args)
    assert torch.equal(sparse(x), dense(x)) and torch.equal(sparse.weight_int8(), weight)
    flat = torch.randint(-127, 128, (24, 80), dtype=INT8)
    sparse, dense = linear(flat, *args), QuantLinear(flat, *args)
    again = linear.build(sparse.config(), sparse.tensors())
    x = torch.rand(3, 80)
    assert torch.equal(sparse(x), dense(x)) and torch.equal(again(x), dense(x))


def test_why_a_layer_has_no_blocks():
    def reason(weight, groups=1):
        layer = DenseConv2d(Geometry(weight.shape[1] * groups, len(weight), (1, 1), groups=groups), weight, None)
        layer.info.input = QuantSpec(0.02, torch.uint8)
        return next(c for c in table(layer) if c.kernel == "conv2d_blocks_int8").applies(layer)

    weight = torch.ones(128, 32, 1, 1)
    assert "0% of the 64x16 blocks" in reason(weight) and "multiple of 16" in reason(weight[:, :24])
    weight[:64, :16] = 0
    assert "25% of the 64x16 blocks" in reason(weight)
    weight[:64] = 0
    assert reason(weight) is None


def check_launch(format, dtype, weight, packed, stride, padding):
    """A convolution in two groups of three images, in the emulator and on the CPU, against the reference."""
    half, kernel_size, outputs = dtype == torch.float16, weight.shape[2:], len(weight)
    x = torch.randint(0, 3, (3, 2 * weight.shape[1], 7, 9)).to(dtype)
    geometry, constants = (stride, padding, (1, 2), 2), random_constants(outputs)
    acc = torch.nn.functional.conv2d(x.float(), weight.float(), None, *geometry)
    res = torch.randint(-8, 9, acc.shape).to(weight.dtype)
    expected = reference.epilogue(acc, constants, res, 0.25, 3.0, dtype)
    args = (x, packed, constants, res, 0.25, 3.0, kernel_size, *geometry, dtype)
    with emulated_device():
        got = cuda_sparse.conv2d(format, *args)
    assert got.is_contiguous(memory_format=torch.channels_last) and torch.equal(got, expected)
    op = getattr(torch.ops.cnncomp, f"conv2d_{format}_{'f16' if half else 'int8'}")
    assert torch.equal(op(*args), expected)  # on the CPU


@needs_nvcc
@pytest.mark.parametrize("kernel_size, stride, padding", [((3, 2), (2, 1), (1, 0)), ((1, 1), (1, 1), (0, 0))])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
@pytest.mark.parametrize("channels", [30, 32])
def test_launch_of_vectors(dtype, channels, kernel_size, stride, padding):
    """Channels of a group that are no whole fours and others, batches that are no whole units, pixels that stand for images."""
    kind = dtype if dtype == torch.float16 else INT8
    width = 1 if dtype == torch.float16 else 4
    weight = masked_blocks(torch.randint(-2, 3, (80, channels, *kernel_size)).to(kind), 32, width, 2, 0.4)
    check_launch("vectors", dtype, weight, pack_vectors(weight, 2), stride, padding)


@needs_nvcc
def test_launch_of_linear_vectors():
    weight = masked_blocks(torch.randint(-127, 128, (70, 46, 1, 1), dtype=INT8), 32, 4, 1, 0.5)
    x, constants, rest = random_8bit((2, 5, 46), INT8), random_constants(70), (None, 0.0, 0.0, torch.uint8)
    expected = reference.linear_int8(x.flatten(0, 1), weight.flatten(1), constants, *rest).reshape(2, 5, 70)
    packed = pack_vectors(weight)
    with emulated_device():
        assert torch.equal(cuda_sparse.linear("vectors", x, packed, constants, *rest), expected)
    assert torch.equal(torch.ops.cnncomp.linear_vectors_int8(x, packed, constants, *rest), expected)
    with pytest.raises(ArgumentError, match="whole pieces of 1056"):
        torch.ops.cnncomp.linear_vectors_int8(x, packed[:-1], constants, *rest)


@needs_nvcc
@pytest.mark.parametrize("kernel_size, stride, padding", [((3, 2), (2, 1), (1, 0)), ((1, 1), (1, 1), (0, 0))])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
@pytest.mark.parametrize("channels", [30, 32])
def test_launch_of_vnm(dtype, channels, kernel_size, stride, padding):
    """Channels that torch copies into units and others, batches that are no whole units, pixels that stand for images."""
    kind = dtype if dtype == torch.float16 else INT8
    weight = masked_vnm(torch.randint(-2, 3, (140, channels, *kernel_size)).to(kind), 64, 10, 2)
    check_launch("vnm", dtype, weight, pack_vnm(weight, 10, 2), stride, padding)


@needs_nvcc
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
@pytest.mark.parametrize("format", ["vectors", "vnm"])
def test_launches_in_a_chain(format, dtype):
    """The first convolution gives units of images, the second takes them; its residual and output lie in both ways."""
    fmt, kind = cuda_sparse.GATHERED[format], dtype if dtype == torch.float16 else INT8
    width = 1 if dtype == torch.float16 else 4
    draw = (torch.randint(-2, 3, (k, c, r, r)).to(kind) for k, c, r in ((64, 32, 3), (72, 64, 1)))
    masked = [masked_blocks(w, 32, width, 1, 0.4) if format == "vectors" else masked_vnm(w, 64, 10) for w in draw]
    packed = [pack_vectors(w) if format == "vectors" else pack_vnm(w, 10) for w in masked]
    constants = [torch.tensor([[2.0**-4], [3.0], [240.0]]).repeat(1, len(w)) for w in masked]
    x, where = torch.randint(0, 3, (8, 32, 5, 6)).to(dtype), ((1, 1), (1, 1), (1, 1), 1, dtype)
    acc = torch.nn.functional.conv2d(x.float(), masked[0].float(), None, 1, 1)
    middle = reference.epilogue(acc, constants[0], None, 0.0, 0.0, dtype)
    acc = torch.nn.functional.conv2d(middle.float(), masked[1].float(), None, 1, 1)
    res = torch.randint(-8, 9, acc.shape).to(kind)
    expected = reference.epilogue(acc, constants[1], res, 0.25, 3.0, dtype)

    def run(conv):
        units = conv(x, packed[0], constants[0], None, 0.0, 0.0, (3, 3), *where, True)
        assert torch.equal(units, fmt.to_units(middle)) and torch.equal(vectors.from_units(units), middle)
        for residual in (res, fmt.to_units(res)):
            args = (units, packed[1], constants[1], residual, 0.25, 3.0, (1, 1), *where)
            assert torch.equal(conv(*args), expected) and torch.equal(conv(*args, True), fmt.to_units(expected))

    with emulated_device():
        run(partial(cuda_sparse.conv2d, format))
    run(getattr(torch.ops.cnncomp, f"conv2d_{format}_{'f16' if width == 1 else 'int8'}"))  # on the CPU


def test_outputs_that_fit_into_no_units():
    packed = pack_vectors(torch.zeros(8, 16, 1, 1, dtype=INT8))
    x, where = torch.zeros(9, 16, 4, 4, dtype=torch.uint8), ((1, 1), (1, 1), (0, 0), (1, 1), 1, torch.uint8, True)
    for conv in (partial(cuda_sparse.conv2d, "vectors"), torch.ops.cnncomp.conv2d_vectors_int8):
        with pytest.raises(ArgumentError, match="whole units"):
            conv(x, packed, random_constants(8), None, 0.0, 0.0, *where)
    assert not cuda_sparse.units_fit("vnm", INT8, 24, 64, 1) and cuda_sparse.units_fit("vnm", torch.float16, 24, 64, 1)
    assert not cuda_sparse.units_fit("vnm", INT8, 8, 36, 1) and cuda_sparse.units_fit("vectors", INT8, 8, 36, 1)


@pytest.mark.parametrize("fmt, images", [(vectors, 8), (vectors, 16), (vnm, 8), (vnm, 16)])
def test_max_pool_of_units(fmt, images):
    """The bits that images have, and units again."""
    x, pool = random_8bit((images, 8, 7, 5), torch.uint8), QuantMaxPool2d(3, 2, 1)
    got = pool(Units(fmt.to_units(x)))
    assert isinstance(got, Units) and got.shape == (images, 8, 4, 3) and got.dtype == torch.uint8 and got.dim() == 4
    assert torch.equal(got.tensor, fmt.to_units(pool(x)))


@needs_nvcc
def test_launch_of_linear_vnm():
    weight = masked_vnm(torch.randint(-127, 128, (70, 46, 1, 1), dtype=INT8), 64, 8)
    x, constants, rest = random_8bit((2, 5, 46), INT8), random_constants(70), (None, 0.0, 0.0, torch.uint8)
    expected = reference.linear_int8(x.flatten(0, 1), weight.flatten(1), constants, *rest).reshape(2, 5, 70)
    packed = pack_vnm(weight, 8)
    with emulated_device():
        assert torch.equal(cuda_sparse.linear("vnm", x, packed, constants, *rest), expected)
    assert torch.equal(torch.ops.cnncomp.linear_vnm_int8(x, packed, constants, *rest), expected)


def test_vnm_layers_on_a_cpu_are_the_dense_ones():
    geometry, spec = Geometry(40, 24, (3, 3), padding=(1, 1)), QuantSpec(0.02, torch.uint8)
    weight = masked_vnm(torch.randint(-127, 128, (24, 40, 3, 3), dtype=INT8), 64, 20)
    args = (torch.rand(24) / 1000 + 1e-4, torch.randn(24), spec, Clamp(0.0))
    x = torch.rand(2, 40, 5, 6)
    sparse, dense = VnmQuantConv2d(geometry, weight, *args), QuantConv2d(geometry, weight, *args)
    assert torch.equal(sparse(x), dense(x)) and torch.equal(sparse.weight_int8(), weight)
    sparse = VnmQuantLinear(weight[:, :, 0, 0], *args)
    again = VnmQuantLinear.build(sparse.config(), sparse.tensors())
    flat = torch.rand(3, 40)
    assert torch.equal(again(flat), QuantLinear(weight[:, :, 0, 0], *args)(flat))
    with pytest.raises(
        PatternError, match=r"\d+ channels with non-zeros at output channels 0 to 23, input channels 0 to 7"
    ):
        VnmQuantConv2d(geometry, weight + 1, *args)


@pytest.mark.parametrize("m, reason", [(8, None), (16, None), (4, "not 64:2:M for any M of at least 8")])
def test_why_a_layer_is_not_vnm(m, reason):
    weight = masked_vnm(torch.randn(128, 32, 3, 3), 64, m)
    layer = DenseConv2d(Geometry(32, 128, (3, 3)), weight, None)
    layer.info.input = QuantSpec(0.02, torch.uint8)
    applies = next(c for c in table(layer) if c.kernel == "conv2d_vnm_int8").applies
    assert applies(layer) == reason
    stem = DenseConv2d(Geometry(3, 64, (3, 3)), masked_2to4(torch.randn(64, 3, 3, 3)), None)
    stem.info.input = QuantSpec(0.02, torch.uint8)
    assert "0% of the input channels" in str(applies(stem))


def test_why_a_layer_has_no_runs():
    def reason(weight, kernel=(1, 1), groups=1):
        layer = DenseConv2d(Geometry(weight.shape[1] * groups, len(weight), kernel, groups=groups), weight, None)
        layer.info.input = QuantSpec(0.02, torch.uint8)
        return next(c for c in table(layer) if c.kernel == "conv2d_vectors_int8").applies(layer)

    weight = torch.ones(64, 30, 1, 1)
    assert "0% of the runs of 32x4" in reason(weight)
    weight[:32, :24] = 0
    assert reason(weight) is None  # 6 of 16
    assert "depthwise" in reason(torch.zeros(64, 1, 1, 1), groups=64)
    assert "at most 15" in reason(torch.zeros(64, 4, 16, 1), (16, 1))


@needs_nvcc
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (48,)])
def test_launch_of_a_linear(shape):
    x, weight = random_8bit(shape, INT8), masked_2to4(torch.randint(-127, 128, (24, 48), dtype=INT8))
    constants = random_constants(24)
    rest = (None, 0.0, 0.0, torch.uint8)  # hi is within its range
    expected = reference.linear_int8(x.reshape(-1, 48), weight, constants, *rest).reshape(*shape[:-1], 24)
    packed = pack_2to4(weight[..., None, None])
    with emulated_device():
        assert torch.equal(cuda_sparse.linear("sparse24", x, packed, constants, *rest), expected)
    assert torch.equal(torch.ops.cnncomp.linear_sparse24_int8(x, packed, constants, *rest), expected)


def test_misaligned_and_empty_inputs():
    constants = random_constants(8)
    packed = pack_2to4(torch.zeros(8, 16, 1, 1, dtype=INT8))
    x = torch.zeros(0, 16, 4, 4, dtype=torch.uint8)
    where = ((1, 1), (1, 1), (0, 0), (1, 1), 1)
    out = cuda_sparse.conv2d("sparse24", x, packed, constants, None, 0.0, 0.0, *where, torch.uint8)
    assert out.shape == (0, 8, 4, 4)
    odd = torch.zeros(33, dtype=torch.uint8)[1:].reshape(2, 16, 1, 1)
    assert cuda_sparse._aligned(odd).data_ptr() % 16 == 0


@pytest.mark.parametrize(
    "shape, kernel_size, groups, match",
    [
        ((1, 24, 4, 4), (1, 1), 1, "multiple of 16"),
        ((1, 32, 20, 20), (16, 1), 1, "at most 15"),
        ((1, 32, 4, 4), (1, 1), 4, "8 in a group"),
    ],
)
def test_what_the_kernels_cannot_run_is_an_error(shape, kernel_size, groups, match):
    weight = torch.zeros(8, shape[1] // groups, *kernel_size, dtype=INT8)
    x, one = torch.zeros(shape, dtype=torch.uint8), (1, 1)
    args = (random_constants(8), None, 0.0, 0.0, kernel_size, one, (0, 0), one, groups, torch.uint8)
    with pytest.raises(ArgumentError, match=match):
        cuda_sparse.conv2d("sparse24", x, pack_2to4(weight, groups), *args)


def test_operands_that_do_not_belong_together():
    packed = pack_2to4(torch.zeros(8, 16, 1, 1, dtype=INT8))
    x, where = torch.zeros(1, 16, 4, 4, dtype=torch.uint8), ((3, 3), (1, 1), (0, 0), (1, 1), 1)
    with pytest.raises(ArgumentError, match="packed shape"):
        torch.ops.cnncomp.conv2d_sparse24_int8(x, packed, random_constants(8), None, 0.0, 0.0, *where, torch.uint8)
    with pytest.raises(ArgumentError, match="no mean shift"):
        torch.ops.cnncomp.linear_sparse24_int8(x[0, :, 0], packed, torch.zeros(4, 8), None, 0.0, 0.0, torch.uint8)


def test_layers_on_a_cpu_are_the_dense_ones():
    geometry, spec = Geometry(32, 24, (3, 3), padding=(1, 1)), QuantSpec(0.02, torch.uint8)
    weight = masked_2to4(torch.randint(-127, 128, (24, 32, 3, 3), dtype=INT8))
    args = (torch.rand(24) / 1000 + 1e-4, torch.randn(24), spec, Clamp(0.0))
    x = torch.rand(2, 32, 5, 6)
    sparse, dense = Sparse24QuantConv2d(geometry, weight, *args), QuantConv2d(geometry, weight, *args)
    assert torch.equal(sparse(x), dense(x)) and torch.equal(sparse.weight_int8(), weight)
    flat = masked_2to4(torch.randint(-127, 128, (24, 80), dtype=INT8))
    sparse, dense = Sparse24QuantLinear(flat, *args), QuantLinear(flat, *args)
    again = Sparse24QuantLinear.build(sparse.config(), sparse.tensors())
    x = torch.rand(3, 80)
    assert torch.equal(sparse(x), dense(x)) and torch.equal(again(x), dense(x))
    with pytest.raises(PatternError, match=r"3 non-zeros at output channel 1, input channels 4 to 7"):
        flat = torch.zeros(2, 8, dtype=INT8)
        flat[1, 5:8] = 1
        Sparse24QuantLinear(flat, torch.ones(2), None, spec)
    with pytest.raises(ArgumentError, match="weight_shift"):
        Sparse24QuantLinear(torch.zeros(2, 8, dtype=INT8), torch.ones(2), None, spec, weight_shift=torch.ones(2))


def test_devices_without_sparse_tensor_cores(monkeypatch):
    with pytest.raises(DeviceError, match="cpu"):
        cuda_sparse.check_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(DeviceError, match="sm_80"):
        cuda_sparse.check_device(torch.device("cuda", 0))
