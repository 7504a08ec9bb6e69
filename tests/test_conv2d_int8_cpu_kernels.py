"""The int8 CPU kernels, called directly, under every instruction set that this machine has: bit for bit the reference."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cnncomp.ops  # noqa: F401  (gives the kernels torch's threads)
from cnncomp import _cpu
from cnncomp.ops._openmp import attach
from tests.instruction_sets import ISAS, instruction_set, isa
from tests.int8_convs import (
    CODE,
    F32,
    GEOMETRIES,
    RANGE,
    S8,
    U8,
    Conv,
    Guarded,
    Operands,
    bounded,
    ending,
    nhwc,
    random_operands,
    random_tensor,
    reference,
)

__all__ = ["isa"]  # a fixture


def pack(weight: Tensor, groups: int, depthwise: bool) -> Tensor:
    """docs/design.md, "Packed weights", element by element of the definition."""
    k, cg, r, s = weight.shape
    if depthwise:
        taps = weight[:, 0].transpose(1, 2) if r > 1 else weight[:, 0]  # (k, columns, taps of a column)
        columns, length = taps.shape[1:]
        packed = torch.zeros(-(-k // 16) * 16, columns, -(-length // 4) * 4, dtype=S8)
        packed[:k, :, :length] = taps
        return packed.reshape(-1, 16, packed.shape[1] * packed.shape[2] // 4, 4).transpose(1, 2).contiguous()
    kg, kb, cq = k // groups, -(-k // groups // 16), -(-cg // 4)
    packed = torch.zeros(groups, kb * 16, cq * 4, r * s, dtype=S8)
    packed[:, :kg, :cg] = weight.reshape(groups, kg, cg, r * s)
    return packed.reshape(groups, kb, 16, cq, 4, r * s).permute(0, 1, 5, 3, 2, 4).contiguous()


def run(conv: Conv, o: Operands) -> Tensor:
    guarded = Guarded()
    x, constants = guarded(nhwc(o.x)), guarded(o.constants)
    weight = guarded(pack(o.weight, conv.groups, conv.depthwise))
    residual = None if o.residual is None else guarded(nhwc(o.residual))
    n, k, p, q = conv.out_shape
    before = guarded(torch.full((n, p, q, k), 77, dtype=conv.out))
    _cpu.conv2d_int8(
        x.data_ptr(), conv.x == S8, conv.n, conv.h, conv.w, conv.c,
        weight.data_ptr(), k, *conv.kernel, *conv.stride, *conv.pad, *conv.dil, conv.groups, conv.depthwise,
        constants.data_ptr(),
        0 if residual is None else residual.data_ptr(), CODE[conv.residual or U8], o.residual_scale, o.lo,
        before.data_ptr(), CODE[conv.out], conv.threads, conv.shift, *ending(conv),
    )  # fmt: skip
    return before.clone().permute(0, 3, 1, 2)


def check(conv: Conv, operands: Operands | None = None) -> None:
    given = operands or random_operands(conv)
    # Kernels whose products of bytes saturate go other ways with small weights.
    for o in (given,) if operands or conv.depthwise else (given, bounded(given)):
        got, expected = run(conv, o), reference(conv, o)
        if not torch.equal(got, expected):
            wrong = (got != expected).nonzero()
            at = tuple(wrong[0].tolist())
            pytest.fail(
                f"{_cpu.isa()} {conv}: {len(wrong)} of {got.numel()} wrong, {at}: got {got[at]}, not {expected[at]}"
            )


# Around the register tiles (1 to 14 pixels, 1 to 4 blocks of 16 output channels) and the quads of input channels.
PIXELS = (1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 14, 15, 29, 300)


@pytest.mark.parametrize("k", [1, 15, 16, 17, 31, 48, 64, 65, 80, 100, 145])
def test_linear(isa: str, k: int) -> None:
    for rows in PIXELS:
        for c in (1, 4, 63):
            check(Conv(c, k, n=rows, x=S8 if rows % 2 else U8))


@pytest.mark.parametrize("x", [U8, S8])
@pytest.mark.parametrize("kernel", [1, 3])
def test_pairs_at_the_edge_of_16_bits(isa: str, kernel: int, x: torch.dtype) -> None:
    """Inputs at both ends of their range; pairs of weights that make the largest sums, one more, and as much as can be."""
    conv = Conv(24, 33, 1, 9, 8, (kernel, kernel), pad=(kernel // 2, kernel // 2), x=x)
    o = random_operands(conv)
    ends = torch.tensor(RANGE[x]).to(x)
    # Of eight inputs, those two quads whose products may be added before they are widened.
    edges = (
        (64, 64), (-64, -64), (65, 64), (-65, -64), (127, 1), (-128, 0), (127, 127), (-128, -128),
        (32, 32, 0, 0, 32, 32), (-32, -32, 0, 0, -32, -32), (32, 32, 0, 0, 32, 33), (-32, -33, 0, 0, -32, -32),
        (0, 0, 127, 1, 0, 0, 1), (0, 0, 64, 64, 0, 0, 64, 64), (0, 0, -128, -128, 0, 0, -128, -128), (127, -127) * 4,
    )  # fmt: skip
    for share in (0.0, 0.02, 1.0):
        weight = torch.zeros_like(o.weight)
        for k in range(33 if share else 2):
            edge = torch.tensor((*edges[k % len(edges)], *[0] * 8)[:8], dtype=S8)
            some = torch.rand(3, 1, kernel, kernel) < (share or 1.0)
            weight[k] = (edge[None, :, None, None] * some).flatten(0, 1)
        check(conv, replace(o, x=ends[torch.randint(0, 2, o.x.shape)], weight=weight))
        check(conv, replace(o, x=torch.full_like(o.x, int(ends[1])), weight=weight))


@pytest.mark.parametrize("x", [U8, S8])
@pytest.mark.parametrize("c", [1, 2, 3, 4, 5, 16, 33])
def test_conv(isa: str, c: int, x: torch.dtype) -> None:
    for k, size in ((16, 7), (24, 14), (70, 9)):
        conv = Conv(c, k, 2, size, size + 1, kernel=(3, 3), pad=(1, 1), x=x)
        check(conv)
        check(replace(conv, stride=(2, 2), n=1))
        check(replace(conv, kernel=(1, 1), pad=(0, 0), stride=(3, 2)))


@pytest.mark.parametrize("c", [1, 3, 4, 5, 8, 11, 16, 20, 23, 24, 27, 32, 33])
def test_few_channels(isa: str, c: int) -> None:
    """Reductions so short that all weights of a panel may stay in registers."""
    for k in (15, 16, 24, 33, 48, 64, 100, 144):
        for pixels, x, residual, out in ((1, U8, None, U8), (13, S8, S8, S8), (30, U8, U8, S8), (259, S8, None, U8)):
            check(Conv(c, k, pixels, x=x, residual=residual, out=out))


@pytest.mark.parametrize("c", [1, 2, 3])
def test_stem(isa: str, c: int) -> None:
    """Few channels: the taps in a row of the window are taken together."""
    for x in (U8, S8):
        conv = Conv(c, 32, 2, 21, 18, (3, 3), (2, 2), (1, 1), x=x, threads=2)
        check(conv)
        check(replace(conv, kernel=(7, 7), pad=(3, 3), k=70, shift=x == S8))
        check(replace(conv, kernel=(1, 5), stride=(1, 4), pad=(0, 3)))  # windows with no input at all
        check(replace(conv, kernel=(2, 2), stride=(1, 3), pad=(0, 0), dil=(3, 1), w=17, residual=U8))
        check(replace(conv, dil=(1, 2)))


@pytest.mark.parametrize("out", [U8, S8])
@pytest.mark.parametrize("scale", [1e-2, 0.3, 1e6, 1e30])
@pytest.mark.parametrize("depthwise", [False, True])
def test_numbers_beyond_8_bit(isa: str, depthwise: bool, scale: float, out: torch.dtype) -> None:
    """Outputs are clamped whether they are rounded to int32 before or not: beyond 32 bits they can't be."""
    for conv in (
        Conv(20, 20, 1, 6, 7, (3, 3), pad=(1, 1), groups=20 if depthwise else 1, out=out),
        Conv(16, 16, 9, out=out),
    ):
        o = random_operands(conv)
        o.constants[0], o.constants[2] = scale, RANGE[out][1]
        check(conv, o)
        o.constants[2, 3], o.lo = 7.5, 2.5
        o.constants[1, 7] = 1e10
        check(conv, o)


