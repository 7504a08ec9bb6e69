"""Each instruction on its own, and each check of the emulator seen to fire. Comments name the sections of the PTX ISA 8.8."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import (
    BarrierError,
    EmulatorError,
    MemoryFault,
    RaceError,
    UninitialisedMemory,
    UnsupportedInstruction,
)
from tests.ptx.harness import N, run


def words(*special):
    rng = np.random.default_rng(1)
    values = rng.integers(-(2**31), 2**31, N).astype(np.int32)
    values[: len(special)] = special
    return values


LOAD = "ld.global.u32 %r1, [%rd5]; ld.global.u32 %r2, [%rd6]; ld.global.u32 %r3, [%rd7];"
STORE = "st.global.u32 [%rd8], %r9;"
A = words(0, -1, 5, -(2**31), 2**31 - 1, 100)
B = words(7, 3, -3, 1, 2, -7)
U, V = A.view(np.uint32).astype(np.int64), B.view(np.uint32).astype(np.int64)
X, Y = A.astype(np.int64), B.astype(np.int64)


def byte(v, i):
    return v >> (8 * i) & 255


INTEGER = {
    # 9.7.1 integer arithmetic
    "add.s32 %r9, %r1, %r2;": X + Y,
    "sub.s32 %r9, %r1, %r2;": X - Y,
    "mul.lo.s32 %r9, %r1, %r2;": X * Y,
    "mul.hi.s32 %r9, %r1, %r2;": X * Y >> 32,
    "mul.hi.u32 %r9, %r1, %r2;": (U.astype(object) * V.astype(object)) >> 32,
    "mad.lo.s32 %r9, %r1, %r2, %r1;": X * Y + X,
    "mad.wide.s32 %rd9, %r1, %r2, %rd4; shr.u64 %rd9, %rd9, 8; cvt.u32.u64 %r9, %rd9;": X * Y + np.arange(N) * 4 >> 8,
    "min.s32 %r9, %r1, %r2;": np.minimum(X, Y),
    "max.u32 %r9, %r1, %r2;": np.maximum(U, V),
    "neg.s32 %r9, %r1;": -X,
    "abs.s32 %r9, %r2;": np.abs(Y),
    "div.s32 %r9, %r1, %r2;": np.trunc(X.astype(object) / Y).astype(np.int64),
    "rem.s32 %r9, %r1, %r2;": np.fmod(X, Y),
    "div.u32 %r9, %r1, %r2;": U // V,
    # 9.7.8 logic and shift; 9.7.1 bit fields
    "and.b32 %r9, %r1, %r2;": X & Y,
    "or.b32 %r9, %r1, -16;": X | -16,
    "xor.b32 %r9, %r1, %r2;": X ^ Y,
    "not.b32 %r9, %r1;": ~X,
    "shl.b32 %r9, %r1, 5;": X << 5,
    "shr.u32 %r9, %r1, 5;": U >> 5,
    "shr.s32 %r9, %r1, 40;": X >> 31,
    "shl.b32 %r9, %r1, 32;": X * 0,
    "bfe.u32 %r9, %r1, 7, 9;": U >> 7 & 511,
    "bfe.s32 %r9, %r1, 8, 8;": byte(X, 1).astype(np.int8),
    "bfi.b32 %r9, %r1, %r2, 8, 4;": (Y & ~0xF00) | (X & 15) << 8,
    # 9.7.9.7 prmt; 9.7.6 comparison and selection; 9.7.9 data movement and conversion
    "prmt.b32 %r9, %r1, %r2, 0x5410;": byte(U, 0) | byte(U, 1) << 8 | byte(V, 0) << 16 | byte(V, 1) << 24,
    "prmt.b32 %r9, %r1, %r2, 0x9180;": (
        byte(U, 0) | (byte(U, 0) > 127) * 0xFF00 | byte(U, 1) << 16 | (byte(U, 1) > 127) * 0xFF000000
    ),
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r9, 7, %r1, %p1;": np.where(X < Y, 7, X),
    "setp.ge.u32 %p1, %r1, %r2; not.pred %p2, %p1; selp.b32 %r9, 1, 0, %p2;": (U < V) * 1,
    "cvt.s32.s8 %r9, %r1;": A.astype(np.int8),
    "cvt.u16.u32 %h1, %r1; cvt.u32.u16 %r9, %h1;": U & 0xFFFF,
    "cvt.s64.s32 %rd9, %r1; shr.s64 %rd9, %rd9, 4; cvt.u32.u64 %r9, %rd9;": X >> 4,
    "mov.b64 %rd9, {%r1, %r2}; shr.u64 %rd9, %rd9, 16; cvt.u32.u64 %r9, %rd9;": U >> 16 | (V & 0xFFFF) << 16,
    "mov.b32 {%h1, %h2}, %r1; cvt.u32.u16 %r9, %h2;": U >> 16,
    "cvt.rn.f32.s32 %f1, %r1; mov.b32 %r9, %f1;": A.astype(np.float32).view(np.int32),
    "mov.u32 %r9, %laneid;": np.arange(N) % 32,
    "{ .reg .b32 %r1; mov.u32 %r1, 3; mov.u32 %r9, %r1; }": np.full(N, 3),
    "ld.global.nc.s8 %r9, [%rd5+1];": byte(X, 1).astype(np.int8),
    "ld.global.u8 %r9, [%rd5+3];": byte(U, 3),
    # 9.7.9.6 shfl; 9.7.12 control flow
    "shfl.sync.idx.b32 %r9|%p1, %r1, 5, 31, -1;": np.repeat(X[[5, 37]], 32),
    "shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;": X[np.arange(N) ^ 1],
    "setp.gt.s32 %p1, %r1, 0; mov.u32 %r9, 1; @%p1 bra L; mov.u32 %r9, 2; add.s32 %r9, %r9, 5; L: ;": np.where(X > 0, 1, 7),
}  # fmt: skip


@pytest.mark.parametrize("body", INTEGER)
def test_integer_instruction(body):
    out, _ = run(LOAD + body + STORE, A, B)
    expected = (np.asarray(INTEGER[body]).astype(object) % 2**32).astype(np.uint32).view(np.int32)
    np.testing.assert_array_equal(out, expected)


F = np.linspace(-300.25, 299, N).astype(np.float32)
F[:8] = [0.5, 1.5, 2.5, -0.5, np.nan, 1e20, -1e20, 3.3]
G = np.random.default_rng(2).standard_normal(N).astype(np.float32)
FLOAT = {  # 9.7.3 floating point, 9.7.9 conversion, 9.7.6 comparison
    "mul.rn.f32 %f3, %f1, %f2; mov.b32 %r9, %f3;": (F * G).view(np.int32),
    "add.rn.f32 %f3, %f1, %f2; mov.b32 %r9, %f3;": (F + G).view(np.int32),
    "add.f32 %f3, %f1, 0f3F000000; mov.b32 %r9, %f3;": (F + np.float32(0.5)).view(np.int32),
    "cvt.rni.s32.f32 %r9, %f1;": np.clip(np.rint(np.nan_to_num(F).astype(np.float64)), -(2**31), 2**31 - 1).astype(np.int32),
    "cvt.rzi.s32.f32 %r9, %f2;": np.trunc(G).astype(np.int32),
    "setp.lt.f32 %p1, %f1, %f2; selp.b32 %r9, 1, 0, %p1;": (F < G) * 1,
    "setp.gt.f32 %p1, %f1, %f2; selp.f32 %f3, %f1, %f2, %p1; mov.b32 %r9, %f3;": np.where(F > G, F, G).view(np.int32),
}  # fmt: skip


@pytest.mark.parametrize("body", FLOAT)
def test_float_instruction(body):
    out, _ = run("ld.global.f32 %f1, [%rd5]; ld.global.f32 %f2, [%rd6];" + body + STORE, F, G)
    np.testing.assert_array_equal(out, FLOAT[body])


def test_vectors_of_memory():
    """9.7.9 ld, of four elements"""
    body = "mul.wide.u32 %rd9, %r0, 12; add.s64 %rd5, %rd5, %rd9;"
    body += "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd5]; sub.s32 %r9, %r4, %r2;" + STORE
    source = np.arange(4 * N, dtype=np.int32) ** 2
    out, _ = run(body, source)
    np.testing.assert_array_equal(out, source[3::4] - source[1::4])


def fragment(matrix, row, k):
    """Four bytes of a row as a word."""
    return np.ascontiguousarray(matrix[row, k : k + 4]).view(np.int32)[0]


@pytest.mark.parametrize("kind", ["s8", "u8"])
@pytest.mark.parametrize("rows, depth", [(8, 16), (16, 32)])
def test_mma_against_the_isa(kind, rows, depth):
    """Fragments laid out as the PTX ISA's figures of m8n8k16 and m16n8k32 say (9.7.14.5)."""
    rng = np.random.default_rng(3)
    left = rng.integers(*((0, 256) if kind == "u8" else (-128, 128)), (rows, depth)).astype(np.uint8)
    right = rng.integers(-128, 128, (8, depth)).astype(np.int8)
    product = left.astype(np.int8 if kind == "s8" else np.uint8).astype(np.int64) @ right.astype(np.int64).T
    a, b, body = [], [], []
    pieces = [(0, 0)] if rows == 8 else [(0, 0), (8, 0), (0, 16), (8, 16)]
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        a.append([fragment(left, group + up, 4 * thread + k) for up, k in pieces])
        b.append([fragment(right, group, 4 * thread + k) for k in range(0, depth, 16)])
    operands = np.concatenate([np.array(a), np.array(b)], axis=1).T.copy()  # register, lane
    count = len(pieces)
    for i in range(len(operands)):
        body.append(f"ld.global.u32 %r{10 + i}, [%rd5+{i * 128}];")
    names = lambda first, n: "{" + ",".join(f"%r{first + i}" for i in range(n)) + "}"  # noqa: E731
    outputs = rows // 4
    body += [f"mov.u32 %r{20 + i}, {i};" for i in range(outputs)]
    shape = f"m{rows}n8k{depth}"
    c = names(20, outputs)
    body.append(f"mma.sync.aligned.{shape}.row.col.s32.{kind}.s8.s32 {names(20, outputs)}, {names(10, count)}, "
                f"{names(10 + count, depth // 16)}, {c};")  # fmt: skip
    for output in range(outputs):
        out, _ = run("\n".join(body) + f"mov.u32 %r9, %r{20 + output};" + STORE, operands, block=32)
        lane = np.arange(32)
        row, column = lane // 4 + 8 * (output // 2), lane % 4 * 2 + output % 2
        np.testing.assert_array_equal(out[:32], product[row, column] + output)


