"""What the emulator looks for, and what it must not take for an error. PTX ISA 8.8: 9.7.9.25, 9.7.13, chapter 8."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptx import (
    BarrierError,
    DeadlockError,
    EmulatorError,
    GlobalMemory,
    MemoryFault,
    RaceError,
    TrapError,
    UninitialisedMemory,
    emulate,
    load,
)
from tests.ptx.harness import HEADER, N, run

STORE = "st.global.u32 [%rd8], %r9;"
MINE = "shl.b32 %r5, %r0, 2; mov.u32 %r6, tile; add.s32 %r6, %r6, %r5;"  # address of this thread's word
OTHER = "xor.b32 %r7, %r5, 128; mov.u32 %r8, tile; add.s32 %r7, %r7, %r8;"  # of the other warp's
NEXT = "xor.b32 %r7, %r5, 4; mov.u32 %r8, tile; add.s32 %r7, %r7, %r8;"  # of the neighbouring lane's
FIRST = "setp.ne.u32 %p1, %r0, 0;"
BAR = "mov.u32 %r20, tile; add.s32 %r20, %r20, 8192;"  # address of an mbarrier
INIT = BAR + FIRST + "@!%p1 mbarrier.init.shared::cta.b64 [%r20], {count}; bar.sync 0;"
WAIT = "W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r20], {parity}; @!%p2 bra W;"
BULK = """
  @!%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], {expected};
  mov.u32 %r21, tile;
  @!%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r21], [%rd0], 256, [%r20];
"""
FILL = MINE + "st.shared.u32 [%r6], %r0; bar.sync 0;"
A = np.arange(N, dtype=np.int32) * 3 + 1


def test_lanes_of_a_warp_are_ordered_by_bar_warp():
    body = MINE + NEXT + "st.shared.u32 [%r6], %r0; bar.warp.sync -1; ld.shared.u32 %r9, [%r7]; bar.warp.sync -1;"
    out, _ = run(body + "st.shared.u32 [%r6], %r9;" + STORE)
    np.testing.assert_array_equal(out, np.arange(N) ^ 1)


def test_mbarrier_orders_warps():
    """9.7.13.15: warp 1 reads what warp 0 wrote, after warp 0 has arrived."""
    body = INIT.format(count=32) + MINE + "mov.u32 %r9, 0; setp.ge.u32 %p3, %r0, 32; @%p3 bra R;"
    body += "st.shared.u32 [%r6], %r0; mbarrier.arrive.shared::cta.b64 %rd9, [%r20]; bra E;"
    body += "R:" + WAIT.format(parity=0) + "ld.shared.u32 %r9, [%r6+-128]; E:"
    out, _ = run(body + STORE)
    np.testing.assert_array_equal(out, np.r_[np.zeros(32), np.arange(32)])


def test_bulk_copy_waits_for_its_bytes():
    body = INIT.format(count=1) + MINE + BULK.format(expected=256) + WAIT.format(parity=0) + "ld.shared.u32 %r9, [%r6];"
    out, result = run(body + STORE, A)
    np.testing.assert_array_equal(out, A)
    assert result.bytes_in_flight == 256


def test_bulk_store():
    body = MINE + "st.shared.u32 [%r6], %r0; fence.proxy.async.shared::cta; bar.sync 0; mov.u32 %r21, tile;" + FIRST
    body += "@!%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd3], [%r21], 256; @!%p1 cp.async.bulk.commit_group;"
    out, _ = run(body + "@!%p1 cp.async.bulk.wait_group 0;")
    np.testing.assert_array_equal(out, np.arange(N))


def test_asynchronous_copies_arrive_at_an_mbarrier():
    body = INIT.format(count=64) + MINE + OTHER + "cp.async.ca.shared.global [%r6], [%rd5], 4;"
    body += (
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r20];" + WAIT.format(parity=0) + "ld.shared.u32 %r9, [%r7];"
    )
    out, _ = run(body + STORE, A)
    np.testing.assert_array_equal(out, A[np.arange(N) ^ 32])


def test_phases_of_an_mbarrier():
    """Three rounds of exchange, each warp waiting for the parity of its round."""
    body = INIT.format(count=64) + MINE + OTHER + "mov.u32 %r9, %r0; mov.u32 %r22, 0; mov.u32 %r23, 0;"
    body += "L: st.shared.u32 [%r6], %r9; mbarrier.arrive.shared::cta.b64 %rd9, [%r20]; and.b32 %r24, %r23, 1;"
    body += "W: mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r20], %r24; @!%p2 bra W; ld.shared.u32 %r9, [%r7];"
    body += "add.s32 %r9, %r9, 1; add.s32 %r23, %r23, 1; mbarrier.arrive.shared::cta.b64 %rd9, [%r20]; and.b32 %r24, %r23, 1;"
    body += "V: mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r20], %r24; @!%p2 bra V;"
    body += "add.s32 %r23, %r23, 1; add.s32 %r22, %r22, 1; setp.lt.s32 %p3, %r22, 3; @%p3 bra L;"
    out, _ = run(body + STORE)
    np.testing.assert_array_equal(out, (np.arange(N) ^ 32) + 3)


def test_named_barriers_of_some_warps():
    """bar.arrive and bar.sync of 64 threads in a block of 96: the third warp goes its own way."""
    body = (
        MINE
        + "mov.u32 %r9, 0; shr.u32 %r1, %r0, 5; setp.eq.u32 %p1, %r1, 2; @%p1 bra E; setp.eq.u32 %p2, %r1, 1; @%p2 bra R;"
    )
    body += "st.shared.u32 [%r6], %r0; bar.arrive 3, 64; bra E; R: bar.sync 3, 64; ld.shared.u32 %r9, [%r6+-128]; E:"
    out, _ = run(body + STORE, block=96)
    np.testing.assert_array_equal(out, np.r_[np.zeros(32), np.arange(32), np.zeros(32)])


def test_lanes_that_took_different_ways_meet_at_a_warp_wide_instruction():
    body = (
        "setp.lt.u32 %p1, %r0, 7; mov.u32 %r1, 5; @%p1 bra A; mov.u32 %r1, 6; A: shfl.sync.idx.b32 %r9, %r1, 9, 31, -1;"
    )
    out, _ = run(body + STORE)
    assert (out == np.repeat([6, 6], 32)).all()


SAME = "and.b32 %r21, %r0, {mask}; and.b32 %r22, %r0, 31; shl.b32 %r22, %r22, 2; mov.u32 %r6, tile; add.u32 %r6, %r6, %r22;"


def test_two_warps_may_write_one_value():
    """As Triton's do where both hold it; compute-sanitizer takes such writes for no error either."""
    out, _ = run(SAME.format(mask=31) + "st.shared.u32 [%r6], %r21; bar.sync 0; ld.shared.u32 %r9, [%r6];" + STORE)
    np.testing.assert_array_equal(out, np.arange(N) % 32)