@pytest.mark.parametrize(
    "conv",
    [
        *GEOMETRIES,
        Conv(64, 64, 1, 6, 6, (3, 3), (1, 1), (1, 1), groups=32),
        Conv(7, 14, 1, 4, 4, (3, 3), (1, 1), (1, 1), groups=7),  # one input channel, two outputs: not depthwise
    ],
)
def test_geometry(isa: str, conv: Conv) -> None:
    check(conv)
    check(replace(conv, threads=2, residual=S8, out=S8))


@pytest.mark.parametrize("x", [U8, S8])
@pytest.mark.parametrize("c", [2, 15, 16, 17, 31, 32, 33, 48, 64, 65, 96, 129])
def test_depthwise(isa: str, c: int, x: torch.dtype) -> None:
    conv = Conv(c, c, 2, 6, 7, (3, 3), (1, 1), (1, 1), groups=c, x=x)
    check(conv)
    check(replace(conv, stride=(2, 2), out=S8, threads=2))
    check(replace(conv, kernel=(5, 5), pad=(2, 2), n=3, threads=3))
    check(replace(conv, kernel=(5, 5), pad=(2, 1), stride=(1, 2), dil=(2, 1), h=11))
    check(replace(conv, pad=(4, 4), dil=(3, 1), out=S8))  # columns and rows of zeros alone
    check(replace(conv, kernel=(1, 6), pad=(0, 2)))
    check(replace(conv, kernel=(2, 1), pad=(0, 0), dil=(2, 1), stride=(3, 1)))
    check(replace(conv, h=1, w=1, out=F32))
    for residual in (U8, S8, F32):
        check(replace(conv, residual=residual, out=F32 if residual == U8 else S8))


