"""Tests of the Triton kernel with block sparse weights in Triton's interpreter; run as ``triton_interpreted.py`` is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncomp.kernels.conv2d_steps import conv2d_steps
from cnncomp.kernels.launch import Tile
from cnncomp.nn import (
    BlocksQuantConv2d,
    Clamp,
    Geometry,
    QuantConv2d,
    QuantSpec,
    TritonBlocksQuantConv2d,
    TritonVectorsQuantConv2d,
    VectorsQuantConv2d,
)
from cnncomp.ops import cuda, cuda_sparse, reference
from cnncomp.ops.conv2d_blocks import BLOCKS_TRITON
from cnncomp.ops.conv2d_vectors import VECTORS_TRITON
from cnncomp.sparsity import vectors
from cnncomp.sparsity.steps import pack_steps, view_steps
from tests.test_packers import masked_blocks
from tests.triton_interpreted import DTYPES, OUT_DTYPES, RESIDUALS, assert_same, random_constants, random_tensor

#: Blocks of the layers, 1xV and rectangles; then of other sizes.
BLOCKS = {1: [(32, 4), (64, 16), (16, 16), (32, 32), (64, 64)], 2: [(32, 1), (64, 8), (16, 16), (32, 32), (64, 2)]}


def check_conv(
    n, c, h, w, k, r, s, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1,
    block=(32, 4), density=0.4, dtype=torch.uint8, out_dtype=torch.int8, residual=None, units=False,
) -> None:  # fmt: skip
    """Of floats the products are small integers, so that their sums are exact in any order."""
    what: dict[str, Any] = dict(locals())
    torch.manual_seed(n + c + h + k)
    half = dtype.is_floating_point
    x = torch.randint(-4, 5, (n, c, h, w)).to(dtype) if half else random_tensor((n, c, h, w), dtype)
    weight = torch.randint(*((-4, 5) if half else (-127, 128)), (k, c // groups, r, s))
    weight = masked_blocks(weight.to(dtype if half else torch.int8), *block, groups, density)
    geometry = (stride, padding, dilation, groups)
    acc = torch.nn.functional.conv2d(x.double(), weight.double(), None, *geometry)
    constants, lo = random_constants(k, r * s * c // groups, out_dtype)
    res = None if residual is None else random_tensor(tuple(acc.shape), residual)
    expected = reference.epilogue(acc.float() if half else acc.to(torch.int32), constants, res, 0.37, lo, out_dtype)
    packed = pack_steps(weight, *block, groups)
    steps = view_steps(packed, weight.shape, weight.dtype, *block, groups)
    if density in (0.0, 1.0):
        assert (len(steps.values) == 0) == (density == 0.0), what
    given_x = vectors.to_units(x) if units else x
    tile = Tile(64, 0, 0, 4, 5)  # the interpreter's time goes with programs
    args = (given_x, steps, constants, res, 0.37, lo, (r, s), *geometry, out_dtype)
    got = conv2d_steps(*args, tile=tile)
    assert got.is_contiguous(memory_format=torch.channels_last), what
    assert_same(got, expected, what)


CONVS = {
    "pointwise": dict(n=2, c=64, h=4, w=4, k=64, r=1, s=1),
    "3x3": dict(n=1, c=80, h=5, w=4, k=65, r=3, s=3, padding=(1, 1)),
    "one pixel less": dict(n=1, c=20, h=3, w=5, k=31, r=1, s=1),
    "odd channels": dict(n=3, c=33, h=4, w=4, k=5, r=2, s=3, padding=(1, 2)),
    "one channel": dict(n=1, c=1, h=4, w=4, k=1, r=3, s=3),
    "uneven strides": dict(n=2, c=16, h=9, w=8, k=33, r=3, s=2, stride=(3, 2), padding=(0, 1)),
    "dilation": dict(n=1, c=32, h=8, w=9, k=4, r=3, s=3, padding=(2, 4), dilation=(2, 3)),
    "padding alone": dict(n=9, c=4, h=1, w=1, k=4, r=3, s=3, padding=(1, 1)),
    "seven rows": dict(n=1, c=3, h=11, w=12, k=18, r=7, s=7, stride=(2, 2), padding=(3, 3)),
    "more taps than bits": dict(n=1, c=3, h=9, w=10, k=7, r=8, s=8, padding=(3, 4)),
    "groups": dict(n=1, c=12, h=5, w=5, k=9, r=3, s=3, padding=(1, 1), groups=3),
    "wide groups": dict(n=2, c=70, h=3, w=4, k=134, r=3, s=3, padding=(1, 1), groups=2),
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("name", CONVS)
def test_conv(name, dtype):
    for block in BLOCKS[dtype.itemsize][:2]:
        check_conv(
            **CONVS[name], block=block, dtype=dtype, out_dtype=torch.float32 if dtype.itemsize > 1 else torch.int8
        )


@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_empty_rows_and_full_ones(dtype, density):
    for name in ("3x3", "wide groups"):
        check_conv(
            **CONVS[name], block=BLOCKS[dtype.itemsize][0], density=density, dtype=dtype, out_dtype=torch.float32
        )


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_outputs_and_residuals(out_dtype, residual):
    check_conv(**CONVS["odd channels"], out_dtype=out_dtype, residual=residual)
    check_conv(**CONVS["3x3"], block=(64, 16), dtype=torch.int8, out_dtype=out_dtype, residual=residual)


@pytest.mark.parametrize("residual", [None, torch.float16, torch.float32])
def test_halves(residual):
    """float16: the interpreter multiplies the bits of bfloat16 as if they were integers."""
    for block in BLOCKS[2][:3]:
        check_conv(
            **CONVS["odd channels"], block=block, dtype=torch.float16, out_dtype=torch.float16, residual=residual
        )


def test_units():
    check_conv(n=16, c=5, h=3, w=3, k=33, r=3, s=2, padding=(1, 0), block=(32, 1), dtype=torch.float16,
               out_dtype=torch.float16, units=True)  # fmt: skip


def test_what_is_filled_up_is_not_read():
    """Values that are no numbers, where a place has no weight: a zero beside them would pass them on."""
    x = torch.ones(1, 10, 2, 2, dtype=torch.float16)
    weight = torch.zeros(32, 10, 1, 1, dtype=torch.float16)
    weight[:, 8] = 1
    x[:, :8] = float("nan")
    constants = torch.tensor([[1.0], [0.0], [float("inf")]]).expand(3, 32).contiguous()
    for cols in (1, 2, 8):
        steps = view_steps(pack_steps(weight, 32, cols), weight.shape, weight.dtype, 32, cols, 1)
        where = ((1, 1), (1, 1), (0, 0), (1, 1), 1)
        got = conv2d_steps(x, steps, constants, None, 0.0, -float("inf"), *where, torch.float32)
        assert got.eq(1).all(), cols


@pytest.mark.parametrize("cols", [1, 8])
@pytest.mark.parametrize("taps, size", [(1, 4), (8, 24)])
def test_other_groups_are_not_read(taps, size, cols):
    """A group beside one of NaN, whose channels come next to its own: in front of a place that is filled up, and behind the
    channels of a block that has fewer."""
    weight = torch.zeros(64, 3, taps, taps, dtype=torch.float16)
    weight[:, 1, taps // 2, 0] = 2
    constants = torch.tensor([[1.0], [0.5], [float("inf")]]).expand(3, 64).contiguous()
    steps = view_steps(pack_steps(weight, 32, cols, 2), weight.shape, weight.dtype, 32, cols, 2)
    for group in (0, 1):
        x = torch.full((1, 6, size, size), float("nan"), dtype=torch.float16)
        x[:, 3 * group : 3 * group + 3] = 1
        where = ((taps, taps), (1, 1), (0, 0), (1, 1), 2)
        got = conv2d_steps(x, steps, constants, None, 0.0, -float("inf"), *where, torch.float32)
        assert got[:, 32 * group : 32 * group + 32].eq(2.5).all(), group


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that Triton alone has kernels for; its tensors are the CPU's."""
    monkeypatch.setattr(cuda, "backend", lambda device: "triton")
    monkeypatch.setattr(cuda_sparse, "check_triton", lambda device: None)


