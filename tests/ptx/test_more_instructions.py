"""Each instruction against numpy or plain Python. Comments name the sections of the PTX ISA 8.8."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.ptx import TrapError
from tests.ptx.harness import N, run
from tests.ptx.lower.registry import TABLE

rng = np.random.default_rng(11)
A = rng.integers(-(2**31), 2**31, N).astype(np.int32)
B = rng.integers(-(2**31), 2**31, N).astype(np.int32)
C = rng.integers(-(2**31), 2**31, N).astype(np.int32)
A[:6], B[:6] = [0, -1, 5, -(2**31), 2**31 - 1, 100], [7, 3, -3, 1, 2, -7]
X, Y, Z = (v.astype(object) for v in (A, B, C))
U, V, W = (v.view(np.uint32).astype(object) for v in (A, B, C))
LANE = np.arange(N) % 32
LOAD = "ld.global.u32 %r1, [%rd5]; ld.global.u32 %r2, [%rd6]; ld.global.u32 %r3, [%rd7];"
STORE = "st.global.u32 [%rd8], %r9;"
WIDE = "mov.b64 %rd9, {%r1, %r2}; mov.b64 %rd10, {%r2, %r3};"
P, Q = U | V * 2**32, V | W * 2**32
LOW, HIGH = "cvt.u32.u64 %r9, %rd11;", "shr.u64 %rd11, %rd11, 32; cvt.u32.u64 %r9, %rd11;"


def each(function, *arrays):
    return np.array([function(*(int(v) for v in values)) for values in zip(*arrays, strict=True)], object)


def bits(x, count):
    return [int(x) >> i & 1 for i in range(count)]


def number(parts):
    return sum(bit << i for i, bit in enumerate(parts))


def extract(x, position, length, signed):
    return number(
        [
            (x >> min(position + i, 31)) & 1 if position + i < 32 else (x >> 31 & 1 if signed else 0)
            for i in range(length)
        ]
    ) - ((1 << length) if signed and x >> min(position + length - 1, 31) & 1 else 0)


def lop3(a, b, c, table):
    return number(
        [table >> (4 * p + 2 * q + r) & 1 for p, q, r in zip(bits(a, 32), bits(b, 32), bits(c, 32), strict=True)]
    )


def dot4(a, b, c, sign_a, sign_b):
    part = lambda x, i, sign: (x >> 8 * i & 255) - 256 * (sign and x >> (8 * i + 7) & 1)  # noqa: E731
    return c + sum(part(a, i, sign_a) * part(b, i, sign_b) for i in range(4))


def dot2(a, b, c, high):
    part = lambda x, i, width: (x >> width * i & (1 << width) - 1) - (1 << width) * (x >> (width * i + width - 1) & 1)  # noqa: E731
    return c + sum(part(a, i, 16) * part(b, i + 2 * high, 8) for i in range(2))


INTEGER = {
    # 9.7.1 integer arithmetic
    "add.u64 %rd11, %rd9, %rd10;" + HIGH: P + Q >> 32,
    "sub.s64 %rd11, %rd9, %rd10;" + HIGH: P - Q >> 32,
    "mul.lo.u64 %rd11, %rd9, %rd10;" + HIGH: P * Q >> 32,
    "mul.hi.u64 %rd11, %rd9, %rd10;" + LOW: P * Q >> 64,
    "mad.hi.u32 %r9, %r1, %r2, %r3;": (U * V >> 32) + W,
    "mad.hi.s32 %r9, %r1, %r2, %r3;": (X * Y >> 32) + Z,
    "mad.lo.u64 %rd11, %rd9, %rd10, %rd9;" + HIGH: P * Q + P >> 32,
    "mul.wide.s32 %rd11, %r1, %r2;" + HIGH: X * Y >> 32,
    "cvt.u16.u32 %h1, %r1; cvt.u16.u32 %h2, %r2; mul.wide.s16 %r9, %h1, %h2;": each(
        lambda a, b: np.int16(a).item() * np.int16(b).item(), A.astype(np.int16), B.astype(np.int16)
    ),
    "sad.s32 %r9, %r1, %r2, %r3;": abs(X - Y) + Z,
    "add.sat.s32 %r9, %r1, %r2;": each(lambda a, b: max(-(2**31), min(2**31 - 1, a + b)), A, B),
    "sub.sat.s32 %r9, %r1, %r2;": each(lambda a, b: max(-(2**31), min(2**31 - 1, a - b)), A, B),
    "popc.b32 %r9, %r1;": each(lambda a: a.bit_count(), U),
    "popc.b64 %r9, %rd9;": each(lambda a: a.bit_count(), P),
    "clz.b32 %r9, %r1;": each(lambda a: 32 - a.bit_length(), U),
    "clz.b64 %r9, %rd9;": each(lambda a: 64 - a.bit_length(), P),
    "bfind.u32 %r9, %r1;": each(lambda a: a.bit_length() - 1, U),
    "bfind.s32 %r9, %r1;": each(lambda a: (a if a >= 0 else ~a).bit_length() - 1, A),
    "bfind.shiftamt.u32 %r9, %r1;": each(lambda a: 32 - a.bit_length() if a else -1, U),
    "brev.b32 %r9, %r1;": each(lambda a: number(bits(a, 32)[::-1]), U),
    "and.b32 %r4, %r2, 31; and.b32 %r5, %r3, 15; add.s32 %r5, %r5, 1; bfe.u32 %r9, %r1, %r4, %r5;": each(
        lambda a, b, c: extract(a, b & 31, (c & 15) + 1, False), U, V, W
    ),
    "and.b32 %r4, %r2, 31; and.b32 %r5, %r3, 15; add.s32 %r5, %r5, 1; bfe.s32 %r9, %r1, %r4, %r5;": each(
        lambda a, b, c: extract(a, b & 31, (c & 15) + 1, True), U, V, W
    ),
    "dp4a.s32.s32 %r9, %r1, %r2, %r3;": each(lambda a, b, c: dot4(a, b, c, True, True), U, V, W),
    "dp4a.u32.s32 %r9, %r1, %r2, %r3;": each(lambda a, b, c: dot4(a, b, c, False, True), U, V, W),
    "dp4a.s32.u32 %r9, %r1, %r2, %r3;": each(lambda a, b, c: dot4(a, b, c, True, False), U, V, W),
    "dp4a.u32.u32 %r9, %r1, %r2, %r3;": each(lambda a, b, c: dot4(a, b, c, False, False), U, V, W),
    "dp2a.lo.s32.s32 %r9, %r1, %r2, %r3;": each(lambda a, b, c: dot2(a, b, c, 0), U, V, W),
    "dp2a.hi.s32.s32 %r9, %r1, %r2, %r3;": each(lambda a, b, c: dot2(a, b, c, 1), U, V, W),
    # 9.7.2 extended precision
    "add.cc.u32 %r4, %r1, %r2; addc.u32 %r9, %r2, %r3;": P + Q >> 32,
    "sub.cc.u32 %r4, %r1, %r2; subc.u32 %r9, %r2, %r3;": P - Q >> 32,
    "mad.lo.cc.u32 %r4, %r1, %r2, %r3; madc.hi.u32 %r9, %r1, %r2, 5;": U * V + W + 5 * 2**32 >> 32,
    # 9.7.8 logic and shift
    "lop3.b32 %r9, %r1, %r2, %r3, 0xCA;": each(lambda a, b, c: lop3(a, b, c, 0xCA), U, V, W),
    "lop3.b32 %r9, %r1, %r2, %r3, 0x96;": U ^ V ^ W,
    "cnot.b32 %r9, %r1;": (U == 0) * 1,
    "shf.l.wrap.b32 %r9, %r1, %r2, %r3;": each(lambda a, b, c: (a | b << 32) << (c & 31) >> 32, U, V, W),
    "shf.r.wrap.b32 %r9, %r1, %r2, %r3;": each(lambda a, b, c: (a | b << 32) >> (c & 31), U, V, W),
    "shf.r.clamp.b32 %r9, %r1, %r2, 40;": V,
    "shl.b64 %rd11, %rd9, 37;" + HIGH: (P << 37) % 2**64 >> 32,
    "shr.s64 %rd11, %rd9, 40;" + LOW: each(lambda b: b >> 8, B),
    "bfi.b32 %r9, %r1, %r2, 28, 8;": each(lambda a, b: (b & 0xFFFFFFF) | (a & 15) << 28, U, V),
    # 9.7.9.7 prmt
    "prmt.b32.rc8 %r9, %r1, %r2, 2;": (U >> 16 & 255) * 0x01010101,
    "prmt.b32.rc16 %r9, %r1, %r2, 1;": (U >> 16) * 0x00010001,
    "prmt.b32.f4e %r9, %r1, %r2, 3;": each(lambda p: p >> 24, P),
    "prmt.b32.b4e %r9, %r1, %r2, 1;": each(
        lambda a, b: (a >> 8 & 255) | (a & 255) << 8 | (b >> 24) << 16 | (b >> 16 & 255) << 24, U, V
    ),
    # 9.7.6 comparison and selection
    "setp.lt.or.s32 %p1|%p2, %r1, %r2, %p3; selp.b32 %r9, 2, 0, %p1; @%p2 add.s32 %r9, %r9, 1;": (X < Y) * 2 + (X >= Y) * 1,
    "setp.gt.s32 %p3, %r3, 0; setp.lt.and.s32 %p1, %r1, %r2, !%p3; selp.b32 %r9, 1, 0, %p1;": (
        (X < Y) & ~(Z > 0).astype(bool)
    ) * 1,
    "setp.eq.s64 %p1, %rd9, %rd9; selp.b64 %rd11, %rd9, %rd10, %p1;" + HIGH: V,
    "setp.hi.u32 %p1, %r1, %r2; setp.ls.u32 %p2, %r1, %r2; xor.pred %p3, %p1, %p2; selp.b32 %r9, 3, 4, %p3;": X * 0 + 3,
    # 9.7.9 data movement and conversion
    "cvt.sat.s8.s32 %r9, %r1;": each(lambda a: max(-128, min(127, a)), A),
    "cvt.sat.u8.s32 %r9, %r1;": each(lambda a: max(0, min(255, a)), A),
    "cvt.sat.u16.s64 %h1, %rd9; cvt.u32.u16 %r9, %h1;": each(lambda b, p: 0 if b < 0 else min(p, 65535), B, P),
    "cvt.pack.sat.s8.s32.b32 %r9, %r1, %r2, %r3;": each(
        lambda a, b, c: c << 16 | (max(-128, min(127, a)) & 255) << 8 | max(-128, min(127, b)) & 255, A, B, W
    ),
    "cvt.pack.sat.u16.s32 %r9, %r1, %r2;": each(lambda a, b: max(0, min(65535, a)) << 16 | max(0, min(65535, b)), A, B),
    "mov.b32 {%h1, %h2}, %r1; mov.b32 %r9, {%h2, %h1};": each(lambda a: a >> 16 | (a & 65535) << 16, U),
    "mov.u32 %r9, %lanemask_lt;": each(lambda i: (1 << i) - 1, LANE),
    "mov.u32 %r9, %lanemask_ge;": each(lambda i: 2**32 - (1 << i), LANE),
    "mov.u32 %r4, %warpid; mov.u32 %r5, %nwarpid; mad.lo.s32 %r9, %r5, 100, %r4;": np.arange(N) // 32 + 200,
    # 9.7.9.6 shfl
    "shfl.sync.up.b32 %r9, %r1, 3, 0, -1;": A[np.arange(N) - np.where(LANE < 3, 0, 3)],
    "shfl.sync.down.b32 %r9|%p1, %r1, 5, 31, -1; @!%p1 mov.u32 %r9, 77;": np.where(
        LANE < 27, np.r_[A, A][np.arange(N) + 5], 77
    ),
    "shfl.sync.idx.b32 %r9, %r1, 1, 0x1807, -1;": A[np.arange(N) // 8 * 8 + 1],
    # 9.7.13 votes and warp-wide reductions
    "setp.gt.s32 %p1, %r1, 0; vote.sync.ballot.b32 %r9, %p1, -1;": np.repeat(
        [number(A[i : i + 32] > 0) for i in (0, 32)], 32
    ),
    "setp.gt.s32 %p1, %r1, 0; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r9, 1, 0, %p2;": X * 0 + 1,
    "setp.gt.s32 %p1, %r1, 0; vote.sync.all.pred %p2, !%p1, -1; selp.b32 %r9, 1, 0, %p2;": X * 0,
    "redux.sync.add.s32 %r9, %r1, -1;": np.repeat([X[:32].sum(), X[32:].sum()], 32),
    "redux.sync.max.s32 %r9, %r1, -1;": np.repeat([X[:32].max(), X[32:].max()], 32),
    "and.b32 %r4, %r1, 3; match.any.sync.b32 %r9, %r4, -1;": each(
        lambda i: number((A[i // 32 * 32 : i // 32 * 32 + 32] & 3) == (A[i] & 3)), np.arange(N)
    ),
    "elect.sync %r9|%p1, -1; @%p1 add.s32 %r9, %r9, 9;": (LANE == 0) * 9,
    "setp.lt.u32 %p1, %r0, 40; mov.u32 %r9, 0; @!%p1 bra E; activemask.b32 %r9; E: ;": np.where(
        np.arange(N) < 32, 2**32 - 1, (np.arange(N) < 40) * 255
    ),
}  # fmt: skip


@pytest.mark.parametrize("body", INTEGER)
def test_integer_instruction(body):
    out, _ = run(LOAD + WIDE + body + STORE, A, B, C)
    expected = (np.asarray(INTEGER[body]).astype(object) % 2**32).astype(np.uint32).view(np.int32)
    np.testing.assert_array_equal(out, expected)


F = np.concatenate(
    [
        [0.5, 1.5, 2.5, -0.5, np.nan, 3e38, -3e38, 1e-40, -0.0, 65519, 65520, 1 + 2**-11],
        rng.standard_normal(N - 12) * 50,
    ]
)
F = F.astype(np.float32)
G = rng.standard_normal(N).astype(np.float32)
G[:3] = [np.nan, np.inf, 2]
H = rng.standard_normal(N).astype(np.float32)
FF, GG, HH = (v.astype(np.float64) for v in (F, G, H))
PAIRS = "mov.b64 %rd9, {%f1, %f4}; mov.b64 %rd10, {%f2, %f2};"
TO_F64 = "cvt.f64.f32 %fd1, %f1; cvt.f64.f32 %fd2, %f2;"
PUT = "mov.b32 %r9, %f3;"


def f32(x):
    return np.asarray(x, np.float32).view(np.int32)


def f16(x):
    return np.asarray(x).astype(np.float16).view(np.uint16).astype(np.int64)


def bf16(x):
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.int64)
    rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded)


def round_down(x):
    """Bits of the float nearest to a positive double from below."""
    near = np.float32(x)
    return int((near if near <= x else np.nextafter(near, np.float32(0))).view(np.int32))


with np.errstate(all="ignore"):
    FLOAT = {
        # 9.7.3 floating point
        "fma.rn.f32 %f3, %f1, %f2, %f4;": (FF * GG + HH).astype(np.float32).view(np.int32),
        "div.rn.f32 %f3, %f1, %f2;": f32(F / G),
        "div.full.f32 %f3, %f1, %f2;": f32(F / G),
        "sub.ftz.f32 %f3, %f1, 0f00000000;": f32(np.where(np.abs(F) < 2.0**-126, np.float32(0) * F, F) - np.float32(0)),
        "add.sat.f32 %f3, %f1, %f2;": f32(np.nan_to_num(np.clip(F + G, 0, 1))),
        "min.f32 %f3, %f1, %f2;": f32(np.fmin(F, G)),
        "max.NaN.f32 %f3, %f1, %f2;": f32(np.maximum(F, G)),
        "abs.f32 %f3, %f2;": f32(np.abs(G)),
        "neg.f32 %f3, %f2;": f32(-G),
        "sqrt.rn.f32 %f3, %f2;": f32(np.sqrt(G)),
        "rcp.approx.ftz.f32 %f3, %f4;": f32(1 / H),
        "copysign.f32 %f3, %f2, %f4;": f32(np.copysign(H, G)),
        "ex2.approx.f32 %f3, %f4;": f32(np.exp2(HH)),
        "tanh.approx.f32 %f3, %f4;": f32(np.tanh(HH)),
        "abs.f32 %f5, %f4; rsqrt.approx.f32 %f3, %f5;": f32(1 / np.sqrt(np.abs(HH))),
        "abs.f32 %f5, %f4; lg2.approx.f32 %f3, %f5;": f32(np.log2(np.abs(HH))),
        "sin.approx.f32 %f3, %f4;": f32(np.sin(HH)),
        "cos.approx.ftz.f32 %f3, %f4;": f32(np.cos(HH)),
        TO_F64 + "fma.rn.f64 %fd3, %fd1, %fd2, 0d3FF0000000000000; cvt.rn.f32.f64 %f3, %fd3;": f32(FF * GG + 1),
        "cvt.f64.f32 %fd1, %f4; cvt.f64.f32 %fd2, %f4; mul.rn.f64 %fd3, %fd1, %fd2; cvt.rz.f32.f64 %f3, %fd3;": [
            round_down(h * h) for h in HH
        ],
        "cvt.rni.f32.f32 %f3, %f1;": f32(np.rint(F)),
        "cvt.rmi.f32.f32 %f3, %f1;": f32(np.floor(F)),
        "cvt.rna.tf32.f32 %r9, %f4;": H.view(np.int32) + 0x1000 & ~0x1FFF,
        # 9.7.4 half precision; 9.7.5 mixed
        "cvt.rn.f16.f32 %h1, %f1; cvt.u32.u16 %r9, %h1;": f16(F),
        "cvt.rn.bf16.f32 %h1, %f1; cvt.u32.u16 %r9, %h1;": bf16(F),
        "cvt.rn.f16x2.f32 %r9, %f1, %f2;": f16(F) << 16 | f16(G),
        "cvt.rn.bf16x2.f32 %r9, %f1, %f2;": bf16(F) << 16 | bf16(G),
        "cvt.rn.f16.f32 %h1, %f1; cvt.rn.f16.f32 %h2, %f2; add.f16 %h3, %h1, %h2; cvt.u32.u16 %r9, %h3;": f16(
            F.astype(np.float16) + G.astype(np.float16)
        ),
        "cvt.rn.f16.f32 %h1, %f4; cvt.rn.f16.f32 %h2, %f2; fma.rn.f16 %h3, %h1, %h2, %h1; cvt.u32.u16 %r9, %h3;": f16(
            H.astype(np.float16).astype(np.float64) * G.astype(np.float16) + H.astype(np.float16)
        ),
        "cvt.rn.f16x2.f32 %r1, %f1, %f2; cvt.rn.f16x2.f32 %r2, %f2, %f4; mul.f16x2 %r9, %r1, %r2;": (
            f16(F.astype(np.float16) * G.astype(np.float16)) << 16 | f16(G.astype(np.float16) * H.astype(np.float16))
        ),
        "cvt.rn.f16.f32 %h1, %f4; cvt.f32.f16 %f3, %h1;": f32(H.astype(np.float16)),
        # 9.7.3, pairs of sm_100 and later
        PAIRS + "fma.rn.f32x2 %rd11, %rd9, %rd10, %rd9; mov.b64 {%f3, %f5}, %rd11;": (
            f32(FF * GG + FF)
        ),
        PAIRS + "mul.rn.f32x2 %rd11, %rd9, %rd10; mov.b64 {%f5, %f3}, %rd11;": (
            f32(H * G)
        ),
        "setp.ltu.f32 %p1, %f1, %f2; selp.b32 %r9, 1, 0, %p1;": ~(F >= G) * 1,
        "setp.neu.f32 %p1, %f1, %f2; setp.nan.f32 %p2, %f1, %f2; selp.b32 %r9, 1, 0, %p1; @%p2 add.s32 %r9, %r9, 2;": (
            (F != G) * 1 + (np.isnan(F) | np.isnan(G)) * 2
        ),
        "testp.subnormal.f32 %p1, %f1; selp.b32 %r9, 1, 0, %p1;": ((F != 0) & (np.abs(F) < 2.0**-126)) * 1,
        "cvt.rzi.u8.f32 %r9, %f1;": np.clip(np.nan_to_num(np.trunc(F)), 0, 255).astype(np.int64),
        "cvt.rni.sat.s8.f32 %r9, %f1;": np.clip(np.nan_to_num(np.rint(F)), -128, 127).astype(np.int64),
        "cvt.rpi.s64.f32 %rd9, %f4; cvt.u32.u64 %r9, %rd9;": np.ceil(H).astype(np.int64),
        "mov.b32 %r1, %f4; cvt.rn.f32.u32 %f3, %r1;": f32(H.view(np.uint32).astype(np.float32)),
    }  # fmt: skip


@pytest.mark.parametrize("body", FLOAT)
def test_float_instruction(body):
    load = "ld.global.f32 %f1, [%rd5]; ld.global.f32 %f2, [%rd6]; ld.global.f32 %f4, [%rd7];"
    put = "" if "%r9" in body else PUT
    out, _ = run(load + body + put + STORE, F, G, H)
    expected = (np.asarray(FLOAT[body]).astype(object) % 2**32).astype(np.uint32).view(np.int32)
    if "%f3" in body and "%r9" not in body:  # any NaN is a NaN
        nan = np.isnan(expected.view(np.float32))
        assert np.isnan(out.view(np.float32)[nan]).all()
        out, expected = out[~nan], expected[~nan]
    nan = (
        np.array([False])
        if "f16" not in body
        else ((expected & 0x7FFF) > 0x7C00) | ((expected >> 16 & 0x7FFF) > 0x7C00)
    )
    keep = ~nan if nan.size == out.size else slice(None)
    np.testing.assert_array_equal(out[keep], expected[keep])


def test_half_fma_rounds_once():
    """A product that lies just beside a tie of the sum: two roundings would go the wrong way."""
    a, b, c = np.float16(1 + 2**-10), np.float16(1 - 2**-10), np.float16(2**-11)
    words = [np.full(N, v, np.float16).view(np.uint16).astype(np.int32) for v in (a, b, c)]
    body = "cvt.u16.u32 %h1, %r1; cvt.u16.u32 %h2, %r2; cvt.u16.u32 %h3, %r3;"
    body += "fma.rn.f16 %h4, %h1, %h2, %h3; cvt.u32.u16 %r9, %h4;"
    out, _ = run(LOAD + body + STORE, *words)
    exact = float(a) * float(b) + float(c)
    assert out[0] == int(np.float64(exact).astype(np.float16).view(np.uint16))


def test_indexed_branch():
    """9.7.12.3 brx.idx"""
    body = """
      shr.u32 %r1, %r0, 5; mov.u32 %r9, 0;
      T: .branchtargets L0, L1;
      brx.idx %r1, T;
      L0: mov.u32 %r9, 10; bra.uni E;
      L1: mov.u32 %r9, 20;
      E:
    """
    out, _ = run(body + STORE)
    np.testing.assert_array_equal(out, np.repeat([10, 20], 32))


def test_generic_addresses_and_local_memory():
    """9.7.9.19 cvta, isspacep; 5.1.5 local"""
    body = """
      .local .align 8 .b8 depot[16];
      mov.u64 %rd9, depot; cvta.local.u64 %rd10, %rd9;
      st.u32 [%rd10+4], %r0; ld.local.u32 %r1, [depot+4];
      mov.u64 %rd11, tile; cvta.shared.u64 %rd12, %rd11; add.s64 %rd12, %rd12, %rd4;
      st.u32 [%rd12], %r1; bar.warp.sync -1; ld.u32 %r9, [%rd12];
      isspacep.shared %p1, %rd12; @!%p1 mov.u32 %r9, 0; isspacep.local %p1, %rd12; @%p1 mov.u32 %r9, 0;
      cvta.to.shared.u64 %rd13, %rd12; setp.eq.u64 %p1, %rd13, %rd4; @!%p1 mov.u32 %r9, 0;
    """
    out, _ = run(body + STORE)
    np.testing.assert_array_equal(out, np.arange(N))


ATOMICS = {  # 9.7.13.6 atom, 9.7.13.7 red
    "red.global.add.u32 [%rd3], %r1;": lambda a: int(a.sum()),
    "atom.global.add.u32 %r9, [%rd3], %r1;": lambda a: int(a.sum()),
    "atom.global.max.s32 %r9, [%rd3], %r1;": lambda a: int(max(0, a.max())),
    "red.global.min.s32 [%rd3], %r1;": lambda a: int(min(0, a.min())),
    "red.global.or.b32 [%rd3], %r1;": lambda a: int(np.bitwise_or.reduce(a)),
    "red.global.xor.b32 [%rd3], %r1;": lambda a: int(np.bitwise_xor.reduce(a)),
    "atom.global.inc.u32 %r9, [%rd3], 9;": lambda a: 2 * N % 10,
    "atom.global.cas.b32 %r9, [%rd3], %r0, 1000;": lambda a: 1000,
    "mov.b32 %f1, 0f3F800000; red.global.add.f32 [%rd3], %f1;": lambda a: int(np.float32(2 * N).view(np.int32)),
    "red.global.add.noftz.f16x2 [%rd3], 0x40003C00;": lambda a: int(
        np.array([2 * N, 4 * N], np.float16).view(np.int32)[0]
    ),
}


@pytest.mark.parametrize("body", ATOMICS)
def test_atomic(body):
    a = rng.integers(-1000, 1000, N).astype(np.int32)
    out, _ = run("ld.global.u32 %r1, [%rd5];" + body, a, grid=2)
    total = ATOMICS[body](np.r_[a, a])
    assert out[0] == np.int64(total).astype(np.int32)


def test_atomic_gives_the_old_value():
    out, _ = run("mov.u32 %r1, tile; @%p1 bra E; setp.ne.u32 %p1, %r0, 0; @!%p1 st.shared.u32 [%r1], 5; E: bar.sync 0;"
                 "atom.shared.add.u32 %r9, [%r1], 1;" + STORE)  # fmt: skip
    np.testing.assert_array_equal(np.sort(out), np.arange(N) + 5)


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("size", [".m8n8.x4", ".x4.m8n8"])
def test_matrix_load_and_store(size, trans):
    """9.7.14.5.15 ldmatrix, 9.7.14.5.16 stmatrix: the one undoes the other; .trans swaps rows and columns of 16 bits.

    Sizes in the order of the ISA and in CUTLASS's.
    """
    data = np.arange(256, dtype=np.int16)
    body = f"""
      shl.b32 %r5, %r0, 4; mov.u32 %r6, tile; add.s32 %r6, %r6, %r5;
      mul.wide.u32 %rd9, %r0, 16; add.s64 %rd9, %rd0, %rd9;
      ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd9]; st.shared.v4.u32 [%r6], {{%r1, %r2, %r3, %r4}}; bar.sync 0;
      ldmatrix.sync.aligned{size}{trans}.shared.b16 {{%r11, %r12, %r13, %r14}}, [%r6];
      bar.sync 0; stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r6+1024], {{%r11, %r12, %r13, %r14}}; bar.sync 0;
      ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [%r6+1024];
      add.s64 %rd9, %rd3, %rd9; sub.s64 %rd9, %rd9, %rd0; st.global.v4.u32 [%rd9], {{%r1, %r2, %r3, %r4}};
    """
    out, result = run(body, data, block=32, outputs=128)
    matrices = data.reshape(4, 8, 8)
    expected = matrices.transpose(0, 2, 1) if trans else matrices
    np.testing.assert_array_equal(out.view(np.int16).reshape(4, 8, 8), expected)
    assert result.wavefronts == result.ideal_wavefronts


HINTS = [
    # 9.7.9 data movement: hints to the caches
    "prefetch.global.L2 [%rd5];",
    "prefetchu.L1 [%rd5];",
    "applypriority.global.L2::evict_normal [%rd0], 128;",
    "discard.global.L2 [%rd3], 128;",
    "createpolicy.fractional.L2::evict_last.b64 %rd9, 0f3F800000;",
    # 9.7.13 synchronisation: of grids that depend on each other
    "griddepcontrol.wait;",
    "griddepcontrol.launch_dependents;",
    # 9.7.19 miscellaneous
    "nanosleep.u32 20;",
    "pmevent 3;",
    "setmaxnreg.inc.sync.aligned.u32 64;",
]


@pytest.mark.parametrize("hint", HINTS)
def test_hint_changes_nothing(hint):
    """And 9.7.9 ldu, which reads as ld does."""
    out, _ = run(hint + "ldu.global.u32 %r9, [%rd5];" + STORE, A)
    np.testing.assert_array_equal(out, A)


def test_exit_ends_a_thread():
    """9.7.12 control flow: the lanes that are left go on, and a later barrier does not wait for the others."""
    out, _ = run("setp.lt.u32 %p1, %r0, 40; @%p1 exit; bar.sync 0; mov.u32 %r9, 7;" + STORE)
    np.testing.assert_array_equal(out, (np.arange(N) >= 40) * 7)


@pytest.mark.parametrize("opcode", ["trap", "brkpt"])
def test_trap_stops_the_kernel(opcode):
    """9.7.19 miscellaneous"""
    with pytest.raises(TrapError, match="line"):
        run(f"setp.eq.u32 %p1, %r0, 3; @%p1 {opcode};")


def test_every_instruction_has_a_test():
    """Each opcode that is lowered stands in the PTX of a test of this folder."""
    texts = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert [opcode for opcode in {*TABLE} - {"unsupported"} if not re.search(rf"\b{opcode}[.; \"]", texts)] == []
