"""The fp32 depthwise CPU kernel against a float64 convolution, for every instruction set of this machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cnncomp
from cnncomp import _cpu
from cnncomp.errors import ArgumentError, DtypeError
from cnncomp.nn import Clamp, DenseConv2d, Geometry
from cnncomp.nn.dense import DEPTHWISE_KERNEL
from tests.fp32_kernels import LANES, Guarded, address, assert_within, one_thread_for_references
from tests.instruction_sets import FLOAT_ISAS, instruction_set
from tests.instruction_sets import float_isa as isa

__all__ = ["isa", "one_thread_for_references"]  # fixtures

INF = math.inf
Pair = tuple[int, int]


@dataclass
class Conv:
    n: int = 2
    c: int = 3
    h: int = 9
    w: int = 21
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    bias: bool = True
    residual: bool = True
    lo: float = -INF
    hi: float = INF

    def out_shape(self) -> tuple[int, int, int, int]:
        def size(i: int, x: int) -> int:
            return (x + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1

        return self.n, self.c, size(0, self.h), size(1, self.w)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        torch.manual_seed(0)
        return (
            torch.randn(self.n, self.c, self.h, self.w),
            torch.randn(self.c, 1, *self.kernel),
            torch.randn(self.c) if self.bias else None,
            torch.randn(self.out_shape()) if self.residual else None,
        )


def run(conv: Conv, num_threads: int = 1, guarded: Guarded | None = None) -> Tensor:
    """The kernel's result, compared with a float64 convolution."""
    x, w, b, z = conv.tensors()
    place = guarded if guarded is not None else lambda a: a
    arrays = [None if t is None else place(t.numpy()) for t in (x, w, b, z)]
    out = place(np.full(conv.out_shape(), np.nan, np.float32))
    _cpu.conv2d_depthwise(
        address(arrays[0]), conv.n, conv.c, conv.h, conv.w, address(arrays[1]), *conv.kernel, *conv.stride,
        *conv.padding, *conv.dilation, address(arrays[2]), address(arrays[3]), conv.lo, conv.hi, address(out), num_threads,
    )  # fmt: skip
    args = (conv.stride, conv.padding, conv.dilation, conv.c)
    y = F.conv2d(x.double(), w.double(), None if b is None else b.double(), *args)
    size = F.conv2d(x.double().abs(), w.double().abs(), None if b is None else b.double().abs(), *args)
    if z is not None:
        y, size = y + z, size + z.abs()
    got = torch.from_numpy(out.copy())
    assert_within(got, y.clamp(conv.lo, conv.hi), size, conv)
    return got


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5])
def test_at_the_edges_of_vectors(isa: str, size: int, stride: int) -> None:
    """Outputs of one less, as many and one more than a vector holds; every number of rows up to two blocks of them."""
    widths = {w for lanes in LANES for v in (1, 2, 3) for w in range(stride * v * lanes - 2, stride * v * lanes + 3)}
    for i, w in enumerate(sorted(widths)):
        for padding in (0, size // 2):
            if w + 2 * padding >= size:
                h = size + stride * (i % 9)
                run(Conv(1, 2, h, w, (size, size), (stride, stride), (padding, padding)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("h, w", [(1, 1), (1, 40), (40, 1), (2, 3), (7, 7), (14, 14), (28, 28), (57, 56), (5, 131)])
def test_image_sizes(isa: str, h: int, w: int, stride: int) -> None:
    run(Conv(h=h, w=w, stride=(stride, stride), lo=0.0, hi=6.0))
    run(Conv(h=h, w=w, stride=(stride, stride), kernel=(5, 5), padding=(2, 2), residual=False))


GRID = {
    "kernel 1x7": Conv(kernel=(1, 7), padding=(0, 3)),
    "kernel 7x1": Conv(kernel=(7, 1), padding=(3, 0)),
    "kernel 7x7": Conv(h=17, w=40, kernel=(7, 7), padding=(3, 3)),
    "one tap": Conv(kernel=(1, 1), padding=(0, 0)),
    "even kernel": Conv(kernel=(2, 4), w=50),
    "strides differ": Conv(h=20, w=80, stride=(1, 2)),
    "stride 3": Conv(h=20, w=90, stride=(3, 3)),
    "stride beyond the kernel": Conv(h=20, w=90, kernel=(2, 2), stride=(4, 5)),
    "dilation": Conv(h=20, w=40, dilation=(2, 3), padding=(2, 3)),
    "dilation and stride": Conv(h=20, w=80, dilation=(3, 2), stride=(2, 2), padding=(3, 4)),
    "padding beyond the kernel": Conv(padding=(5, 7)),
    "padding beyond the image": Conv(h=1, w=2, padding=(4, 40)),
    "more channels than are taken together": Conv(n=2, c=45, h=14, w=14),
    "more channels than are taken together, nothing added": Conv(n=2, c=45, h=14, w=14, residual=False),
    "no images": Conv(n=0),
    "nothing added": Conv(bias=False, residual=False),
}


@pytest.mark.parametrize("name", GRID)
def test_shapes(isa: str, name: str) -> None:
    run(GRID[name])


@st.composite
def convs(draw: st.DrawFn) -> Conv:
    def pair(low: int, high: int) -> Pair:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel = draw(st.sampled_from([(3, 3), (5, 5), pair(1, 6)]))
    stride = draw(st.sampled_from([(1, 1), (2, 2), pair(1, 4)]))
    dilation, padding = draw(st.sampled_from([(1, 1), pair(1, 3)])), pair(0, 5)
    smallest = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    return Conv(
        n=draw(st.integers(1, 2)),
        c=draw(st.integers(1, 4)),
        h=smallest[0] + draw(st.integers(0, 20)),
        w=smallest[1] + draw(st.integers(0, 70)),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        lo=draw(st.sampled_from([-INF, 0.0])),
        hi=draw(st.sampled_from([INF, 6.0])),
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(conv=convs(), num_threads=st.integers(1, 4))
def test_random_shapes_and_threads(conv: Conv, num_threads: int) -> None:
    for name in FLOAT_ISAS:
        with instruction_set(name):
            assert torch.equal(run(conv), run(conv, num_threads))


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("w", [7, 16, 33, 64])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("residual", [True, False])
def test_stays_inside_its_memory(isa: str, residual: bool, stride: int, w: int, at_end: bool) -> None:
    for kernel, padding in (((3, 3), (1, 1)), ((3, 3), (0, 0)), ((5, 5), (2, 2)), ((2, 4), (1, 0))):
        run(Conv(1, 2, 7, w, kernel, (stride, stride), padding, residual=residual), guarded=Guarded(at_end))


def test_nan_passes_the_clamp_and_infinity_meets_no_other_pixel(isa: str) -> None:
    weight = torch.zeros(1, 1, 3, 3)
    weight[..., 1, 1] = 1.0
    x = torch.ones(1, 1, 5, 40)
    x[..., 2, 7] = math.nan
    out = torch.ops.cnncomp.conv2d_depthwise(x, weight, None, None, 0.0, 6.0, (1, 1), (1, 1), (1, 1))
    assert out[..., 2, 7].isnan() and torch.equal(out.isnan(), F.conv2d(x, weight, padding=1).isnan())


def test_bad_arguments() -> None:
    x, weight, one = torch.randn(1, 4, 8, 8), torch.randn(4, 1, 3, 3), (1, 1)
    op = torch.ops.cnncomp.conv2d_depthwise
    with pytest.raises(ArgumentError, match="4 channels"):
        op(x[:, :3], weight, None, None, 0.0, 1.0, one, one, one)
    with pytest.raises(ArgumentError, match="weight"):
        op(x, torch.randn(4, 2, 3, 3), None, None, 0.0, 1.0, one, one, one)
    with pytest.raises(ArgumentError, match="residual"):
        op(x, weight, None, x[..., :7], 0.0, 1.0, one, one, one)
    with pytest.raises(DtypeError, match="weight"):
        op(x, weight.double(), None, None, 0.0, 1.0, one, one, one)
    with pytest.raises(ValueError, match="stride"):
        _cpu.conv2d_depthwise(0, 1, 4, 8, 8, 0, 3, 3, 0, 1, 1, 1, 1, 1, 0, 0, 0.0, 1.0, 0, 1)
    with pytest.raises(ValueError, match="larger than the padded image"):
        _cpu.conv2d_depthwise(0, 1, 4, 8, 8, 0, 3, 9, 1, 1, 0, 0, 1, 1, 0, 0, 0.0, 1.0, 0, 1)
    geometry = Geometry(4, 8, (3, 3), groups=4)
    with pytest.raises(ArgumentError, match="kernel"):
        DenseConv2d(geometry, torch.randn(8, 1, 3, 3), kernel=DEPTHWISE_KERNEL)


def test_a_sparse_mobilenet_is_one_recording_of_our_kernels() -> None:
    """Sparse 1x1 and depthwise layers in one layout: from the first of them on, nothing but kernels."""
    from cnncomp.models import mobilenet_v2
    from tests.helpers import mask_weights

    torch.manual_seed(0)
    net, x = mask_weights(mobilenet_v2(num_classes=10), 0.0).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1):
                m.weight.mul_(torch.rand_like(m.weight) > 0.8)
    fast = cnncomp.convert(net, x, measure=False, cache=False)
    kernels = [p.kernel for p in fast.plan.layers.values()]
    assert kernels.count(DEPTHWISE_KERNEL) == 17 and kernels.count("conv2d_sparse") == 34
    with torch.no_grad():
        expected = [net(x) for _ in range(3)]
        got = [fast(x) for _ in range(3)]
    for y, z in zip(got, expected, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
    assert torch.equal(got[0], got[2])
    recording = next(r for r in fast._recordings._by_key.values() if r)
    steps = [item.last - item.first for item in recording.items if item.node is None]
    assert steps == [53]  # with the first layer and the pool


def test_depthwise_layer_fuses_residual_and_clamp_and_bounds_per_channel(isa: str) -> None:
    geometry, x, z = Geometry(4, 4, (3, 3), padding=(1, 1), groups=4), torch.randn(2, 4, 9, 9), torch.randn(2, 4, 9, 9)
    weight, bias = torch.randn(4, 1, 3, 3), torch.randn(4)
    for hi in (6.0, (0.5, 1.0, 2.0, 0.1)):
        layers = [DenseConv2d(geometry, weight, bias, Clamp(0.0, hi), k) for k in (DEPTHWISE_KERNEL, "dense.nchw")]
        torch.testing.assert_close(layers[0](x, z), layers[1](x, z), rtol=1e-5, atol=1e-5)
