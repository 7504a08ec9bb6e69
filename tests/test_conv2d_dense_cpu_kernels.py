"""The fp32 dense CPU kernel against a float64 convolution, for every instruction set of this machine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cnncomp import _cpu
from cnncomp.errors import ArgumentError, DtypeError
from cnncomp.nn import Clamp, DenseConv2d, Geometry
from cnncomp.nn.dense import DIRECT_KERNEL
from cnncomp.ops.packing import DENSE_ROWS, dense_block, pack_dense, unpack_dense
from tests.fp32_kernels import LANES, Guarded, address, assert_within, one_thread_for_references
from tests.instruction_sets import float_isa as isa
from tests.test_conv2d_sparse_cpu_kernels import GRID, Conv

__all__ = ["isa", "one_thread_for_references"]  # fixtures

MAX_TILE = 6  # kDenseMaxTile


def run(conv: Conv, num_threads: int = 1, guarded: Guarded | None = None) -> Tensor:
    """The kernel's result, compared with a float64 convolution."""
    x, w, b, z = conv.tensors()
    packed = pack_dense(w, conv.groups, block := min(conv.block, conv.c // conv.groups))
    place = guarded if guarded is not None else lambda a: a
    arrays = [None if t is None else place(t.numpy()) for t in (x, packed, b, z)]
    out = place(np.full(conv.out_shape(), np.nan, np.float32))
    _cpu.conv2d_dense(
        address(arrays[0]), conv.n, conv.c, conv.h, conv.w, address(arrays[1]), block, conv.k, *conv.kernel, *conv.stride,
        *conv.padding, *conv.dilation, conv.groups, address(arrays[2]), address(arrays[3]), conv.lo, conv.hi, address(out),
        num_threads,
    )  # fmt: skip
    got = torch.from_numpy(out.copy())
    assert_within(got, *conv.reference(x, w, b, z), conv)
    return got


@pytest.mark.parametrize("name", GRID)
@pytest.mark.parametrize("residual", [False, True])
def test_shapes(isa: str, name: str, residual: bool) -> None:
    run(Conv(**{**vars(GRID[name]), "residual": residual, "sparsity": 0.1, "lo": -0.5}))


@pytest.mark.parametrize("vectors", range(1, 2 * MAX_TILE + 2))
def test_every_tile_size(isa: str, vectors: int) -> None:
    for lanes in LANES:
        for d in (-1, 0, 1):
            run(Conv(c=5, k=11, h=1, w=vectors * lanes + d, kernel=(1, 1), padding=(0, 0), residual=True))
            run(Conv(c=5, k=3, h=1, w=vectors * lanes + d, kernel=(1, 3), padding=(0, 1)))


@pytest.mark.parametrize("k", range(1, 2 * DENSE_ROWS + 2))
@pytest.mark.parametrize("width", [7, 16, 90])
def test_every_number_of_output_channels(isa: str, k: int, width: int) -> None:
    run(Conv(k=k, h=3, w=width, block=4))


def test_the_same_bits_on_any_number_of_threads(isa: str) -> None:
    for conv in (Conv(c=16, k=70, h=30, w=30, n=2), Conv(c=16, k=70, h=7, w=7), Conv(c=12, k=12, groups=3, n=5)):
        one = run(conv)
        for threads in (2, 3, 8):
            assert torch.equal(run(conv, threads), one)


@pytest.mark.parametrize("at_end", [False, True])
def test_touches_nothing_but_its_operands(isa: str, at_end: bool) -> None:
    guarded = Guarded(at_end)
    for conv in (
        Conv(h=11, w=37, residual=True),
        Conv(kernel=(1, 1), padding=(0, 0), h=5, w=37, k=13, residual=True),
        Conv(kernel=(1, 1), padding=(0, 0), h=8, w=16, k=8),
        Conv(c=3, kernel=(7, 7), stride=(2, 2), padding=(3, 3), h=30, w=33, block=2),
        Conv(stride=(2, 3), h=30, w=41),
        Conv(c=6, k=4, groups=2, dilation=(2, 2), h=20, w=40),
    ):
        run(conv, guarded=guarded)


@pytest.mark.parametrize("kernel", [4, 5, 7])
@pytest.mark.parametrize("width", [95, 96, 97, 192])
def test_stems(isa: str, kernel: int, width: int) -> None:
    """Kernels that are shifted along a row, on rows that are full vectors or not; several tiles share a copy of the input."""
    pad = (kernel - 1) // 2
    for conv in (
        Conv(c=3, k=10, kernel=(kernel,) * 2, stride=(2, 2), padding=(pad, pad), h=70, w=width, n=2, block=3),
        Conv(c=12, k=6, groups=2, kernel=(kernel,) * 2, padding=(pad, pad), h=33, w=width, block=4),
    ):
        one = run(conv)
        assert torch.equal(run(conv, 3), one)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_random_convolutions(data: st.DataObject) -> None:
    def whole(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups = whole(1, 3)
    conv = Conv(
        n=whole(1, 3), c=groups * whole(1, 7), k=groups * whole(1, 12), groups=groups, h=whole(1, 40), w=whole(1, 60),
        kernel=(whole(1, 5), whole(1, 5)), stride=(whole(1, 3), whole(1, 3)), padding=(whole(0, 3), whole(0, 3)),
        dilation=(whole(1, 3), whole(1, 3)), block=whole(1, 7), bias=data.draw(st.booleans()),
        residual=data.draw(st.booleans()), lo=data.draw(st.sampled_from((-math.inf, 0.0))),
        hi=data.draw(st.sampled_from((math.inf, 1.0))),
    )  # fmt: skip
    if min(conv.out_shape()) > 0:
        run(conv)


@pytest.mark.parametrize("shape", [(9, 5, 3, 3), (16, 192, 1, 1), (6, 1, 7, 7), (8, 160, 3, 1)])
@pytest.mark.parametrize("groups", [1, 3])
def test_packing_can_be_undone(shape: tuple[int, int, int, int], groups: int) -> None:
    k, c, r, s = shape
    w = torch.randn(k * groups, c, r, s)
    packed = pack_dense(w, groups, dense_block((r, s), c))
    assert packed.numel() <= 1.1 * -(-k // DENSE_ROWS) * DENSE_ROWS * groups * w[0].numel()
    assert torch.equal(unpack_dense(packed, groups * c, groups * k), w)


def test_layer_holds_its_weight_once_and_gives_it_back() -> None:
    g = Geometry(16, 24, (3, 3), padding=(1, 1))
    weight, bias = torch.randn(24, 16, 3, 3), torch.randn(24)
    layer = DenseConv2d(g, weight, bias, Clamp(0.0, 6.0), DIRECT_KERNEL)
    assert torch.equal(layer.weight, weight) and torch.equal(layer.tensors()["weight"], weight)
    assert layer.weight_bytes() == weight.nbytes + bias.nbytes
    with pytest.raises(DtypeError, match="float64"):
        layer(torch.randn(1, 16, 5, 5).double())
    with pytest.raises(ArgumentError, match="packed for"):
        torch.ops.cnncomp.conv2d_dense(
            torch.randn(1, 99, 5, 5), layer.packed, None, None, 0.0, 1.0, 24, (1, 1), (1, 1), (1, 1)
        )


@pytest.mark.parametrize("kernel", ["dense.nchw", "dense.channels_last", "dense.fused", DIRECT_KERNEL])
def test_a_state_dict_has_the_weight_before_and_after_calls(kernel: str) -> None:
    geometry, x = Geometry(3, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1), torch.randn(1, 3, 9, 7)
    first, second = (
        DenseConv2d(geometry, torch.randn(8, 3, 3, 3), torch.randn(8), Clamp(0.0), kernel) for _ in range(2)
    )
    with torch.inference_mode():
        expected, before = first(x), second(x)
    assert not torch.equal(expected, before)
    second.load_state_dict(first.state_dict())
    with torch.inference_mode():
        assert torch.equal(second(x), expected) and torch.equal(first(x), expected)
