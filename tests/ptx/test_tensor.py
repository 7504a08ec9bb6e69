"""Tensor-core instructions: fragments laid out as a second source says, CuTe's traits, and multiplied by numpy.

PTX ISA 8.8, 9.7.14.5 (mma), 9.7.14.6 (mma.sp), 9.7.15 (wgmma).
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import RaceError, UnsupportedInstruction, cute
from tests.ptx.harness import run

needs_cute = pytest.mark.skipif(
    cute.headers() is None, reason="the wheel nvidia-cutlass is not installed: extra 'gpu-lab'"
)
SM80, SPARSE90, SPARSE120 = "mma_traits_sm80.hpp", "mma_traits_sm90_gmma_sparse.hpp", "mma_traits_sm120_sparse.hpp"
BITS = {"s8": 8, "u8": 8, "f16": 16, "bf16": 16, "tf32": 32, "s32": 32, "f32": 32}


def encode(values, kind):
    """Values as the bits of a type, in unsigned integers of its size."""
    if kind in ("s8", "u8"):
        return values.astype(np.int64).astype(np.uint8)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    if kind == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.int32).view(np.uint32) if kind == "s32" else values.astype(np.float32).view(np.uint32)


def draw(rng, kind, shape):
    """Values that the type holds exactly, and whose products add up exactly."""
    low, high = {"s8": (-128, 128), "u8": (0, 256)}.get(kind, (-16, 17))
    return rng.integers(low, high, shape)


def registers(matrix, places, kind):
    """(registers, 32) words: the elements of each lane, in order, packed."""
    words = []
    for lane in places:
        bits = encode(np.array([matrix[p] for p in lane]), kind)
        words.append(np.ascontiguousarray(bits).view(np.uint32))
    return np.array(words).T.copy()


def names(first, count):
    return "{" + ",".join(f"%r{first + i}" for i in range(count)) + "}"


def multiply(opcode, a, b, c, tail=()):
    """Run an mma on registers (count, 32); the output registers."""
    operands = np.concatenate([a, b, c, *tail]).astype(np.uint32)
    body = [f"ld.global.u32 %r{10 + i}, [%rd5+{i * 128}];" for i in range(len(operands))]
    first = [10, 10 + len(a), 10 + len(a) + len(b)]
    extra = f", %r{first[2] + len(c)}, {opcode.split('@')[1]}" if tail else ""
    sources = ", ".join(names(at, len(x)) for at, x in zip(first, (a, b, c), strict=True))
    body.append(f"{opcode.split('@')[0]} {names(60, len(c))}, {sources}{extra};")
    body += [f"st.global.u32 [%rd8+{i * 128}], %r{60 + i};" for i in range(len(c))]
    out, result = run("\n".join(body), operands, block=32, outputs=32 * len(c))
    return out.view(np.uint32).reshape(len(c), 32), result


def operands_of(kinds, m, k, places, rng):
    """Random a (m, k), b (8, k), c (m, 8), and their registers."""
    a, b, c = draw(rng, kinds[1], (m, k)), draw(rng, kinds[2], (8, k)), draw(rng, "f16", (m, 8))
    return a, b, c, [registers(x, p, kind) for x, p, kind in zip((a, b, c), places, kinds[1:], strict=True)]


DENSE = [  # CuTe's operation, types of d, a, b, c
    ("SM80_8x8x16_S32S8S8S32_TN", ("s32", "s8", "s8", "s32")),
    ("SM80_8x8x16_S32U8S8S32_TN", ("s32", "u8", "s8", "s32")),
    ("SM80_16x8x16_S32S8S8S32_TN", ("s32", "s8", "s8", "s32")),
    ("SM80_16x8x32_S32S8S8S32_TN", ("s32", "s8", "s8", "s32")),
    ("SM80_16x8x32_S32U8S8S32_TN", ("s32", "u8", "s8", "s32")),
    ("SM80_16x8x32_S32S8U8S32_TN", ("s32", "s8", "u8", "s32")),
    ("SM80_16x8x32_S32U8U8S32_TN", ("s32", "u8", "u8", "s32")),
    ("SM80_16x8x8_F16F16F16F16_TN", ("f16", "f16", "f16", "f16")),
    ("SM80_16x8x16_F16F16F16F16_TN", ("f16", "f16", "f16", "f16")),
    ("SM80_16x8x8_F32F16F16F32_TN", ("f32", "f16", "f16", "f32")),
    ("SM80_16x8x16_F32F16F16F32_TN", ("f32", "f16", "f16", "f32")),
    ("SM80_16x8x16_F32BF16BF16F32_TN", ("f32", "bf16", "bf16", "f32")),
    ("SM80_16x8x4_F32TF32TF32F32_TN", ("f32", "tf32", "tf32", "f32")),
    ("SM80_16x8x8_F32TF32TF32F32_TN", ("f32", "tf32", "tf32", "f32")),
]
BASE = {  # the traits from which one inherits its layouts
    "S32U8S8S32": "S32S8S8S32", "S32S8U8S32": "S32S8S8S32", "S32U8U8S32": "S32S8S8S32", "F32F16F16F32": "F16F16F16F16",
    "F32BF16BF16F32": "F16F16F16F16",
}  # fmt: skip


def dense_places(operation):
    _, shape, types, _ = operation.split("_")
    m, _, k = (int(v) for v in shape.split("x"))
    struct = f"SM80_{shape}_{BASE.get(types, types)}_TN"
    return m, k, [cute.positions(SM80, struct, f"{x}Layout", rows) for x, rows in (("A", m), ("B", 8), ("C", m))]


@needs_cute
@pytest.mark.parametrize("operation, kinds", DENSE)
def test_mma_against_cute(operation, kinds):
    rng = np.random.default_rng(5)
    m, k, places = dense_places(operation)
    a, b, c, words = operands_of(kinds, m, k, places, rng)
    out, result = multiply(f"mma.sync.aligned.m{m}n8k{k}.row.col.{'.'.join(kinds)}", *words)
    np.testing.assert_array_equal(out, registers(a @ b.T + c, places[2], kinds[0]))
    assert result.tensor_ops == 2 * m * 8 * k


def sparse_matrix(rng, kind, rows, k):
    """Kept values (rows, k/2), their places in each group of 4, and the full matrix."""
    kept = draw(rng, kind, (rows, k // 2))
    index = np.sort(np.argsort(rng.random((rows, k // 4, 4)), axis=2)[:, :, :2], axis=2)
    full = np.zeros((rows, k // 4, 4), np.int64)
    np.put_along_axis(full, index, kept.reshape(rows, k // 4, 2), 2)
    return kept, index, full.reshape(rows, k)


def metadata(index, places):
    """One word a lane: of each group of 4 elements whose first one the lane holds, two 2-bit places, in order."""
    words = []
    for lane in places:
        groups = [(row, column // 4) for row, column in lane if column % 4 == 0]
        nibbles = [int(index[g][0]) | int(index[g][1]) << 2 for g in groups]
        words.append(sum(n << 4 * i for i, n in enumerate(nibbles)))
    return np.array([words], np.uint32)


@needs_cute
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("kinds", [("s32", "s8", "s8", "s32"), ("s32", "u8", "s8", "s32")])
def test_sparse_mma_of_8_bits_against_cute(kinds, ordered):
    """m16n8k64: fragments of the dense m16n8k32 for a, CuTe's metadata layout of 64 columns."""
    rng = np.random.default_rng(6)
    kept, index, full = sparse_matrix(rng, kinds[1], 16, 64)
    _, _, (place_a, place_b, place_c) = dense_places("SM80_16x8x32_S32S8S8S32_TN")
    place_b = [lane + [(n, k + 32) for n, k in lane] for lane in place_b]
    place_e = cute.positions(SPARSE90, "", "ELayout_64x64", 64)[:32]  # the first warp of the four
    b, c = draw(rng, kinds[2], (8, 64)), draw(rng, "f16", (16, 8))
    words = [
        registers(x, p, kind) for x, p, kind in ((kept, place_a, kinds[1]), (b, place_b, kinds[2]), (c, place_c, "s32"))
    ]
    sp = "sp::ordered_metadata" if ordered else "sp"
    out, _ = multiply(
        f"mma.{sp}.sync.aligned.m16n8k64.row.col.{'.'.join(kinds)}@0", *words, tail=[metadata(index, place_e)]
    )
    np.testing.assert_array_equal(out, registers(full @ b.T + c, place_c, "s32"))