@pytest.mark.parametrize("out", [U8, S8, F32])
@pytest.mark.parametrize("residual", [None, U8, S8, F32])
def test_epilogue(isa: str, residual: torch.dtype | None, out: torch.dtype) -> None:
    for k in (3, 16, 37, 64):
        check(Conv(8, k, 1, 5, 5, (3, 3), residual=residual, out=out))
        check(Conv(9, k, 13, residual=residual, out=out, x=S8))


@pytest.mark.parametrize("activation", ["silu", "hardswish"])
@pytest.mark.parametrize("out", [U8, S8, F32])
@pytest.mark.parametrize("residual", [None, U8, S8, F32])
def test_activations(isa: str, residual: torch.dtype | None, out: torch.dtype, activation: str) -> None:
    """Dense, depthwise by columns and by pixels, stems, groups; whole blocks of 16 channels, and not."""
    for k in (3, 16, 37, 64):
        conv = Conv(8, k, 1, 5, 5, (3, 3), residual=residual, out=out, activation=activation)
        check(conv)
        check(replace(conv, c=9, h=1, w=1, n=13, kernel=(1, 1), x=S8))
        check(replace(conv, c=3, stride=(2, 2), pad=(1, 1), threads=2))
    for c in (16, 31, 80):
        conv = Conv(c, c, 2, 9, 7, (3, 3), pad=(1, 1), groups=c, residual=residual, out=out, activation=activation)
        check(conv)
        check(replace(conv, stride=(2, 2), x=S8))
        check(replace(conv, kernel=(5, 5), stride=(1, 2), shift=True))
        check(replace(conv, kernel=(5, 5), pad=(2, 2), threads=3))
    check(
        Conv(
            12, 24, 2, 5, 5, (3, 3), pad=(1, 1), groups=3, out=out, activation=activation, shift=True, residual=residual
        )
    )


@pytest.mark.parametrize("activation", ["silu", "hardswish"])
@pytest.mark.parametrize("depthwise", [False, True])
def test_values_of_activations(isa: str, depthwise: bool, activation: str) -> None:
    """Where they bend and end, as floats: no sums, the values are biases. And in 8 bit, beyond both ends."""
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, math.inf, -math.inf, 3.0, -3.0, 88.0, -88.0])
    values = torch.cat([special, torch.linspace(-30, 30, 500)])
    c = len(values)
    conv = Conv(c, c, 1, 4, 4, (3, 3), pad=(1, 1), groups=c if depthwise else 1, out=F32, activation=activation)
    o = random_operands(conv)
    o.weight.zero_()
    o.constants[0], o.constants[1], o.constants[2], o.lo = 0.0, values, math.inf, -math.inf
    got, expected = run(conv, o), reference(conv, o)
    real = ~expected.isnan()  # hardswish of -inf is none
    assert torch.equal(got[real].view(torch.int32), expected[real].view(torch.int32)) and got.isnan().equal(~real)
    for out in (U8, S8):
        o.constants[1, 6:8], o.constants[2], o.lo = 0.0, *reversed(RANGE[out])
        check(replace(conv, out=out), o)


