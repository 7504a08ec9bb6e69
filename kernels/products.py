"""What int8 products need beside ``tl.dot``, which multiplies signed bytes only: the sign flip, and what it adds to the sums.

Bytes stay packed in 32-bit registers from the load to the tensor cores. Two things would unpack them, at 10 to 20 instructions
for each of the tensor cores': arithmetic on bytes, so the flip is one instruction for four of them; and Triton's prefetching of
a dot's operands over the loop's end, byte by byte, which it does only where an operand has a single use. So the kernels split
the columns of a tile into halves and use the same ``a`` for both.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

#: Triton's interpreter has no inline assembly.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_STEP = tl.constexpr(64)  # products of a column that are summed at once


@triton.jit
def flip_sign_bit(x):
    """uint8 to ``x - 128`` as int8. A masked-out 0 becomes -128, the flipped zero, so zero padding stays exact."""
    if _INTERPRETED:
        flipped = (x ^ 0x80).to(tl.int8, bitcast=True)
    else:
        flipped = tl.inline_asm_elementwise("xor.b32 $0, $1, 0x80808080;", "=r,r", [x], tl.int8, is_pure=True, pack=4)
    return flipped


@triton.jit
def _add_bytes(four, sums):
    """``sums`` and the four signed bytes of each word."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, 0x01010101, $2;", "=r,r,r", [four, sums], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def operand(x):
    """A tile of the left side as int8."""
    return flip_sign_bit(x) if x.dtype == tl.uint8 else x


@triton.jit
def flip_correction(weight_ptr, channel, real, products, UNSIGNED: tl.constexpr, WORDS: tl.constexpr, N: tl.constexpr):
    """What the sums of flipped bytes lack: 128 times each column's sum of weights; zero for signed bytes.

    Args:
        weight_ptr: (channels, products) int8.
        channel: (N,) channels.
        real: (N,) those that exist.
        products: Weights of a channel.
        UNSIGNED: The bytes were flipped.
        WORDS: ``products`` is a multiple of four, and ``weight_ptr`` of four bytes.
        N: Channels.

    Returns:
        (N,) int32.
    """
    missing = tl.zeros((N,), dtype=tl.int32)
    if UNSIGNED:
        if WORDS and not _INTERPRETED:
            kk = tl.arange(0, _STEP // 4)
            words = (
                weight_ptr.to(tl.pointer_type(tl.int32)) + channel.to(tl.int64)[:, None] * (products // 4) + kk[None, :]
            )
            sums = tl.zeros((N, _STEP // 4), dtype=tl.int32)
            for start in range(0, products // 4, _STEP // 4):
                four = tl.load(words + start, mask=real[:, None] & (start + kk < products // 4)[None, :], other=0)
                sums = _add_bytes(four, sums)
            missing = 128 * tl.sum(sums, axis=1)
        else:
            kk = tl.arange(0, _STEP)
            at = weight_ptr + channel.to(tl.int64)[:, None] * products + kk[None, :]
            sums = tl.zeros((N, _STEP), dtype=tl.int32)
            for start in range(0, products, _STEP):
                one = tl.load(at + start, mask=real[:, None] & (start + kk < products)[None, :], other=0)
                sums += one.to(tl.int32)
            missing = 128 * tl.sum(sums, axis=1)
    return missing