def test_ldmatrix():
    """9.7.14.5.15: lane l of a warp gets bytes 4 * (l % 4) and on of row l / 4 of every matrix."""
    body = "shl.b32 %r5, %r0, 2; mov.u32 %r6, tile; add.s32 %r6, %r6, %r5;" + LOAD
    body += "st.shared.u32 [%r6], %r1; st.shared.u32 [%r6+128], %r2; st.shared.u32 [%r6+256], %r3;"
    body += "bar.sync 0; and.b32 %r7, %r0, 31; shl.b32 %r7, %r7, 4; mov.u32 %r8, tile; add.s32 %r7, %r7, %r8;"
    body += "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r7]; mov.u32 %r9, %r12;"
    rows = [np.arange(i * 32, i * 32 + 32, dtype=np.int32) for i in range(3)]
    pad = [np.r_[row, row] for row in rows]
    body = "setp.lt.u32 %p1, %r0, 32;" + body.replace("st.shared.u32 [%r6+384]", "")
    full = body.replace("bar.sync 0;", "st.shared.u32 [%r6+384], %r3; bar.sync 0;")
    out, result = run(full + STORE, *pad, block=32)
    np.testing.assert_array_equal(out[:32], rows[2])
    assert result.wavefronts == result.ideal_wavefronts


