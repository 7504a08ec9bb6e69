"""The fp32 pools against torch, for every instruction set of this machine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cnncomp
from cnncomp import _cpu
from cnncomp.errors import DtypeError
from cnncomp.nn import MeanPool2d, QuantMaxPool2d
from tests.fp32_kernels import LANES, Guarded, address, assert_within, one_thread_for_references
from tests.instruction_sets import float_isa as isa

__all__ = ["isa", "one_thread_for_references"]  # fixtures

Pair = tuple[int, int]


def max_pool(
    x: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair = (1, 1),
    guarded: Guarded | None = None,
    ceil_mode: bool = False,
) -> None:
    """Compare with torch, bit by bit: a maximum is one of the inputs."""
    expected = F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    window = (kernel, stride, padding, dilation, ceil_mode)
    assert torch.ops.cnncomp.max_pool2d(x.to("meta"), *window).shape == expected.shape
    place = guarded if guarded is not None else lambda a: a
    image, out = place(x.numpy()), place(np.full(expected.shape, np.nan, np.float32))
    _cpu.max_pool2d(address(image), *x.shape, *kernel, *stride, *padding, *dilation, address(out), 1, ceil_mode)
    assert np.array_equal(out, expected.numpy(), equal_nan=True), (x.shape, kernel, stride, padding, dilation)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_max_pool_at_the_edges_of_vectors(isa: str, stride: int) -> None:
    torch.manual_seed(0)
    for width in sorted({stride * v * lanes + d for lanes in LANES for v in (1, 2) for d in (-2, -1, 0, 1, 2)}):
        if width >= 3:
            max_pool(torch.randn(2, 3, 7, width) - 5, (3, 3), (stride, stride), (1, 1))
            max_pool(torch.randn(1, 2, 6, width), (2, 3), (2, stride), (0, 0))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_max_pool_of_random_sizes(data: st.DataObject) -> None:
    def pair(low: int, high: int) -> Pair:
        return data.draw(st.integers(low, high)), data.draw(st.integers(low, high))

    kernel, dilation = pair(1, 5), pair(1, 3)
    padding = data.draw(st.integers(0, kernel[0] // 2)), data.draw(st.integers(0, kernel[1] // 2))
    h, w = pair(1, 40)
    if all(x + 2 * p > d * (k - 1) for x, p, d, k in zip((h, w), padding, dilation, kernel, strict=True)):
        max_pool(torch.randn(2, 2, h, w), kernel, pair(1, 4), padding, dilation, ceil_mode=data.draw(st.booleans()))


def test_max_pool_hands_on_nan_and_infinity(isa: str) -> None:
    x = torch.randn(1, 2, 12, 40)
    x[0, 0, 3, 17], x[0, 1, 5, 0], x[0, 1, 6:] = math.nan, math.inf, -math.inf
    max_pool(x, (3, 3), (2, 2), (1, 1))
    max_pool(x, (3, 3), (1, 1), (1, 1))


@pytest.mark.parametrize("at_end", [False, True])
def test_pools_touch_nothing_but_their_operands(isa: str, at_end: bool) -> None:
    guarded = Guarded(at_end)
    for stride in (1, 2, 3):
        for width in (36, 37):
            max_pool(torch.randn(1, 2, 9, width), (3, 3), (stride, stride), (1, 1), guarded=guarded)
    for last in (False, True):
        x, out = guarded(np.ones((2, 7 * 5, 3), np.float32)), guarded(np.zeros((2, 3), np.float32))
        _cpu.mean_pool2d(address(x), 2, 3, 35, last, address(out), 1)
        assert (out == 1).all()


@pytest.mark.parametrize("c", [1, 3, 16, 33])
@pytest.mark.parametrize(("h", "w"), [(1, 1), (7, 7), (4, 4), (3, 11)])
def test_mean_pool(isa: str, c: int, h: int, w: int) -> None:
    x = torch.randn(3, c, h, w)
    for image in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        expected, size = (t.double().mean((2, 3), keepdim=True) for t in (image, image.abs()))
        assert_within(torch.ops.cnncomp.mean_pool2d(image), expected, size, image.stride())


def test_same_bits_on_any_number_of_threads(isa: str) -> None:
    x = torch.randn(2, 70, 20, 21)
    results = []
    for threads in (1, 3):
        mean, greatest = torch.empty(2, 70), torch.empty(2, 70, 10, 11)
        _cpu.mean_pool2d(address(x), 2, 70, 420, False, address(mean), threads)
        _cpu.max_pool2d(address(x), 2, 70, 20, 21, 3, 3, 2, 2, 1, 1, 1, 1, address(greatest), threads)
        results.append((mean, greatest))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_modules_agree_with_torchs_and_keep_gradients() -> None:
    x = torch.randn(2, 5, 9, 13)
    pools = ((QuantMaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)), (MeanPool2d(), nn.AdaptiveAvgPool2d(1)))
    for ours, torchs in pools:
        for image in (x, x.contiguous(memory_format=torch.channels_last), x.double()):
            torch.testing.assert_close(ours(image), torchs(image))
        image = x.clone().requires_grad_()
        ours(image).sum().backward()
        assert image.grad is not None
    with pytest.raises(DtypeError, match="float64"):
        torch.ops.cnncomp.mean_pool2d(x.double())


def test_a_network_with_pools_is_recorded_as_a_whole() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()
    x = torch.randn(2, 3, 20, 20)
    plan = cnncomp.convert(net, x, measure=False, cache=False).plan
    for name, kernel in {"0": "dense.direct", "2": "dense.direct", "5": "dense.rows"}.items():
        plan.layers[name].kernel = kernel
    fast = cnncomp.convert(net, x, plan=plan)
    with torch.no_grad():
        results = [fast(x) for _ in range(4)]
    torch.testing.assert_close(results[0], net(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(y, results[0]) for y in results)
    (recording,) = (r for r in fast._recordings._by_key.values() if r)
    assert [i.node.op for i in recording.items if i.node is not None] == ["placeholder"]
