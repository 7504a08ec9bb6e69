"""Tests of the Triton kernel with block sparse weights in Triton's interpreter; run as ``triton_interpreted.py`` is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncomp.kernels.conv2d_steps import conv2d_steps
from cnncomp.kernels.launch import Tile
from cnncomp.ops import reference
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