SHARED = "shl.b32 %r5, %r0, 2; mov.u32 %r6, tile; add.s32 %r6, %r6, %r5;"
SWAP = "xor.b32 %r7, %r5, 128; mov.u32 %r8, tile; add.s32 %r7, %r7, %r8;"  # the other warp's word
FILLED = "st.shared.u32 [%r6], %r0; bar.sync 0;"
ASYNC = "cp.async.ca.shared.global [%r6], [%rd5], 4, 4; cp.async.commit_group;"


def test_barrier_orders_warps():
    """9.7.13 bar"""
    body = SHARED + SWAP + "st.shared.u32 [%r6], %r0; bar.sync 0; ld.shared.u32 %r9, [%r7];" + STORE
    out, _ = run(body)
    np.testing.assert_array_equal(out, np.arange(N) ^ 32)


def test_async_copy_and_wait():
    """9.7.9.25 asynchronous copies"""
    body = SHARED + SWAP + ASYNC + "cp.async.wait_group 0; bar.sync 0; ld.shared.u32 %r9, [%r7];" + STORE
    out, _ = run(body, A)
    np.testing.assert_array_equal(out, A[np.arange(N) ^ 32])


def test_async_copy_of_nothing_gives_zeros_and_reads_nothing():
    body = SHARED + "mov.u32 %r1, 0; mov.u64 %rd9, 64; cp.async.ca.shared.global [%r6], [%rd9], 4, %r1;"
    out, _ = run(body + "cp.async.commit_group; cp.async.wait_group 0; ld.shared.u32 %r9, [%r6];" + STORE)
    assert not out.any()