FORMATS = {"blocks": BLOCKS_TRITON, "vectors": VECTORS_TRITON}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_operators_as_the_gpu_runs_them(name, dtype, a_gpu):
    """And as the CPU does. Every argument differs from its neighbours, so none can change places unnoticed."""
    half = dtype.is_floating_point
    torch.manual_seed(0)
    fmt, kind = FORMATS[name], dtype if half else torch.int8
    x = torch.randint(0, 5, (8, 24, 7, 9)).to(dtype)
    weight = masked_blocks(torch.randint(-4, 5, (80, 12, 3, 2)).to(kind), *fmt.block(kind), 2, 0.5)
    geometry, (constants, lo) = ((2, 1), (1, 0), (1, 2), 2), random_constants(80, 72, torch.uint8)
    acc = torch.nn.functional.conv2d(x.float(), weight.float(), None, *geometry)
    residual = random_tensor(tuple(acc.shape), dtype)
    out_dtype = dtype if half else torch.uint8
    expected = reference.epilogue(acc, constants, residual, 0.25, lo, out_dtype)
    packed = pack_steps(weight, *fmt.block(kind), 2)
    args = (packed, constants, residual, 0.25, lo, (3, 2), *geometry, out_dtype)
    operator = getattr(torch.ops.cnncomp, f"conv2d_{name}_{'f16' if half else 'int8'}_triton")
    assert_same(cuda_sparse.conv2d_triton(fmt, weight.shape, x, *args), expected, name)
    assert_same(operator(x, *args), expected, name)
    if fmt.units:
        for given_x in (x, vectors.to_units(x)):
            got = cuda_sparse.conv2d_triton(fmt, weight.shape, given_x, *args, out_units=True)
            assert_same(vectors.from_units(got), expected, name)
            assert_same(vectors.from_units(operator(given_x, *args, True)), expected, name)
        in_units = (packed, constants, vectors.to_units(residual), *args[3:])
        assert_same(cuda_sparse.conv2d_triton(fmt, weight.shape, x, *in_units), expected, name)