@pytest.mark.parametrize("x", [U8, S8])
@pytest.mark.parametrize("out", [U8, S8, F32])
def test_mean_shift(isa: str, out: torch.dtype, x: torch.dtype) -> None:
    """Channels around whole vectors of 16, 32 and 64 bytes, padding, groups, depthwise, and rows of a linear layer."""
    for c in (1, 3, 15, 16, 17, 33, 64, 83, 200):
        check(Conv(c, 40, 1, 6, 7, (3, 3), pad=(1, 1), x=x, out=out, shift=True))
        check(Conv(c, 70, n=31, x=x, out=out, shift=True, residual=S8, threads=2))
    for c in (2, 15, 16, 17, 47, 64, 65, 129):
        conv = Conv(c, c, 2, 6, 7, (3, 3), pad=(1, 1), groups=c, x=x, out=out, shift=True)
        check(conv)
        check(replace(conv, kernel=(5, 4), pad=(2, 2), stride=(2, 1), residual=F32, threads=3))
    check(Conv(12, 24, 2, 5, 5, (3, 3), pad=(1, 1), groups=3, x=x, out=out, shift=True))
    check(Conv(70, 100, 2, 5, 5, (3, 3), (2, 2), (2, 2), (2, 2), groups=2, x=x, out=out, shift=True, threads=2))


@pytest.mark.parametrize(("dtype", "value"), [(U8, 255), (S8, -128), (S8, 127)])
@pytest.mark.parametrize("groups", [1, 33])
def test_window_sums_come_out_whole(isa: str, groups: int, dtype: torch.dtype, value: int) -> None:
    conv = Conv(33, 33, 1, 9, 9, (3, 3), pad=(1, 1), groups=groups, x=dtype, out=F32, shift=True)
    o = random_operands(conv)
    o.x.fill_(value)
    o.constants[:2], o.constants[2], o.constants[3], o.lo = 0.0, math.inf, 1.0, -math.inf
    taps = 9 * 33 // groups
    assert run(conv, o)[0, :, 4, 4].tolist() == [float(value * taps)] * 33
    check(conv, o)


@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize("weight", [-128, -127, 127])
@pytest.mark.parametrize(("dtype", "value"), [(U8, 255), (U8, 0), (S8, -128), (S8, 127)])
def test_extremes(isa: str, dtype: torch.dtype, value: int, weight: int, groups: int) -> None:
    """Nothing saturates on the way to 32 bits: the accumulator itself comes out, its low half and its high half."""
    conv = Conv(32, 32, 1, 9, 9, (3, 3), pad=(1, 1), groups=groups, x=dtype, out=F32)
    o = random_operands(conv)
    o.x.fill_(value)
    o.weight.fill_(weight)
    o.constants[0], o.constants[1], o.constants[2], o.lo = 1.0, 0.0, math.inf, -math.inf
    check(conv, o)


@pytest.mark.parametrize("dtype", [U8, S8])
def test_longest_reduction(isa: str, dtype: torch.dtype) -> None:
    conv = Conv(66_311, 1, n=2, x=dtype, out=F32)
    o = random_operands(conv)
    o.x.fill_(255 if dtype == U8 else -128)
    o.weight.fill_(127)
    o.constants[:, 0], o.lo = torch.tensor([1.0, 0.0, math.inf]), -math.inf
    check(conv, o)


@pytest.mark.parametrize("k", [20, 64])
def test_nan_residual_stays_nan(isa: str, k: int) -> None:
    conv = Conv(4, k, 2, residual=F32, out=F32)
    o = random_operands(conv)
    assert o.residual is not None
    o.residual[1, 18] = math.nan
    got, expected = run(conv, o), reference(conv, o)
    assert torch.isnan(got[1, 18]).item()
    assert torch.equal(got.nan_to_num(9.0), expected.nan_to_num(9.0))


def test_empty_batch(isa: str) -> None:
    for conv in (Conv(8, 16, 0), Conv(8, 8, 0, 4, 4, (3, 3), groups=8)):
        check(conv)


GEOMETRY = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2))  # r, stride, pad, dil


@st.composite
def convs(draw: st.DrawFn) -> Conv:
    (r, sh, ph, dh), (s, sw, pw, dw) = draw(GEOMETRY), draw(GEOMETRY)
    h = draw(st.integers(max(1, dh * (r - 1) + 1 - 2 * ph), 20))
    w = draw(st.integers(max(1, dw * (s - 1) + 1 - 2 * pw), 20))
    kind = draw(st.sampled_from(["dense", "grouped", "depthwise"]))
    groups = 1 if kind == "dense" else draw(st.integers(2, 6 if kind == "grouped" else 80))
    c, k = (groups, groups) if kind == "depthwise" else (groups * draw(st.integers(1, 40)) for _ in "ck")
    dtypes = st.sampled_from([U8, S8, F32])
    return Conv(
        c, k, draw(st.integers(1, 3)), h, w, (r, s), (sh, sw), (ph, pw), (dh, dw), groups,
        draw(st.sampled_from([U8, S8])), draw(st.none() | dtypes), draw(dtypes), draw(st.integers(1, 4)), draw(st.booleans()),
        draw(st.sampled_from(["", "silu", "hardswish"])),
    )  # fmt: skip


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=60)
@given(conv=convs())
def test_random_conv(name: str, conv: Conv) -> None:
    with instruction_set(name):
        torch.manual_seed(1)
        check(conv)


