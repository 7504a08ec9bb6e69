"""Formats of sparse weights: there and back, what is refused, and what it takes."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cnncomp.errors import ArgumentError, DtypeError, PatternError
from cnncomp.pruning.patterns import NM
from cnncomp.sparsity import (
    fits,
    pack_2to4,
    pack_bitmap,
    pack_blocks,
    pack_gathered,
    pack_vectors,
    pack_vnm,
    unpack_2to4,
    unpack_bitmap,
    unpack_blocks,
    unpack_gathered,
    unpack_vectors,
    unpack_vnm,
    vnm,
)
from cnncomp.sparsity.blocks import as_blocks
from cnncomp.sparsity.gathered import STEP_BYTES as STEP_BYTES_GATHERED
from cnncomp.sparsity.steps import check_steps, pack_steps, unpack_steps, view_steps
from cnncomp.sparsity.two_four import STEP_BYTES, VALUE_BYTES, packed_shape
from cnncomp.sparsity.vectors import check_packed, columns, table_bytes, to_units

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


def masked_vnm(weight: Tensor, v: int, m: int, groups: int = 1) -> Tensor:
    """``weight`` (K, C/G, R, S) in V:2:M at random."""
    blocks = as_blocks(weight, v, m, groups)
    columns = torch.rand(blocks[:, :1].shape).argsort(3).argsort(3) < 4
    keep = (torch.rand(blocks.shape) + columns).argsort(3).argsort(3) >= m - 2
    rows = (blocks * keep.to(weight.dtype)).reshape(groups, -1, *blocks.shape[2:])[:, : weight.shape[0] // groups]
    return rows.reshape(weight.shape[0], -1, *weight.shape[2:])[:, : weight.shape[1]].contiguous()


def masked_blocks(weight: Tensor, rows: int, cols: int, groups: int, density: float) -> Tensor:
    """``weight`` without some of its blocks."""
    k, c, r, s = weight.shape
    keep = torch.rand(groups, -(-k // groups // rows), -(-c // cols), r, s) < density
    keep = keep.repeat_interleave(rows, 1)[:, : k // groups].repeat_interleave(cols, 2)[:, :, :c]
    return weight * keep.reshape(k, c, r, s).to(weight.dtype)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(shapes(), st.sampled_from([*DTYPES, torch.float32]), st.integers(1, 40), st.integers(1, 20), st.floats(0, 1))
def test_blocks_there_and_back(sizes, dtype, rows, cols, density):
    shape, groups = sizes
    torch.manual_seed(sum(shape))
    weight = masked_blocks(random_weight(shape, dtype), rows, cols, groups, density)
    packed = pack_blocks(weight, rows, cols, groups)
    assert torch.equal(unpack_blocks(packed, shape, groups), weight)
    assert bool((packed.values != 0).flatten(1).any(1).all()) and packed.values.dtype == dtype
    for start, end in pairwise(packed.block_ptr.tolist()):
        assert bool((packed.positions[start:end].diff() > 0).all())


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    shapes(), st.sampled_from(DTYPES), st.sampled_from([(32, 1), (32, 4), (64, 8), (16, 16), (64, 32)]), st.floats(0, 1)
)
def test_steps_there_and_back(sizes, dtype, block, density):
    shape, groups = sizes
    torch.manual_seed(sum(shape))
    weight = masked_blocks(random_weight(shape, dtype), *block, groups, density)
    packed = pack_steps(weight, *block, groups)
    check_steps(packed, shape, dtype, *block, groups)
    assert torch.equal(unpack_steps(packed, shape, dtype, *block, groups), weight)
    steps = view_steps(packed, shape, dtype, *block, groups)
    sums = weight.reshape(groups, shape[0] // groups, -1).sum(2, dtype=torch.int32) if dtype == torch.int8 else None
    got = steps.sums.view(groups, -1)
    assert not got.any() if sums is None else torch.equal(got[:, : sums.shape[1]], 128 * sums)
    with pytest.raises(ArgumentError, match="whole steps"):
        check_steps(packed[:-1], shape, dtype, *block, groups)


def test_steps_refuse_blocks_that_are_too_wide():
    with pytest.raises(ArgumentError, match="cols: got 64, expected a power of two, at most 32"):
        pack_steps(torch.zeros(64, 64, 1, 1, dtype=torch.float16), 64, 64)


def test_blocks_take_what_it_says():
    """A run of 32 outputs in two: positions are (c, r, s), and the weight at one is found in its values."""
    weight = random_weight((64, 6, 3, 3), torch.int8).clamp(1)
    weight[:32, ::2] = 0
    packed = pack_blocks(weight, 32, 1)
    assert packed.block_ptr.tolist() == [0, 27, 81] and packed.positions[0] == 9
    assert torch.equal(packed.values[27 + 40, :, 0], weight[32:, 40 // 9, 40 % 9 // 3, 40 % 3])


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(shapes(), st.sampled_from(DTYPES), st.integers(4, 40), st.floats(0, 1))
def test_vnm_there_and_back(sizes, dtype, m, density):
    shape, groups = sizes
    torch.manual_seed(sum(shape))
    weight = masked_vnm(random_weight(shape, dtype), 64, m, groups) * (torch.rand(shape) < density).to(dtype)
    packed = pack_vnm(weight, m, groups)
    vnm.check_packed(packed, shape, dtype, groups)
    assert torch.equal(unpack_vnm(packed, shape, dtype, groups), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vnm_takes_what_it_says(dtype):
    """The longest run comes first, fours of zeros are left out; a weight is found by its place and the instruction's layout."""
    weight, deep = torch.zeros(128, 160, 3, 2, dtype=dtype), vnm.depth(dtype)
    weight[10, 19, 2, 1] = 5
    weight[64:, ::8, 0], weight[64:, 2::8, 0] = 1, 1  # 20 fours at two taps, two channels of each
    packed = pack_vnm(weight, 8)
    start, pieces = table_bytes(2), -(-40 * 4 // deep)
    assert len(packed) == start + (pieces + 1) * vnm.piece_bytes(dtype)
    assert packed[:start].view(torch.int32).tolist()[:5] == [0, pieces, pieces + 1, 1, 0]
    last = packed[start + pieces * vnm.piece_bytes(dtype) :]
    places = last[vnm.value_bytes(dtype) :].view(torch.int32)
    # One four, of channels 16, 17, 18 and 19, of which the last alone is used.
    assert (places >= 0).sum() == 1 and places.max() == 19 * 256 + 2 * 16 + 1
    # Channel 10 = 8 * 1 + 2 * 1 + 0: row 1 of tile 1, lane 4, the first register; one of the two kept of the four.
    values = last[: vnm.KEPT_BYTES].view(dtype)
    assert values.count_nonzero() == 1 and 5 in values[(512 + 4 * 16) // dtype.itemsize :][:2].tolist()
    meta = last[vnm.KEPT_BYTES : vnm.value_bytes(dtype)].view(torch.uint8)
    for nibble in (meta & 15, meta >> 4):
        assert bool((nibble >> 2 > (nibble & 3)).all())
    with pytest.raises(ArgumentError, match=f"whole pieces of {vnm.piece_bytes(dtype)}"):
        vnm.check_packed(packed[:-1], weight.shape, dtype, 1)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("m", vnm.SIZES)
def test_the_m_of_a_weight_is_found(m, groups):
    torch.manual_seed(m)
    dense = torch.randn(groups * 70, 240, 2, 2) + 10  # no zero of its own
    weight = masked_vnm(dense, 64, m, groups)
    assert vnm.find_m(weight, groups) == m and vnm.find_m(dense, groups) is None
    assert vnm.kept_columns(weight, m, groups) == pytest.approx(4 / m, abs=0.01)  # the last M may lie beyond
    assert vnm.find_m(masked_2to4(dense), groups) is None
    with pytest.raises(PatternError, match="64:2:M, M one of"):
        vnm.check_m(dense, groups)


@pytest.mark.parametrize("dtype, images, size", [(torch.uint8, 19, 16), (torch.int8, 7, 8), (torch.bfloat16, 19, 8)])
def test_units_of_channels(dtype, images, size):
    x = torch.randint(1, 100, (images, 6, 3, 4)).to(dtype)
    units = vnm.to_units(x)
    assert units.shape == (6, -(-images // size), 3, 4, size) and vnm.unit(dtype, images) == size
    for image, channel, row, column in [(0, 0, 0, 0), (images - 1, 5, 2, 3), (6, 5, 1, 2), (images // 2, 3, 0, 1)]:
        assert units[channel, image // size, row, column, image % size] == x[image, channel, row, column]
    assert units.sum(dtype=torch.float64) == x.sum(dtype=torch.float64) and units.is_contiguous()


def test_vnm_names_the_first_offence():
    weight = torch.zeros(100, 16, 3, 3, dtype=torch.float16)
    weight[64:69, 8:13, 1, 2] = torch.eye(5)
    expected = (
        r"5 channels with non-zeros at output channels 64 to 99, input channels 8 to 15, tap \(1, 2\), expected 64:2:8"
    )
    with pytest.raises(PatternError, match=expected):
        pack_vnm(weight, 8)
    weight[68] = 0
    pack_vnm(weight, 8)
    weight[3, :3, 2, 0] = 1
    with pytest.raises(
        PatternError, match="3 non-zeros of an output channel at output channels 0 to 63, input channels 0 to 7"
    ):
        pack_vnm(weight, 8)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(shapes(), st.sampled_from([*DTYPES, torch.float32]), st.floats(0, 1))
def test_bitmap_there_and_back(sizes, dtype, density):
    shape, groups = sizes
    torch.manual_seed(sum(shape))
    weight = random_weight(shape, dtype) * (torch.rand(shape) < density).to(dtype)
    packed = pack_bitmap(weight, groups)
    assert torch.equal(unpack_bitmap(packed, shape), weight)
    assert len(packed.values) == int(packed.offsets[-1]) == int(torch.count_nonzero(weight))


def test_bitmap_is_found_without_the_packer():
    weight = random_weight((3, 50, 1, 2), torch.float16) * (torch.rand(3, 50, 1, 2) < 0.3)
    packed = pack_bitmap(weight)
    rows = weight.permute(0, 2, 3, 1).flatten(1)
    for k, j in [(0, 0), (1, 63), (1, 64), (2, 99)]:
        word = int(packed.bits[k, j // 64]) & (1 << 64) - 1
        assert (word >> j % 64 & 1) == int(rows[k, j] != 0)
        at = int(packed.offsets[2 * k + j // 64]) + (word & (1 << j % 64) - 1).bit_count()
        assert rows[k, j] == 0 or packed.values[at] == rows[k, j]


def test_formats_refuse():
    bad = torch.full((4, 4, 1, 1), float("inf"), dtype=torch.float16)
    for pack in (partial(pack_blocks, rows=2, cols=2), partial(pack_vnm, m=4), pack_bitmap, fits):
        with pytest.raises(ArgumentError, match="infinite"):
            pack(bad)
        with pytest.raises(DtypeError, match=r"torch\.float64"):
            pack(torch.zeros(4, 4, 1, 1, dtype=torch.float64))
        with pytest.raises(ArgumentError, match="groups=3"):
            pack(torch.zeros(4, 4, 1, 1, dtype=torch.int8), groups=3)
    assert len(pack_bitmap(torch.full((2, 4, 1, 1), 3e38)).values) == 8  # their sum is infinite, they are not
    zeros = torch.zeros(4, 4, 1, 1, dtype=torch.int8)
    with pytest.raises(ArgumentError, match="cols: got 0"):
        pack_blocks(zeros, 1, 0)
    with pytest.raises(ArgumentError, match="m: got 3"):
        pack_vnm(zeros, 3)
    with pytest.raises(ArgumentError, match="16 x 1"):
        pack_vnm(torch.zeros(4, 4, 16, 1, dtype=torch.int8), 8)
    for pattern in ("4:2", "2x", "64:3:8"):
        with pytest.raises(PatternError, match="patterns"):
            fits(zeros, patterns=[pattern])


@pytest.mark.parametrize("groups", [1, 2])
def test_patterns_are_detected(groups):
    torch.manual_seed(0)
    dense = torch.randn(128, 64, 3, 3) + 10  # no zero of its own
    for pattern, weight in {
        "2:4": masked_2to4(dense),
        "64:2:8": masked_vnm(dense, 64, 8, groups),
        "32x1": masked_blocks(dense, 32, 1, groups, 0.2),
        "16x16": masked_blocks(dense, 16, 16, groups, 0.3),
    }.items():
        found = {fit.pattern: fit for fit in fits(weight, groups)}
        assert found[pattern].satisfied and found[pattern].error == 0 and not found[pattern].first
        others = {"2:4": {}, "64:2:8": {"2:4"}, "32x1": {"16x1"}, "16x16": {"16x1"}}[pattern]
        for other in {"2:4", "64:2:8", "32x1", "16x16"} - {pattern, *others}:
            fit = found[other]
            assert not fit.satisfied and 0 < fit.error < 1 and "at output channel" in fit.first
    assert found["16x16"].work == pytest.approx(0.3, abs=0.1) and found["2:4"].work == 0.5


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(shapes(40), st.floats(0.1, 1))
def test_projected_errors(sizes, density):
    """n:m by the nearest weight made on its own; V:2:M with V = 1 has every pair that 2:M has; whole blocks lose nothing."""
    shape, groups = sizes
    torch.manual_seed(sum(shape))
    weight = torch.randn(shape) * (torch.rand(shape) < density)
    found = {fit.pattern: fit.error for fit in fits(weight, groups, ["2:4", "2:8", "1:2:8", "5:2:8", "1x1", "3x2"])}
    kept = NM(2, 4).keep(weight.abs().reshape(1, shape[0], shape[1], -1)).reshape(shape)
    total = float(weight.double().square().sum())
    lost = float((weight * ~kept).double().square().sum()) / max(total, 1e-30)
    assert found["2:4"] == pytest.approx(lost, abs=1e-6) and found["1x1"] == 0
    assert found["1:2:8"] == pytest.approx(found["2:8"], abs=1e-6) and found["5:2:8"] >= found["1:2:8"] - 1e-6
    assert 0 <= found["3x2"] < 1


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(shapes(200), st.sampled_from(DTYPES), st.floats(0, 1))
def test_gathered_there_and_back(sizes, dtype, density):
    shape, groups = sizes
    torch.manual_seed(sum(shape))
    weight = masked_blocks(random_weight(shape, dtype), 64, 16 // dtype.itemsize, groups, density)
    assert torch.equal(unpack_gathered(pack_gathered(weight, groups), shape, dtype, groups), weight)


def test_gathered_takes_what_it_says():
    """128 outputs in two slices: one of nine blocks in two steps, one of none."""
    weight = torch.zeros(128, 160, 1, 1, dtype=torch.int8)
    weight[:64, :144] = 1
    packed = pack_gathered(weight)
    assert packed[:12].view(torch.int32).tolist() == [0, 2, 2] and len(packed) == 16 + 2 * STEP_BYTES_GATHERED
    last = packed[-32:].view(torch.int32).tolist()
    assert last == [8 * 256] + [-1] * 7
    with pytest.raises(ArgumentError, match="16 x 1"):
        pack_gathered(torch.zeros(4, 4, 16, 1, dtype=torch.int8))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(shapes(), st.sampled_from(DTYPES), st.floats(0, 1))
def test_vectors_there_and_back(sizes, dtype, density):
    shape, groups = sizes
    torch.manual_seed(sum(shape))
    weight = masked_blocks(random_weight(shape, dtype), 32, columns(dtype), groups, density)
    packed = pack_vectors(weight, groups)
    check_packed(packed, shape, dtype, groups)
    assert torch.equal(unpack_vectors(packed, shape, dtype, groups), weight)


def test_vectors_take_what_it_says():
    """The longest run comes first; a weight is found by its place and the instruction's layout."""
    weight = torch.zeros(64, 40, 3, 2, dtype=torch.int8)
    weight[10, 4, 2, 1], weight[32:, ::4, 0] = 5, 1
    packed = pack_vectors(weight)
    start = table_bytes(2)
    assert len(packed) == start + 4 * (1024 + 32)  # 20 positions in three pieces of eight, and one
    assert packed[:start].view(torch.int32).tolist()[:5] == [0, 3, 4, 1, 0]
    last = packed[start + 3 * 1056 :]
    assert last[1024:].view(torch.int32).tolist() == [1 * 256 + 2 * 16 + 1] + [-1] * 7
    # Channel 10 = 4 * 2 + 2 * 1 + 0: row 2 of tile 1, lane 8, the first register.
    assert last[512 + 8 * 16] == 5 and int(last[:1024].count_nonzero()) == 1
    with pytest.raises(ArgumentError, match="at most 15 rows"):
        pack_vectors(torch.zeros(4, 4, 16, 1, dtype=torch.int8))
    with pytest.raises(ArgumentError, match="whole pieces of 1056"):
        check_packed(packed[:-1], weight.shape, torch.int8, 1)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_units_of_images(dtype, groups):
    x = torch.randint(1, 100, (11, 2 * 6, 3, 4)).to(dtype)
    units = to_units(x, groups)
    for image, channel, row, column in [(0, 0, 0, 0), (10, 11, 2, 3), (7, 5, 1, 2), (8, 6, 0, 1)]:
        at = (row, column, image % 8)
        if dtype == torch.float16:
            found = units[channel, image // 8][at]
        else:
            group, within = channel // (12 // groups), channel % (12 // groups)
            found = units[group * -(-12 // groups // 4) + within // 4, image // 8][at][within % 4]
        assert found == x[image, channel, row, column]
    assert units.sum(dtype=torch.float64) == x.sum(dtype=torch.float64) and units.is_contiguous()