@pytest.mark.parametrize("name", FORMATS)
def test_linear_as_the_gpu_runs_it(name, a_gpu):
    torch.manual_seed(0)
    fmt, x = FORMATS[name], random_tensor((2, 3, 50), torch.uint8)
    weight = torch.randint(-127, 128, (70, 50, 1, 1), dtype=torch.int8)
    weight = masked_blocks(weight, *fmt.block(torch.int8), 1, 0.5)
    constants, lo = random_constants(70, 50, torch.int8)
    args = (constants, random_tensor((2, 3, 70), torch.int8), 0.5, lo, torch.int8)
    flat = (constants, args[1].flatten(0, 1), *args[2:])
    expected = reference.linear_int8(x.flatten(0, 1), weight.flatten(1), *flat).unflatten(0, (2, 3))
    packed = pack_steps(weight, *fmt.block(torch.int8))
    conv = partial(cuda_sparse.conv2d_triton, fmt, weight.shape)
    assert_same(cuda_sparse.as_images(conv, x, packed, *args), expected, name)
    assert_same(getattr(torch.ops.cnncomp, f"linear_{name}_int8_triton")(x, packed, *args), expected, name)


@pytest.mark.parametrize(
    "cls", [BlocksQuantConv2d, VectorsQuantConv2d, TritonBlocksQuantConv2d, TritonVectorsQuantConv2d]
)
def test_layers_where_triton_alone_has_kernels(cls, a_gpu):
    torch.manual_seed(0)
    geometry, x = Geometry(20, 40, (3, 3), padding=(1, 1)), torch.rand(2, 20, 5, 6)
    weight = masked_blocks(torch.randint(-127, 128, (40, 20, 3, 3), dtype=torch.int8), 32, 4, 1, 0.5)
    args = (torch.rand(40) / 1000 + 1e-4, torch.randn(40), QuantSpec(0.02, torch.uint8), Clamp(0.0))
    layer, dense = cls(geometry, weight, *args), QuantConv2d(geometry, weight, *args)
    packed = layer._pack_cuda(weight)
    fmt = FORMATS["blocks" if "Blocks" in cls.__name__ else "vectors"]
    assert layer.on_triton and layer._packed_as() is fmt
    assert layer._packed_operator() is getattr(torch.ops.cnncomp, f"conv2d_{fmt.name}_int8_triton")
    assert getattr(layer, "gathers", None) is None
    launch = partial(cuda_sparse.conv2d_triton, fmt, weight.shape)
    assert_same(layer.run_on(launch, packed, x, None, True), dense(x), cls.__name__)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_conv_random(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups, r, s = draw(1, 3), draw(1, 3), draw(1, 3)
    dilation = (draw(1, 2), draw(1, 2))
    dtype = data.draw(st.sampled_from([*DTYPES, torch.float16]))
    check_conv(
        draw(1, 9), groups * draw(1, 40), draw(dilation[0] * (r - 1) + 1, 7), draw(dilation[1] * (s - 1) + 1, 7),
        groups * draw(1, 70), r, s, (draw(1, 3), draw(1, 3)), (draw(0, 2), draw(0, 2)), dilation, groups,
        data.draw(st.sampled_from(BLOCKS[dtype.itemsize])), draw(0, 10) / 10, dtype,
        torch.float32 if dtype.itemsize > 1 else data.draw(st.sampled_from(OUT_DTYPES)),
    )  # fmt: skip