@pytest.mark.parametrize(
    "conv",
    [
        Conv(16, 40, 1, 30, 30, (3, 3), pad=(1, 1)),
        Conv(64, 200, 3),
        Conv(70, 70, 1, 17, 17, (3, 3), pad=(1, 1), groups=70),
        Conv(24, 24, 1, 9, 9, (3, 3), pad=(1, 1), groups=2, x=S8),
    ],
)
def test_threads(isa: str, conv: Conv) -> None:
    """Any number of threads, inside one call and across calls, gives the same bits."""
    o = random_operands(conv)
    expected = reference(conv, o)
    for threads in (-1, 0, 1, 2, 3, 7):
        assert torch.equal(run(replace(conv, threads=threads), o), expected), threads
    with ThreadPoolExecutor(3) as pool:
        for got in pool.map(lambda t: run(replace(conv, threads=t), o), (1, 2, 1, 2, 1, 2)):
            assert torch.equal(got, expected)


def quantized(x: Tensor, channels_last: bool, dtype: torch.dtype, inv_scale: float, threads: int) -> Tensor:
    guarded = Guarded()
    n, c, h, w = x.shape
    source = guarded(nhwc(x) if channels_last else x.contiguous())
    out = guarded(torch.full((n, h, w, c), 77, dtype=dtype))
    _cpu.quantize(source.data_ptr(), n, c, h, w, channels_last, out.data_ptr(), dtype == S8, inv_scale, threads)
    return out.clone().permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", [U8, S8])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 3, 224, 224), (2, 1, 5, 5), (2, 2, 3, 7), (1, 3, 4, 4), (3, 4, 4, 5), (1, 5, 9, 9), (2, 64, 7, 7), (1, 71, 5, 3),
     (5, 19, 1, 1), (0, 3, 4, 4), (1, 3000, 4, 5)],
)  # fmt: skip
def test_quantize(isa: str, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> None:
    x = torch.randn(shape) * 100
    flat = x.view(-1)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.25, 0.75, -0.25, -0.75, 1e30, -1e30, 63.75, 127.25, -0.0])
    flat[: special.numel()] = special[: flat.numel()]
    lo, hi = RANGE[dtype]
    expected = torch.round(torch.nan_to_num(x * 2.0, nan=lo, posinf=hi, neginf=lo).clamp(lo, hi)).to(dtype)
    for threads in (1, 2):
        assert torch.equal(quantized(x, channels_last, dtype, 2.0, threads), expected)


@pytest.mark.parametrize("dtype", [U8, S8])
@pytest.mark.parametrize("c", [1, 3, 16, 31, 64, 65])
def test_max_pool(isa: str, c: int, dtype: torch.dtype) -> None:
    for h, w, kernel, stride, pad, dil in [
        (14, 14, (3, 3), (2, 2), (1, 1), (1, 1)), (8, 9, (2, 2), (2, 2), (0, 0), (1, 1)), (9, 7, (3, 2), (1, 3), (1, 1), (2, 2))
    ]:  # fmt: skip
        x = random_tensor((2, c, h, w), dtype)
        expected = F.max_pool2d(x.float(), kernel, stride, pad, dil).to(dtype)
        guarded = Guarded()
        source, out = guarded(nhwc(x)), guarded(torch.zeros_like(nhwc(expected)))
        _cpu.max_pool2d_int8(
            source.data_ptr(), dtype == S8, 2, h, w, c, *kernel, *stride, *pad, *dil, out.data_ptr(), 2
        )
        assert torch.equal(out.permute(0, 3, 1, 2), expected)


def test_openmp_is_torchs() -> None:
    assert attach()


def test_isa_names() -> None:
    assert _cpu.isa_available()[0] == "baseline"
    assert _cpu.isa() == _cpu.isa_available()[-1]
    with pytest.raises(ValueError, match="got 'sse9', expected one of baseline"):
        _cpu.set_isa("sse9")


def test_unknown_dtype_code() -> None:
    x = torch.zeros(64, dtype=torch.int8)
    p = x.data_ptr()
    with pytest.raises(ValueError, match="dtype"):
        _cpu.conv2d_int8(p, False, 1, 1, 1, 4, p, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, False, p, 0, 0, 1.0, 0.0, p, 3, 1)