FAULTS = {
    "no barrier": (RaceError, SHARED + SWAP + FILLED + "st.shared.u32 [%r6], %r0; ld.shared.u32 %r9, [%r7];"),
    "overwritten too early": (
        RaceError,
        SHARED + SWAP + "st.shared.u32 [%r6], %r0; bar.sync 0; ld.shared.u32 %r9, [%r7]; st.shared.u32 [%r6], %r9;",
    ),
    "two writers": (RaceError, SHARED + SWAP + "st.shared.u32 [%r6], %r0; st.shared.u32 [%r7], %r0;"),
    "no wait": (RaceError, SHARED + ASYNC + "bar.sync 0; ld.shared.u32 %r9, [%r6];"),
    "wait too weak": (RaceError, SHARED + ASYNC + "cp.async.wait_group 1; bar.sync 0; ld.shared.u32 %r9, [%r6];"),
    "wait but no barrier": (
        RaceError,
        SHARED + SWAP + FILLED + ASYNC + "cp.async.wait_group 0; ld.shared.u32 %r9, [%r7];",
    ),
    "never written": (UninitialisedMemory, SHARED + "ld.shared.u32 %r9, [%r6];"),
    "shared bounds": (MemoryFault, SHARED + "st.shared.u32 [%r6+32768], %r0;"),
    "shared alignment": (MemoryFault, SHARED + "st.shared.u16 [%r6+1], %r0;"),
    "global bounds": (MemoryFault, "ld.global.u32 %r9, [%rd5+4];"),
    "global alignment": (MemoryFault, "ld.global.u32 %r9, [%rd5+2];"),
    "store bounds": (MemoryFault, "st.global.u32 [%rd8+256], %r0;"),
    "one thread too far": (MemoryFault, "setp.eq.s32 %p1, %r0, 63; @%p1 ld.global.u8 %r9, [%rd5+4];"),
    "barrier in part of a warp": (BarrierError, "setp.eq.s32 %p1, %r0, 3; @%p1 bar.sync 0;"),
    "unknown instruction": (UnsupportedInstruction, "vmad.u32.u32.u32 %r9, %r0, %r0, %r0;"),
    "unknown modifier": (UnsupportedInstruction, "add.sat.u32 %r9, %r0, %r0;"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_reported_with_its_line(name):
    error, body = FAULTS[name]
    with pytest.raises(error) as caught:
        run(body + STORE, A, B)
    assert isinstance(caught.value, EmulatorError) and "line " in str(caught.value)


def test_blocks_have_their_own_barriers_and_memory():
    """Blocks of different length: block 1 passes its barriers while block 0 loops on."""
    body = (
        SHARED
        + SWAP
        + """
      mov.u32 %r20, %ctaid.x; mov.u32 %r9, %r0; mov.u32 %r21, 0; shl.b32 %r22, %r20, 1; sub.s32 %r22, 4, %r22;
    L: st.shared.u32 [%r6], %r9; bar.sync 0; ld.shared.u32 %r9, [%r7]; add.s32 %r9, %r9, 1; bar.sync 0;
      add.s32 %r21, %r21, 1; setp.lt.s32 %p1, %r21, %r22; @%p1 bra L;
      mul.lo.s32 %r23, %r20, 256; cvt.u64.u32 %rd9, %r23; add.s64 %rd8, %rd8, %rd9;
    """
    )
    out, _ = run(body + STORE, grid=2)
    expected = np.r_[np.arange(N) + 4, np.arange(N) + 2]
    np.testing.assert_array_equal(out, expected)
