"""Formats of sparse weights: there and back, what is refused, and what it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cnncomp.errors import ArgumentError, DtypeError, PatternError
from cnncomp.sparsity import pack_2to4, unpack_2to4
from cnncomp.sparsity.two_four import STEP_BYTES, VALUE_BYTES, packed_shape

DTYPES = [torch.int8, torch.float16, torch.bfloat16]


def masked_2to4(weight: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """``weight`` (K, C, ...) with at most n of m neighbouring input channels kept, at random."""
    k, c, *rest = weight.shape
    keep = torch.rand(k, -(-c // m), m, *rest).argsort(2) < n
    return weight * keep.flatten(1, 2)[:, :c].to(weight.dtype)


def random_weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(-127, 128, shape).to(dtype)


@st.composite
def shapes(draw, most_k=140):
    """((K, C/G, R, S), G)"""
    size = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    groups = size(1, 3)
    return (groups * size(1, most_k // groups), size(1, 70), size(1, 3), size(1, 3)), groups


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(shapes(), st.sampled_from(DTYPES), st.floats(0, 1))
def test_2to4_there_and_back(sizes, dtype, density):
    shape, groups = sizes
    torch.manual_seed(sum(shape))
    weight = masked_2to4(random_weight(shape, dtype)) * (torch.rand(shape) < density).to(dtype)
    packed = pack_2to4(weight, groups)
    assert packed.shape == packed_shape(shape, dtype, groups) and packed.dtype == torch.int8
    assert torch.equal(unpack_2to4(packed, shape, dtype, groups), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_2to4_metadata_is_ordered_everywhere(dtype):
    """Padding too: the second place of each pair is above the first."""
    packed = pack_2to4(masked_2to4(random_weight((70, 20, 3, 3), dtype)), 1)
    meta = packed[..., VALUE_BYTES:].flatten().view(torch.uint8)
    for nibble in (meta & 15, meta >> 4):
        assert bool((nibble >> 2 > (nibble & 3)).all())


def test_2to4_takes_what_it_says():
    """Half of the values, and two bits for each: 5/8 of the dense bytes for 8 bits, 9/16 for 16."""
    for dtype, share in ((torch.int8, 5 / 8), (torch.float16, 9 / 16)):
        weight = masked_2to4(random_weight((128, 128, 3, 3), dtype))
        assert pack_2to4(weight).numel() == share * weight.numel() * weight.itemsize
        assert weight[0].numel() * weight.itemsize % STEP_BYTES == 0


def test_2to4_names_the_first_offence():
    weight = torch.zeros(8, 10, 3, 3, dtype=torch.int8)
    weight[5, 8:, 1, 2] = 1
    pack_2to4(weight)
    weight[5, 4:7, 2, 1] = 1
    weight[7, 0:4] = 1
    with pytest.raises(PatternError, match=r"3 non-zeros at output channel 5, input channels 4 to 7, tap \(2, 1\)"):
        pack_2to4(weight)


def test_2to4_refuses():
    with pytest.raises(ArgumentError, match="NaN"):
        pack_2to4(torch.full((4, 4, 1, 1), float("nan"), dtype=torch.float16))
    with pytest.raises(DtypeError, match=r"torch\.float64"):
        pack_2to4(torch.zeros(4, 4, 1, 1, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="groups=3"):
        pack_2to4(torch.zeros(4, 4, 1, 1, dtype=torch.int8), 3)


def test_2to4_of_zeros_and_empty_rows():
    weight = torch.zeros(65, 16, 1, 1, dtype=torch.int8)
    assert torch.equal(unpack_2to4(pack_2to4(weight), weight.shape, torch.int8), weight)
    weight[64, 3] = -127
    assert torch.equal(unpack_2to4(pack_2to4(weight), weight.shape, torch.int8), weight)