@needs_cute
def test_sparse_mma_metadata_of_sm120_is_the_same():
    """CuTe says it a second time, for m16n8k64 of sm_120."""
    text = (cute.headers() / "cute/atom" / SPARSE120).read_text()
    start = text.index("using ELayout")
    found = cute.parse_layout(text[text.index("Layout<", start) :])
    places = cute.positions(SPARSE90, "", "ELayout_64x64", 64)[:32]
    theirs = [[(v % 16, v // 16) for v in lane] for lane in found]
    assert [sorted(lane) for lane in theirs] == [sorted(lane) for lane in places]


@needs_cute
@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize(
    "kinds", [("f32", "f16", "f16", "f32"), ("f16", "f16", "f16", "f16"), ("f32", "bf16", "bf16", "f32")]
)
def test_sparse_mma_of_16_bits_against_cute(kinds, selector):
    """m16n8k32: the selector says which pair of a quad's lanes holds the metadata."""
    rng = np.random.default_rng(7)
    kept, index, full = sparse_matrix(rng, kinds[1], 16, 32)
    _, _, (place_a, place_b, place_c) = dense_places("SM80_16x8x16_F32F16F16F32_TN")
    place_b = [lane + [(n, k + 16) for n, k in lane] for lane in place_b]
    place_e = cute.positions(SPARSE90, "", "ELayout_64x32", 64)[:32]
    b, c = draw(rng, kinds[2], (8, 32)), draw(rng, "f16", (16, 8))
    words = [
        registers(x, p, kind)
        for x, p, kind in ((kept, place_a, kinds[1]), (b, place_b, kinds[2]), (c, place_c, kinds[3]))
    ]
    meta = metadata(index, place_e)
    meta[0, np.arange(32) % 4 // 2 != selector] = 0xDEADBEEF  # nobody looks there
    out, _ = multiply(f"mma.sp.sync.aligned.m16n8k32.row.col.{'.'.join(kinds)}@{selector}", *words, tail=[meta])
    np.testing.assert_array_equal(out, registers(full @ b.T + c, place_c, kinds[0]))


def test_sum_saturates_only_where_it_says():
    a, b, c = np.full((4, 32), 0x7F7F7F7F), np.full((2, 32), 0x7F7F7F7F), np.full((4, 32), 2**31 - 5)
    total = 32 * 127 * 127 + 2**31 - 5
    out, _ = multiply("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", a, b, c)
    assert (out == total % 2**32).all()
    out, _ = multiply("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32", a, b, c)
    assert (out == 2**31 - 1).all()


@pytest.mark.parametrize(
    "opcode",
    ["mma.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32", "mma.sync.aligned.m16n8k32.row.row.s32.s8.s8.s32",
     "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"],
)  # fmt: skip
def test_unknown_mma_is_refused(opcode):
    with pytest.raises(UnsupportedInstruction, match="line"):
        multiply(opcode, *(np.zeros((n, 32)) for n in (4, 2, 4)))


# wgmma

WIDTHS = {3: 32, 2: 64, 1: 128}  # bytes of a swizzled row, by the code in the descriptor


def swizzled(matrix_bytes, code):
    """K-major rows of ``width`` bytes, eight after another, 16-byte chunks exchanged by the row's number."""
    width = WIDTHS[code]
    rows = len(matrix_bytes)
    assert matrix_bytes.shape[1] == width
    out = np.zeros(rows * width, np.uint8)
    for row in range(rows):
        for chunk in range(width // 16):
            address = row * width + chunk * 16
            address ^= (address >> 7 & (width // 16 - 1)) << 4
            out[address : address + 16] = matrix_bytes[row, chunk * 16 : chunk * 16 + 16]
    return out


def descriptor(address, code, k_byte):
    return (address + k_byte) >> 4 | 1 << 16 | (8 * WIDTHS[code] >> 4) << 32 | code << 62


def fill_shared(count):
    """128 threads copy ``count`` bytes from %rd0 to the tile."""
    body = "mul.wide.u32 %rd9, %r0, 16; add.s64 %rd10, %rd0, %rd9; shl.b32 %r5, %r0, 4; mov.u32 %r6, tile;"
    body += "add.s32 %r6, %r6, %r5;"
    for i in range(count // 2048):
        body += f"ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd10+{2048 * i}];"
        body += f"st.shared.v4.u32 [%r6+{2048 * i}], {{%r1, %r2, %r3, %r4}};"
    return body + "fence.proxy.async; bar.sync 0;"


def wgmma_body(kinds, n, k, descriptors, outputs, wait=True, scale_d=True, tail=""):
    shape = f"m64n{n}k{k}"
    body = f"setp.{'eq' if scale_d else 'ne'}.s32 %p1, 0, 0; wgmma.fence.sync.aligned;"
    body += "".join(f"mov.u32 %r{40 + i}, {i if kinds[0] == 's32' else 0};" for i in range(outputs))
    for left, right in descriptors:
        body += f"mov.b64 %rd11, {left}; mov.b64 %rd12, {right};"
        body += f"wgmma.mma_async.sync.aligned.{shape}.{'.'.join(kinds)} {names(40, outputs)}, %rd11, %rd12, %p1{tail};"
    body += "wgmma.commit_group.sync.aligned;" + "wgmma.wait_group.sync.aligned 0;" * wait
    return body + "".join(f"st.global.u32 [%rd8+{512 * i}], %r{40 + i};" for i in range(outputs))


@pytest.mark.parametrize("code", WIDTHS)
@pytest.mark.parametrize(
    "kinds, k", [(("s32", "s8", "s8"), 32), (("s32", "u8", "s8"), 32), (("f32", "f16", "f16"), 16)]
)
def test_wgmma_from_swizzled_shared_memory(kinds, k, code):
    """All k steps of a 64 x 16 tile; the result laid out as four m16n8 tiles below each other (9.7.15.5.1)."""
    rng = np.random.default_rng(8)
    n, size = 16, BITS[kinds[1]] // 8
    steps = WIDTHS[code] // 32
    a, b = draw(rng, kinds[1], (64, k * steps)), draw(rng, kinds[2], (n, k * steps))
    raw = lambda x, kind: np.ascontiguousarray(encode(x, kind)).view(np.uint8).reshape(len(x), -1)  # noqa: E731
    at_b = 64 * WIDTHS[code]
    data = np.zeros(at_b + 2048 * 2, np.uint8)
    data[:at_b] = swizzled(raw(a, kinds[1]), code)
    data[at_b : at_b + n * WIDTHS[code]] = swizzled(raw(b, kinds[2]), code)
    data = np.r_[data, np.zeros(-len(data) % 2048, np.uint8)]
    steps_of = [(descriptor(0, code, 32 * s), descriptor(at_b, code, 32 * s)) for s in range(steps)]
    tail = ", 1, 1, 0, 0" if size == 2 else ""
    body = fill_shared(len(data)) + wgmma_body(kinds, n, k, steps_of, n // 2, tail=tail)
    out, result = run(body, data, block=128, outputs=128 * n // 2)
    got = out.reshape(n // 2, 128)
    got = got.view(np.float32) if kinds[0] == "f32" else got
    thread = np.arange(128)
    product = a @ b.T
    for i in range(n // 2):
        row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
        column = i // 4 * 8 + thread % 4 * 2 + i % 2
        np.testing.assert_array_equal(got[i], product[row, column] + (i if kinds[0] == "s32" else 0))
    assert result.tensor_ops == 2 * 64 * n * k * steps


def test_wgmma_result_is_not_there_before_the_wait():
    body = fill_shared(4096) + wgmma_body(
        ("s32", "s8", "s8"), 8, 32, [(descriptor(0, 3, 0), descriptor(2048, 3, 0))], 4, wait=False
    )
    with pytest.raises(RaceError, match="wgmma may still write"):
        run(body, np.zeros(4096, np.uint8), block=128, outputs=512)


def test_wgmma_operands_stay_until_the_wait():
    body = fill_shared(4096) + wgmma_body(
        ("s32", "s8", "s8"), 8, 32, [(descriptor(0, 3, 0), descriptor(2048, 3, 0))], 4
    )
    body = body.replace("wgmma.wait_group", "st.shared.u32 [%r6], 0; wgmma.wait_group")
    with pytest.raises(RaceError, match="asynchronous operation may still read"):
        run(body, np.zeros(4096, np.uint8), block=128, outputs=512)


@pytest.mark.parametrize("trans", [(0, 1), (1, 0), (1, 1)])
def test_wgmma_of_transposed_operands(trans):
    """M- and N-major f16 operands without swizzle: 8 x 8 core matrices of 128 bytes (9.7.15.5.1.1)."""
    rng = np.random.default_rng(9)
    a, b = draw(rng, "f16", (64, 16)), draw(rng, "f16", (8, 16))

    def cores(matrix, transposed):  # (along, k): core matrices in the order along, then k
        blocks = matrix.reshape(-1, 8, 2, 8).transpose(0, 2, 1, 3)
        return (
            encode(np.ascontiguousarray(blocks.transpose(0, 1, 3, 2) if transposed else blocks), "f16")
            .view(np.uint8)
            .ravel()
        )

    def place(address, transposed):  # along: 256 bytes apart, k: 128. Which is leading and which stride depends.
        leading, stride = (128, 256)
        return address >> 4 | leading >> 4 << 16 | stride >> 4 << 32

    data = np.r_[cores(a, trans[0]), cores(b, trans[1])]
    data = np.r_[data, np.zeros(-len(data) % 2048, np.uint8)]
    descriptors = [(place(0, trans[0]), place(2048, trans[1]))]
    body = fill_shared(len(data)) + wgmma_body(
        ("f32", "f16", "f16"), 8, 16, descriptors, 4, tail=f", 1, 1, {trans[0]}, {trans[1]}"
    )
    out, _ = run(body, data, block=128, outputs=512)
    thread, product = np.arange(128), a @ b.T
    for i in range(4):
        row, column = thread // 32 * 16 + thread % 32 // 4 + i // 2 * 8, thread % 4 * 2 + i % 2
        np.testing.assert_array_equal(out.view(np.float32).reshape(4, 128)[i], product[row, column])


@needs_cute
@pytest.mark.parametrize(
    "kinds, k, selector",
    [(("s32", "s8", "s8"), 64, 0), (("f32", "f16", "f16"), 32, 0), (("f32", "bf16", "bf16"), 32, 1)],
)
def test_sparse_wgmma_against_cute(kinds, k, selector):
    """9.7.15.6: the kept half of a and all of b in swizzled shared memory, CuTe's metadata layout for the whole warpgroup."""
    rng = np.random.default_rng(10)
    n, size = 16, BITS[kinds[1]] // 8
    kept, index, full = sparse_matrix(rng, kinds[1], 64, k)
    b = draw(rng, kinds[2], (n, k))
    words = metadata(index, cute.positions(SPARSE90, "", f"ELayout_64x{k}", 64))
    if size == 2:
        words[0, np.arange(128) % 4 // 2 != selector] = 0xDEADBEEF  # nobody looks there
    raw = lambda x, kind: np.ascontiguousarray(encode(x, kind)).view(np.uint8).reshape(len(x), -1)  # noqa: E731
    data = np.zeros(4096, np.uint8)
    data[:2048] = swizzled(raw(kept, kinds[1]), 3)
    data[2048 : 2048 + n * 64] = swizzled(raw(b, kinds[2]), 2)
    scales = ", 1, 1, 0, 0" if size == 2 else ""
    body = wgmma_body(kinds, n, k, [(descriptor(0, 3, 0), descriptor(2048, 2, 0))], n // 2, tail=scales)
    body = body.replace("mma_async.sync", "mma_async.sp.sync").replace("%rd12, %p1", f"%rd12, %r30, {selector}, %p1")
    out, _ = run(
        fill_shared(4096) + "ld.global.u32 %r30, [%rd6];" + body, data, words[0], block=128, outputs=128 * n // 2
    )
    got, thread, product = out.reshape(n // 2, 128), np.arange(128), full @ b.T
    got = got.view(np.float32) if kinds[0] == "f32" else got
    for i in range(n // 2):
        row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
        column = i // 4 * 8 + thread % 4 * 2 + i % 2
        np.testing.assert_array_equal(got[i], product[row, column] + (i if kinds[0] == "s32" else 0))
