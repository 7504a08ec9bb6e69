"""The sparse int8 CPU kernel, called directly, under every instruction set that this machine has: bit for bit the reference."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cnncomp.ops  # noqa: F401  (gives the kernels torch's threads)
from cnncomp import _cpu
from tests.instruction_sets import ISAS, instruction_set, isa
from tests.int8_convs import (
    CODE,
    F32,
    GEOMETRIES,
    S8,
    U8,
    Conv,
    Guarded,
    Operands,
    ending,
    nhwc,
    random_operands,
    reference,
)

__all__ = ["isa"]  # a fixture

LANES = (4, 8, 16)
MAX_TILE = 14  # vectors


@dataclass
class Packed:
    values: Tensor
    index: Tensor
    row_ptr: Tensor


def pack(weight: Tensor, groups: int, block: int) -> Packed:
    """Loops that spell out the packed layout; weight (K, C/G, R, S), block in quads."""
    k, cg, r, s = weight.shape
    padded = np.zeros((k, -(-cg // (4 * block)) * block * 4, r * s), np.int8)
    padded[:, :cg] = weight.reshape(k, cg, r * s)
    quads = padded.reshape(groups, k // groups, -1, 4, r * s).swapaxes(3, 4)
    values, index, row_ptr = [np.zeros((0, 4), np.int8)], [np.zeros(0, np.int64)], [0]
    for group in quads:
        for first in range(0, group.shape[1], block):
            for row in group[:, first : first + block].reshape(k // groups, -1, 4):
                at = np.flatnonzero(row.any(1))
                values.append(row[at])
                index.append(at)
                row_ptr.append(row_ptr[-1] + len(at))
    kept, positions = np.concatenate(values), np.concatenate(index).astype(np.uint16).view(np.int16)
    return Packed(torch.from_numpy(kept), torch.from_numpy(positions), torch.tensor(row_ptr, dtype=torch.int32))


def pack_scattered(weight: Tensor, groups: int, block: int) -> Packed:
    """The same for non-zeros at random; block in channels."""
    k, cg, r, s = weight.shape
    values: list[int] = []
    index: list[int] = []
    row_ptr = [0]
    for group in weight.reshape(groups, k // groups, cg, r * s).numpy():
        for first in range(0, cg, block):
            for row in group[:, first : first + block].reshape(k // groups, -1):
                at = np.flatnonzero(row)
                fill = [0] * (-len(at) % 4)
                values += [*row[at].tolist(), *fill]
                index += [*at.tolist(), *fill]
                row_ptr.append(len(values) // 4)
    positions = torch.from_numpy(np.array(index, np.uint16).view(np.int16))
    return Packed(torch.tensor(values, dtype=S8), positions, torch.tensor(row_ptr, dtype=torch.int32))


def sparse_operands(conv: Conv, zeros: float = 0.7) -> Operands:
    """Random operands whose weights are mostly zero, in runs and one by one."""
    o = random_operands(conv)
    k, cg, r, s = o.weight.shape
    runs = (torch.rand(k, -(-cg // 4), r, s) >= zeros).repeat_interleave(4, 1)[:, :cg]
    o.weight *= runs & (torch.rand(o.weight.shape) >= 0.2)
    return o


def run(conv: Conv, o: Operands, block: int = 3, scattered: bool = False) -> Tensor:
    guarded = Guarded()
    packed = (pack_scattered if scattered else pack)(o.weight, conv.groups, block)
    x, constants = guarded(nhwc(o.x)), guarded(o.constants)
    values, index, row_ptr = guarded(packed.values), guarded(packed.index), guarded(packed.row_ptr)
    residual = None if o.residual is None else guarded(nhwc(o.residual))
    n, k, p, q = conv.out_shape
    out = guarded(torch.full((n, p, q, k), 77, dtype=conv.out))
    _cpu.conv2d_sparse_int8(
        x.data_ptr(), conv.x == S8, conv.n, conv.h, conv.w, conv.c,
        values.data_ptr(), index.data_ptr(), row_ptr.data_ptr(), block,
        k, *conv.kernel, *conv.stride, *conv.pad, *conv.dil, conv.groups, constants.data_ptr(),
        0 if residual is None else residual.data_ptr(), CODE[conv.residual or U8], o.residual_scale, o.lo,
        out.data_ptr(), CODE[conv.out], conv.threads, scattered, *ending(conv),
    )  # fmt: skip
    return out.clone().permute(0, 3, 1, 2)


def check(conv: Conv, operands: Operands | None = None, block: int = 3) -> None:
    given = operands or sparse_operands(conv)
    small = replace(given, weight=(given.weight.int() / 2).round().to(S8))  # products of bytes that never saturate
    for o, scattered in ((given, False), (given, True), (small, True)):
        expected = reference(conv, o)
        got = run(conv, o, block, scattered)
        if torch.equal(got, expected):
            continue
        wrong = (got != expected).nonzero()
        at, where = tuple(wrong[0].tolist()), f"{_cpu.isa()} {conv} {block} {scattered=}"
        pytest.fail(f"{where}: {len(wrong)} of {got.numel()} wrong, {at}: got {got[at]}, not {expected[at]}")


def tile_edges() -> list[int]:
    edges = {1, 2, 3}
    for lanes in LANES:
        edges |= {lanes - 1, lanes, lanes + 1, 3 * lanes + 1}
        edges |= {MAX_TILE * lanes + d for d in (-1, 0, 1)}
    return sorted(edges)


@pytest.mark.parametrize("pixels", tile_edges())
def test_pointwise_at_tile_edges(isa: str, pixels: int) -> None:
    for n, h, w in ((1, 1, pixels), (pixels, 1, 1), (3, 1, pixels)):
        check(Conv(7, 18, n, h, w, x=S8 if n > 1 else U8))


@pytest.mark.parametrize("vectors", range(1, MAX_TILE + 2))
def test_every_tile_size(isa: str, vectors: int) -> None:
    for lanes in LANES:
        check(Conv(5, 3, 1, 1, vectors * lanes, (1, 3), pad=(0, 1)))
        check(Conv(5, 3, 1, 3, vectors * lanes, (3, 3), pad=(1, 1)))


@pytest.mark.parametrize("c", [1, 3, 4, 5, 15, 16, 17, 33, 65])
def test_channels(isa: str, c: int) -> None:
    for k, size in ((1, 7), (15, 14), (16, 9), (17, 8), (70, 5)):
        for block in (1, 2, 5, 100):
            check(Conv(c, k, 2, size, size + 1, (3, 3), pad=(1, 1), x=S8 if k % 2 else U8), block=block)


@pytest.mark.parametrize(
    "conv",
    [
        *GEOMETRIES,
        Conv(66, 36, 1, 6, 16, (3, 3), (1, 1), (1, 1), groups=2),
        Conv(7, 7, 2, 9, 9, (3, 3), (1, 1), (1, 1), groups=7, x=S8),
        Conv(20, 33, 2, 32, 30, (3, 3), (1, 1), (1, 1), x=S8),  # rows padded to whole vectors, several tiles
        Conv(20, 33, 2, 33, 61, (3, 3), (2, 2), (1, 1)),
        Conv(9, 20, 5, 7, 7, (3, 3), (1, 1), (1, 1)),  # several images in a tile
    ],
)
def test_geometry(isa: str, conv: Conv) -> None:
    check(conv)
    check(replace(conv, threads=2, residual=S8, out=S8))
    check(replace(conv, threads=3, residual=F32, out=F32))


@pytest.mark.parametrize("out", [U8, S8, F32])
@pytest.mark.parametrize("residual", [None, U8, S8, F32])
def test_epilogue(isa: str, residual: torch.dtype | None, out: torch.dtype) -> None:
    for k in (3, 16, 37, 64, 130):
        check(Conv(8, k, 1, 5, 5, (3, 3), residual=residual, out=out))
        check(Conv(9, k, 13, residual=residual, out=out, x=S8))
        check(Conv(8, k, 1, 16, 32, (3, 3), pad=(1, 1), residual=residual, out=out))
        for activation in ("silu", "hardswish"):
            check(Conv(8, k, 1, 9, 9, (3, 3), pad=(1, 1), residual=residual, out=out, activation=activation))


@pytest.mark.parametrize("weight", [-128, -127, 127])
@pytest.mark.parametrize(("dtype", "value"), [(U8, 255), (U8, 0), (S8, -128), (S8, 127)])
def test_extremes(isa: str, dtype: torch.dtype, value: int, weight: int) -> None:
    """Nothing saturates on the way to 32 bits: the accumulator itself comes out, its low half and its high half."""
    conv = Conv(32, 32, 1, 9, 9, (3, 3), pad=(1, 1), x=dtype, out=F32)
    o = random_operands(conv)
    o.x.fill_(value)
    o.weight.fill_(weight)
    o.weight[:, 4:8], o.weight[1] = 0, 0
    o.constants[0], o.constants[1], o.constants[2], o.lo = 1.0, 0.0, math.inf, -math.inf
    check(conv, o)


@pytest.mark.parametrize("out", [U8, S8])
@pytest.mark.parametrize("row", ["scale", "bias", "residual"])
def test_what_is_beyond_int32_before_the_clamp(isa: str, row: str, out: torch.dtype) -> None:
    conv = Conv(8, 32, 1, 5, 5, (3, 3), pad=(1, 1), out=out, residual=U8 if row == "residual" else None)
    o = sparse_operands(conv)
    if row == "residual":
        o.residual_scale = 1e9
    else:
        o.constants[["scale", "bias"].index(row), ::3] = 3e9
    check(conv, o)


@pytest.mark.parametrize("out", [U8, S8])
def test_bounds_of_the_clamp(isa: str, out: torch.dtype) -> None:
    """Half-way points, a lower bound above an upper one, no bound at all."""
    conv = Conv(8, 32, 1, 5, 5, (3, 3), pad=(1, 1), out=out)
    o = sparse_operands(conv)
    o.lo = 2.5
    o.constants[2, :8] = torch.tensor([3.5, 4.5, 2.5, 1.5, 100.0, 100.49, 100.51, 2.0])
    check(conv, o)
    o.lo, o.constants[2] = (0.0, 255.0) if out == U8 else (-128.0, 127.0)
    check(conv, o)


@pytest.mark.parametrize("largest", [300.0, 1e5])
@pytest.mark.parametrize("out", [U8, S8])
def test_large_scales(isa: str, out: torch.dtype, largest: float) -> None:
    """A channel without weights has any scale; with weights, a large one takes numbers beyond int32."""
    conv = Conv(40, 32, 1, 9, 8, (3, 3), pad=(1, 1), x=S8, residual=out, out=out)
    o = sparse_operands(conv)
    o.weight[3], o.constants[0, 3] = 0, largest
    check(conv, o)
    o.constants[0, 8:12] = torch.tensor([largest, -largest, largest, 1.0])
    o.weight[10, 1:] = 0
    check(conv, o)


@pytest.mark.parametrize("dtype", [U8, S8])
def test_longest_reduction(isa: str, dtype: torch.dtype) -> None:
    conv = Conv(66_311, 1, n=2, x=dtype, out=F32)
    o = random_operands(conv)
    o.x.fill_(255 if dtype == U8 else -128)
    o.weight.fill_(127)
    o.constants[:, 0], o.lo = torch.tensor([1.0, 0.0, math.inf]), -math.inf
    check(conv, o, block=1000)


def test_no_weight_at_all(isa: str) -> None:
    for conv in (Conv(8, 20, 2, 5, 5, (3, 3), pad=(1, 1), x=S8), Conv(8, 20, 0)):
        o = random_operands(conv)
        o.weight.zero_()
        check(conv, o)


GEOMETRY = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2))  # r, stride, pad, dil


@st.composite
def convs(draw: st.DrawFn) -> Conv:
    (r, sh, ph, dh), (s, sw, pw, dw) = draw(GEOMETRY), draw(GEOMETRY)
    h = draw(st.integers(max(1, dh * (r - 1) + 1 - 2 * ph), 20))
    w = draw(st.integers(max(1, dw * (s - 1) + 1 - 2 * pw), 40))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    c, k = (groups * draw(st.integers(1, 40)) for _ in "ck")
    dtypes = st.sampled_from([U8, S8, F32])
    return Conv(
        c, k, draw(st.integers(1, 3)), h, w, (r, s), (sh, sw), (ph, pw), (dh, dw), groups,
        draw(st.sampled_from([U8, S8])), draw(st.none() | dtypes), draw(dtypes), draw(st.integers(1, 4)),
        activation=draw(st.sampled_from(["", "silu", "hardswish"])),
    )  # fmt: skip


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=25)
@given(conv=convs(), zeros=st.sampled_from([0.0, 0.5, 0.9]), block=st.sampled_from([1, 4, 50]))
def test_random_conv(name: str, conv: Conv, zeros: float, block: int) -> None:
    with instruction_set(name):
        torch.manual_seed(1)
        check(conv, sparse_operands(conv, zeros), block)


@pytest.mark.parametrize(
    "conv",
    [
        Conv(16, 40, 1, 30, 30, (3, 3), pad=(1, 1)),
        Conv(64, 200, 3, x=S8),
        Conv(24, 100, 1, 7, 7, (3, 3), pad=(1, 1), groups=2, x=S8),
    ],
)
def test_threads(isa: str, conv: Conv) -> None:
    """Any number of threads, inside one call and across calls, gives the same bits."""
    o = sparse_operands(conv)
    o.weight[: conv.k // 3] = 0  # ranges of channels are balanced by what is in them
    expected = reference(conv, o)
    for threads in (-1, 0, 1, 2, 3, 7):
        for scattered in (False, True):
            assert torch.equal(run(replace(conv, threads=threads), o, scattered=scattered), expected), threads
    with ThreadPoolExecutor(3) as pool:
        for got in pool.map(lambda t: run(replace(conv, threads=t), o), (1, 2, 1, 2, 1, 2)):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "multiples of groups"),
        ({"stride": (0, 1)}, "at least 1"),
        ({"kernel": (9, 1)}, "larger than the padded image"),
    ],
)
def test_sizes_that_give_no_convolution(change: dict[str, object], message: str) -> None:
    conv = replace(Conv(4, 4, 1, 5, 5), **change)
    t = torch.zeros(64, dtype=torch.int64)
    where = (*conv.kernel, *conv.stride, *conv.pad, *conv.dil, conv.groups)
    p = t.data_ptr()
    with pytest.raises(ValueError, match=message):
        _cpu.conv2d_sparse_int8(p, False, 1, 5, 5, 4, p, p, p, 1, 4, *where, p, 0, 0, 1.0, 0.0, p, 0, 1)