def test_two_warps_may_write_halves_of_a_word():
    body = (
        "and.b32 %r21, %r0, 31; shl.b32 %r21, %r21, 2; shr.u32 %r22, %r0, 5; shl.b32 %r22, %r22, 1; mov.u32 %r6, tile;"
    )
    body += "add.u32 %r6, %r6, %r21; add.u32 %r7, %r6, %r22; cvt.u16.u32 %h1, %r0; st.shared.v2.b8 [%r7], {%h1, %h1};"
    out, _ = run(body + "bar.sync 0; ld.shared.u32 %r9, [%r6];" + STORE)
    lane = np.arange(N) % 32
    np.testing.assert_array_equal(out, lane * 0x0101 + (lane + 32) * 0x01010000)


FAULTS = {
    "two warps, two values": (RaceError, "is written that warp", SAME.format(mask=63) + "st.shared.u32 [%r6], %r21;"),
    "one value, read before the barrier": (
        RaceError,
        "is read that warp",
        SAME.format(mask=31) + "st.shared.u32 [%r6], %r21; ld.shared.u32 %r9, [%r6];",
    ),
    "lanes without bar.warp": (RaceError, "lane", MINE + NEXT + "st.shared.u32 [%r6], %r0; ld.shared.u32 %r9, [%r7];"),
    "lane overwrites another's read": (
        RaceError,
        "another lane",
        MINE + NEXT + "st.shared.u32 [%r6], %r0; bar.warp.sync -1; ld.shared.u32 %r9, [%r7]; st.shared.u32 [%r6], %r9;",
    ),
    "one address, two values": (RaceError, "different values", "mov.u32 %r6, tile; st.shared.u32 [%r6], %r0;"),
    "mbarrier not initialised": (
        UninitialisedMemory,
        "mbarrier",
        BAR + "mbarrier.arrive.shared::cta.b64 %rd9, [%r20];",
    ),
    "mbarrier used before the block knows of it": (
        RaceError,
        "initialisation",
        (INIT.format(count=64) + "mbarrier.arrive.shared::cta.b64 %rd9, [%r20];").replace("bar.sync 0;", ""),
    ),
    "mbarrier not waited for": (
        RaceError,
        "no synchronisation",
        INIT.format(count=32)
        + FILL
        + OTHER
        + "setp.ge.u32 %p3, %r0, 32; @%p3 bra R; st.shared.u32 [%r6], %r0;"
        + "mbarrier.arrive.shared::cta.b64 %rd9, [%r20]; bra E; R: ld.shared.u32 %r9, [%r7]; E:",
    ),
    "mbarrier waited for in the wrong phase": (
        RaceError,
        "on its way|no synchronisation",
        INIT.format(count=1) + FILL + BULK.format(expected=512) + WAIT.format(parity=1) + "ld.shared.u32 %r9, [%r6];",
    ),
    "more arrivals than expected": (
        BarrierError,
        "more arrivals",
        INIT.format(count=20) + "mbarrier.arrive.shared::cta.b64 %rd9, [%r20], 7;",
    ),
    "bytes that never come": (
        DeadlockError,
        "never",
        INIT.format(count=1) + MINE + BULK.format(expected=512) + WAIT.format(parity=0) + "ld.shared.u32 %r9, [%r6];",
    ),
    "bulk copy not waited for": (
        RaceError,
        "still on its way",
        INIT.format(count=1) + FILL + BULK.format(expected=256) + "ld.shared.u32 %r9, [%r6];",
    ),
    "bulk copy of an odd size": (
        MemoryFault,
        "16",
        (INIT.format(count=1) + BULK.format(expected=256)).replace("], 256", "], 100"),
    ),
    "source of a bulk store overwritten": (
        RaceError,
        "asynchronous",
        FILL
        + "mov.u32 %r21, tile;"
        + FIRST
        + "@!%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd3], [%r21], 256; @!%p1 cp.async.bulk.commit_group;"
        + "bar.sync 0; st.shared.u32 [%r6], %r0;",
    ),
    "a copy's words overwritten": (
        RaceError,
        "on its way",
        MINE + "cp.async.ca.shared.global [%r6], [%rd5], 4; cp.async.commit_group; st.shared.u32 [%r6], 1;",
    ),
    "barrier that one warp skips": (
        DeadlockError,
        "never reach",
        "setp.ge.u32 %p1, %r0, 32; @%p1 bra S; bar.sync 1, 64; S:",
    ),
    "barrier of half a warp": (
        BarrierError,
        "part of a warp",
        "setp.ge.u32 %p1, %r0, 16; @%p1 bra S; bar.sync 0; S: mov.u32 %r9, 1;",
    ),
    "barrier of odd threads": (BarrierError, "whole warps", "bar.sync 1, 40;"),
    "mma in half a warp": (
        BarrierError,
        "not all lanes",
        "setp.ge.u32 %p1, %r0, 16; @%p1 bra S;"
        "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%r1,%r2},{%r3},{%r4},{%r1,%r2}; S:",
    ),
    "shuffle that lanes never reach": (
        BarrierError,
        "diverged",
        "setp.ge.u32 %p1, %r0, 16; @%p1 bra S; shfl.sync.idx.b32 %r9, %r0, 1, 31, -1; S: bar.warp.sync -1;",
    ),
    "endless loop": (DeadlockError, "not ended", "L: add.s32 %r9, %r9, 1; bra L;"),
    "polling for nobody": (DeadlockError, "never happens|not ended", INIT.format(count=99) + WAIT.format(parity=0)),
    "local bounds": (MemoryFault, "local", ".local .align 4 .b8 d[8]; st.local.u32 [d+8], %r0;"),
    "local uninitialised": (UninitialisedMemory, "local", ".local .align 4 .b8 d[8]; ld.local.u32 %r9, [d+4];"),
    "generic out of bounds": (MemoryFault, "out of bounds", "mov.u64 %rd9, 16; ld.u32 %r9, [%rd9];"),
    "ldmatrix misaligned": (
        MemoryFault,
        "misaligned",
        "mov.u32 %r6, tile; add.s32 %r6, %r6, 8; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r6];",
    ),
    "trap": (TrapError, "trap", "setp.eq.u32 %p1, %r0, 40; @%p1 trap;"),
    "division by zero": (EmulatorError, "zero", "mov.u32 %r1, 0; div.u32 %r9, %r0, %r1;"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name):
    error, pattern, body = FAULTS[name]
    with pytest.raises(error, match=pattern) as caught:
        run(body + STORE, A, max_instructions=100_000)
    assert "block (0, 0, 0)" in str(caught.value) and "; line " in str(caught.value)


BLOCKS = "mov.u32 %r20, %ctaid.x; "
#: Blocks add up their words and count themselves in by thread 0; the second reads the sums.
TICKET = (
    BLOCKS
    + "mov.u32 %r21, tile; setp.eq.u32 %p1, %r0, 0; setp.eq.u32 %p2, %r20, 1; mov.pred %p3, 1; {who}"
    + "@%p3 red.global.add.s32 [%rd8], 1; {barrier}"
    + "@%p1 membar.gl; @%p1 atom.global.add.u32 %r1, [%rd0], 1; bar.sync 0; @%p2 ld.global.u32 %r9, [%rd8];"
)
WARP = "setp.lt.u32 %p3, %r0, 32;"
ORDER = {
    "two blocks write one word": (RaceError, BLOCKS + "st.global.u32 [%rd8], %r20;"),
    "a block reads another's word": (
        RaceError,
        BLOCKS + "setp.eq.u32 %p1, %r20, 0; @%p1 st.global.u32 [%rd8], 7; @!%p1 ld.global.u32 %r9, [%rd8];",
    ),
    "a block overwrites what another reads": (
        RaceError,
        BLOCKS + "setp.eq.u32 %p1, %r20, 1; @%p1 st.global.u32 [%rd5], 7; @!%p1 ld.global.u32 %r9, [%rd5];",
    ),
    "an atomic meets a store": (
        RaceError,
        BLOCKS + "setp.eq.u32 %p1, %r20, 1; @%p1 st.global.u32 [%rd8], 7; @!%p1 red.global.add.u32 [%rd8], 1;",
    ),
    "an atomic without a fence publishes nothing": (
        RaceError,
        BLOCKS
        + "setp.eq.u32 %p1, %r20, 0; @%p1 st.global.u32 [%rd8], 7; @%p1 red.global.add.u32 [%rd0], 1;"
        + "@!%p1 atom.global.add.u32 %r1, [%rd0], 0; @!%p1 ld.global.u32 %r9, [%rd8];",
    ),
    "two warps of a block write one word": (
        RaceError,
        "and.b32 %r1, %r0, 31; mul.wide.u32 %rd9, %r1, 4; add.s64 %rd9, %rd9, %rd3;"
        + BLOCKS
        + "mul.wide.u32 %rd10, %r20, 256; add.s64 %rd9, %rd9, %rd10; st.global.u32 [%rd9], 1;",
    ),
    "two lanes of a warp write one word": (RaceError, "st.global.u32 [%rd3], 1;"),
    "a barrier orders the block's writes": (
        None,
        BLOCKS
        + "mul.wide.u32 %rd10, %r20, 256; add.s64 %rd8, %rd8, %rd10; st.global.u32 [%rd8], 1; bar.sync 0;"
        + "xor.b32 %r1, %r0, 33; mul.wide.u32 %rd9, %r1, 4; add.s64 %rd9, %rd9, %rd3; add.s64 %rd9, %rd9, %rd10;"
        + "ld.global.u32 %r2, [%rd9]; st.global.u32 [%rd9], 2;",
    ),
    "atomics alone": (None, "red.global.add.u32 [%rd8], 1;"),
    "a fence and an atomic order blocks": (
        None,
        BLOCKS
        + "setp.eq.u32 %p1, %r20, 0; @%p1 st.global.u32 [%rd8], 7; membar.gl; bar.sync 0;"
        + "atom.global.add.u32 %r1, [%rd0], 1; @!%p1 ld.global.u32 %r9, [%rd8];",
    ),
    "a barrier before the ticket": (None, TICKET.format(who="", barrier="bar.sync 0;")),
    "no barrier before the ticket": (RaceError, TICKET.format(who="", barrier="")),
    "a warp's barrier is not the block's": (RaceError, TICKET.format(who="", barrier="bar.warp.sync -1;")),
    "a warp's barrier before the ticket": (None, TICKET.format(who=WARP, barrier="bar.warp.sync -1;")),
    "no warp's barrier before the ticket": (RaceError, TICKET.format(who=WARP, barrier="")),
    "each thread releases what it wrote": (
        None,
        "red.global.add.s32 [%rd8], 1; membar.gl; atom.global.add.u32 %r1, [%rd0], 1; bar.sync 0;"
        + BLOCKS
        + "setp.eq.u32 %p1, %r20, 1; @%p1 ld.global.u32 %r9, [%rd8];",
    ),
    "release and acquire order blocks": (
        None,
        BLOCKS
        + "setp.eq.u32 %p1, %r20, 0; @%p1 st.global.u32 [%rd8], 7; @%p1 st.release.gpu.global.u32 [%rd5], 1;"
        + "@!%p1 ld.acquire.gpu.global.u32 %r1, [%rd5]; @!%p1 ld.global.u32 %r9, [%rd8];",
    ),
}


@pytest.mark.parametrize("name", ORDER)
def test_order_between_blocks(name):
    error, body = ORDER[name]
    if error is None:
        run(body, A, grid=2)
    else:
        with pytest.raises(error, match="order"):
            run(body, A, grid=2)


#: Block 0 gives a word to block 1, and that another one to block 2, which reads what block 0 wrote.
PASSED_ON = (
    BLOCKS
    + "setp.eq.u32 %p1, %r20, 0; setp.eq.u32 %p2, %r20, 1; setp.eq.u32 %p3, %r20, 2; setp.eq.and.u32 %p4, %r0, 0, %p1;"
    + "setp.eq.and.u32 %p5, %r0, 0, %p2; @%p1 st.global.u32 [%rd8], 7; {barrier} membar.gl;"
    + "@%p4 atom.global.add.u32 %r1, [%rd0], 1; @%p5 atom.global.add.u32 %r1, [%rd0], 1;"
    + "@%p5 atom.global.add.u32 %r1, [%rd0+4], 1; @%p3 atom.global.add.u32 %r1, [%rd0+4], 1; @%p3 ld.global.u32 %r9, [%rd8];"
)


def test_what_a_block_knows_is_passed_on():
    """And what wasn't released isn't."""
    run(PASSED_ON.format(barrier="bar.sync 0;"), A, grid=3)
    with pytest.raises(RaceError, match="block 2 reads what block 0 writes"):
        run(PASSED_ON.format(barrier=""), A, grid=3)


KERNEL = """
.version 8.0
.target sm_80
.address_size 64
.file 1 "scale.cu"
.func (.param .b32 result) twice(.param .b32 value)
{
  .reg .b32 %r<3>;
  ld.param.u32 %r1, [value];
  setp.lt.s32 %p1, %r1, 0; @%p1 bra $L1;
  shl.b32 %r1, %r1, 1;
$L1: st.param.b32 [result], %r1;
  ret;
}
.visible .entry scale(.param .u64 .ptr .align 4 x, .param .u64 out, .param .f32 factor, .param .u32 n)
.maxntid 64, 1, 1
{
  .reg .pred %p<2>; .reg .b32 %r<8>; .reg .f32 %f<4>; .reg .b64 %rd<8>;
  ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [out]; ld.param.f32 %f1, [factor]; ld.param.u32 %r1, [n];
  mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mov.u32 %r4, %tid.x;
  mad.lo.s32 %r5, %r2, %r3, %r4; setp.ge.u32 %p1, %r5, %r1;
  @%p1 bra $L1;
  mul.wide.u32 %rd3, %r5, 4; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
  .loc 1 7 3
  ld.global.u32 %r6, [%rd4];
  { .param .b32 p0; .param .b32 r0; st.param.b32 [p0], %r6; call.uni (r0), twice, (p0); ld.param.b32 %r7, [r0]; }
  .loc 1 8 3
  cvt.rn.f32.s32 %f2, %r7; mul.f32 %f3, %f2, %f1;
  st.global.f32 [%rd5], %f3;
$L1: ret;
}
""".replace("  .reg .b32 %r<3>;\n  ld", "  .reg .b32 %r<3>; .reg .pred %p<2>;\n  ld")


def test_launch_with_tensors_reads_like_the_real_thing():
    x, out = torch.arange(-3, 97, dtype=torch.int32), torch.full((100,), -1.0)
    result = emulate(load(KERNEL, "scale"), grid=2, block=64, args=[x, out, 0.25, 100])
    assert torch.equal(out, torch.where(x < 0, x, 2 * x) * 0.25)
    assert result.instructions["mul.f32"] == 4 and result.blocks == 2


def test_call_is_inlined_with_names_of_its_own():
    """The function's %r1, %p1 and $L1 are not the kernel's."""
    x, out = torch.tensor([-5, 6], dtype=torch.int32), torch.zeros(2)
    emulate(load(KERNEL, "scale"), 1, 32, [x, out, 1.0, 2])
    assert out.tolist() == [-5.0, 12.0]


def test_sample_of_a_grid():
    x, out = torch.arange(256, dtype=torch.int32), torch.full((256,), -1.0)
    result = emulate(load(KERNEL, "scale"), 4, 64, [x, out, 0.5, 256], blocks=[1, 3])
    assert torch.equal(out.reshape(4, 64)[:, 0] >= 0, torch.tensor([False, True, False, True])) and result.blocks == 2


def test_partial_warp():
    x, out = torch.arange(40, dtype=torch.int32), torch.full((41,), -1.0)
    emulate(load(KERNEL, "scale"), 1, 40, [x, out, 0.5, 64])
    assert torch.equal(out[:40], x.float()) and out[40] == -1


def test_counters_by_line():
    x, out = torch.arange(128, dtype=torch.int32), torch.zeros(128)
    result = emulate(load(KERNEL, "scale"), 2, 64, [x, out, 1.0, 128])
    lines = result.lines(source=True)
    loads, stores = lines["scale.cu", 7], lines["scale.cu", 8]
    assert loads["requests"] == stores["requests"] == 4  # warps
    assert loads["sectors"] == 4 * 4 and loads["bytes"] == 512 and loads["dram_sectors"] == 16
    assert sum(line["warps"] for line in result.lines().values()) == result.warp_instructions
    assert result.divergence == 0 and result.classes["load global"] == 4


def test_cache_model():
    """One line read by all blocks: from DRAM once, from L2 by each block once, the second read of a block from L1."""
    body = "ld.global.u32 %r1, [%rd0]; ld.global.u32 %r2, [%rd0]; ld.global.cg.u32 %r3, [%rd0];"
    _, result = run(body, A, grid=3, block=32)
    assert result.sectors == 9 and result.l2_bytes == 32 * 6 and result.dram_bytes == 32


def test_bank_conflicts_and_divergence():
    body = "shl.b32 %r5, %r0, 8; mov.u32 %r6, tile; add.s32 %r6, %r6, %r5;"
    body += "setp.lt.u32 %p1, %r0, 8; @%p1 st.shared.u32 [%r6], %r0;"
    _, result = run(body, block=32)
    assert (result.wavefronts, result.ideal_wavefronts) == (8, 1)
    assert result.divergence == pytest.approx(24 / (32 * result.warp_instructions))


def test_output_must_be_written_before_it_is_read():
    memory = GlobalMemory()
    out = torch.zeros(N, dtype=torch.int32)
    pointers = [memory.allocate(A), 0, 0, memory.pointer(out, written=False)]
    text = HEADER + "ld.global.u32 %r9, [%rd8]; ret; }"
    with pytest.raises(UninitialisedMemory, match="global"):
        emulate(text, 1, N, pointers, memory=memory)
    emulate(HEADER + "st.global.u32 [%rd8], %r0; ld.global.u32 %r9, [%rd8]; ret; }", 1, N, pointers, memory=memory)
    assert torch.equal(out, torch.arange(N, dtype=torch.int32))


def test_views_of_one_storage_share_it():
    base = torch.arange(130, dtype=torch.int32)
    out = torch.zeros(64)
    emulate(load(KERNEL, "scale"), 1, 64, [base[1:65], out, 0.5, 64])
    assert torch.equal(out, base[1:65].float())


@pytest.mark.parametrize("bad, pattern", [([1, 2, 3, 4, 5], "takes 4"), ([b"12", 0, 0.0, 0], "2 bytes")])
def test_bad_arguments_are_refused(bad, pattern):
    with pytest.raises(EmulatorError, match=pattern):
        emulate(load(KERNEL, "scale"), 1, 32, bad)
