"""What lies between int8 layers on a GPU: quantising floats, max-pool of bytes, mean pool, in the emulator and bit for bit."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncomp.errors import DtypeError
from cnncomp.ops import cuda, reference
from cnncomp.ops.max_pool2d_int8 import _cuda as max_pool_on_gpu
from cnncomp.ops.quantize import _cuda as quantize_on_gpu
from tests import cuda_emulated as emulated
from tests.cuda_device import emulated_device
from tests.test_cuda_kernels import assert_same

_cuda = pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BYTES = [torch.uint8, torch.int8]
SHAPES = [(2, 3, 9, 11), (1, 8, 5, 7), (3, 5, 1, 1), (2, 1, 4, 4), (1, 130, 2, 3), (7, 33), (5,), (2, 3, 4)]


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("dtype", BYTES)
def test_quantize(x_dtype, dtype):
    """Vectors and what is left of them, both layouts, values past both ends, ties and numbers that are none."""
    torch.manual_seed(0)
    for shape in SHAPES:
        x = (torch.randn(shape) * 90).to(x_dtype)
        special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.25, 0.75, 1.25, -0.25, -0.0]).to(x_dtype)
        x.view(-1)[: min(8, x.numel())] = special[: min(8, x.numel())]
        layouts = [torch.contiguous_format] + [torch.channels_last] * (x.dim() == 4)
        for layout in layouts:
            image = x.contiguous(memory_format=layout)
            with emulated_device():
                got = quantize_on_gpu(image, 2.0, dtype)
            assert_same(got, reference.quantize(image, 2.0, dtype), (shape, layout))
            assert x.dim() != 4 or got.is_contiguous(memory_format=torch.channels_last)


def test_quantize_of_views():
    """Not aligned, or with gaps."""
    x = torch.randn(4, 7, 6) * 50
    for view in (x.view(-1)[1:], x[:, 1:, ::2], x.permute(2, 0, 1), x[:, None].expand(4, 4, 7, 6)):
        with emulated_device():
            assert_same(
                quantize_on_gpu(view, 0.7, torch.int8), reference.quantize(view, 0.7, torch.int8), view.stride()
            )


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_max_pool(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    r, s, dilation = draw(1, 3), draw(1, 3), (draw(1, 2), draw(1, 2))
    padding, stride = (draw(0, r // 2), draw(0, s // 2)), (draw(1, 3), draw(1, 3))
    h, w = draw(dilation[0] * (r - 1) + 1, 9), draw(dilation[1] * (s - 1) + 1, 9)
    n, c, dtype = draw(1, 3), data.draw(st.sampled_from([1, 3, 4, 8, 10, 36])), data.draw(st.sampled_from(BYTES))
    torch.manual_seed(n + c + h)
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    x = torch.randint(low, high, (n, c, h, w), dtype=dtype)
    if data.draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    args = (x, (r, s), stride, padding, dilation, data.draw(st.booleans()))
    with emulated_device():
        got = max_pool_on_gpu(*args)
    assert_same(got, reference.max_pool2d_int8(*args), args[1:])


@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (1, 7, 2, 2), (3, 130, 4, 4), (1, 4, 1, 1)])
def test_mean_pool(shape):
    torch.manual_seed(0)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    total = torch.zeros(shape[:2])
    for pixel in x.flatten(2).unbind(2):
        total = total + pixel
    expected = total * torch.tensor(1.0 / (shape[2] * shape[3]))
    with emulated_device():
        assert_same(cuda.mean_pool2d(x).flatten(1), expected, shape)
        planes = x.contiguous()
        assert torch.allclose(cuda.mean_pool2d(planes).flatten(1), expected, atol=1e-6)


def test_nothing_and_what_is_refused():
    with emulated_device():
        assert cuda.quantize(torch.zeros(0, 3, 4, 4), 1.0, torch.uint8).shape == (0, 3, 4, 4)
        assert cuda.mean_pool2d(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 1, 1)
        x = torch.zeros(0, 3, 4, 4, dtype=torch.uint8)
        assert cuda.max_pool2d_int8(x, (2, 2), (2, 2), (0, 0), (1, 1)).shape == (0, 3, 2, 2)
        with pytest.raises(DtypeError, match="float64"):
            quantize_on_gpu(torch.zeros(3, dtype=torch.float64), 1.0, torch.uint8)
        with pytest.raises(DtypeError, match="int32"):
            quantize_on_gpu(torch.zeros(3), 1.0, torch.int32)
        with pytest.raises(DtypeError, match="float32"):
            max_pool_on_gpu(torch.zeros(1, 1, 2, 2), (1, 1), (1, 1), (0, 0), (1, 1))
    with pytest.raises(ValueError, match="expected 2 to 4 to 0 or 1"):
        _cuda.plan_quantize(0, 0, 1, 1, 1, True, 1.0, 0, 0)
    with pytest.raises(ValueError, match="too many"):
        _cuda.plan_max_pool2d_int8(300, 300, 0, 0, 40000, 300, 300, 4, 1, 1, 1, 1, 0, 0, 1, 1, 0)
    with pytest.raises(ValueError, match="expected dtype code 2"):
        _cuda.plan_mean_pool2d(0, 3, 1, 2, 2, 4, 0)


SHIFTED = {
    "3x3": dict(shape=(2, 16, 6, 5), k=24, kernel=(3, 3), geometry=((1, 1), (1, 1), (1, 1), 1)),
    "odd channels": dict(shape=(1, 7, 5, 6), k=9, kernel=(2, 3), geometry=((2, 1), (1, 2), (1, 2), 1)),
    "groups": dict(shape=(1, 24, 5, 5), k=12, kernel=(3, 3), geometry=((2, 2), (1, 1), (1, 1), 2)),
    "stem": dict(shape=(1, 3, 8, 8), k=20, kernel=(7, 7), geometry=((2, 2), (3, 3), (1, 1), 1)),
    "depthwise": dict(shape=(2, 8, 5, 6), k=8, kernel=(3, 3), geometry=((1, 2), (1, 1), (1, 1), 8)),
    "depth multiplier": dict(shape=(1, 3, 5, 4), k=6, kernel=(3, 2), geometry=((1, 1), (1, 0), (2, 1), 3)),
    "many channels": dict(shape=(1, 160, 3, 3), k=70, kernel=(1, 1), geometry=((1, 1), (0, 0), (1, 1), 1)),
}


@pytest.mark.parametrize("name", SHIFTED)
@pytest.mark.parametrize("dtype", BYTES)
def test_mean_shift_convolution(name, dtype):
    case = SHIFTED[name]
    torch.manual_seed(3)
    n, c, h, w = case["shape"]
    k, (r, s), geometry = case["k"], case["kernel"], case["geometry"]
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    x = torch.randint(low, high, (n, c, h, w), dtype=dtype)
    weight = torch.randint(-127, 128, (k, c // geometry[3], r, s), dtype=torch.int8)
    packed = weight.permute(0, 2, 3, 1).contiguous()
    scale = torch.rand(k) / weight[0].numel() ** 0.5 * 2e-2
    constants = torch.stack([scale, torch.randn(k) * 20 + 60, torch.rand(k) * 100 + 120, torch.randn(k) * 3e-2])
    shape = torch.nn.functional.conv2d(x.float(), weight.float(), None, *geometry).shape
    for residual in (None, torch.randint(-128, 128, shape, dtype=torch.int8)):
        for out_dtype, activation in ((torch.uint8, ""), (torch.float16, "silu")):
            args = (constants, residual, 0.3, 0.0, *geometry, out_dtype, activation, 0.5)
            with emulated_device():
                got = cuda.conv2d_int8(x, packed, *args)
            expected = reference.conv2d_int8(x, weight, *args)
            assert_same(got, expected, (residual is None, out_dtype))
            plain = reference.conv2d_int8(x, weight, constants[:3], *args[1:])
            assert not torch.equal(expected, plain)


def test_mean_shift_linear():
    torch.manual_seed(4)
    x, weight = (
        torch.randint(-128, 128, (2, 3, 40), dtype=torch.int8),
        torch.randint(-127, 128, (24, 40)).to(torch.int8),
    )
    constants = torch.stack(
        [torch.rand(24) * 1e-3, torch.randn(24) * 9, torch.full((24,), 127.0), torch.randn(24) * 0.1]
    )
    for residual in (None, torch.randn(2, 3, 24)):
        args = (constants, residual, 0.3, -128.0, torch.int8)
        with emulated_device():
            got = cuda.linear_int8(x, weight, *args)
        assert_same(got, reference.linear_int8(x, weight, *args), residual is None)


def test_mean_shift_where_triton_runs():
    """There, torch takes the sums."""
    x, shift = torch.randint(0, 256, (2, 6, 5, 4), dtype=torch.uint8), torch.randn(9)
    args = (x, shift, (3, 2), (2, 1), (1, 0), (1, 2), 3)
    with emulated_device():
        ours = cuda._mean_shift(*args)
        with mock.patch.object(cuda, "backend", lambda device: "triton"):
            assert_same(cuda._mean_shift(*args), ours, "triton")
