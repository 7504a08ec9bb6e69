"""Warp-wide instructions: shuffles and matrix multiply."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from tests.ptx.errors import UnsupportedInstruction
from tests.ptx.instructions.load_store import whole_warps
from tests.ptx.instructions.registry import instruction
from tests.ptx.machine import WARP, Machine, Mask
from tests.ptx.parser import Immediate, Instruction, Operand, Vector


@instruction("shfl")
def shuffle(m: Machine, ins: Instruction, mask: Mask) -> None:
    """shfl.sync.idx and .bfly over whole warps."""
    if ins.opcode[1] != "sync" or ins.opcode[2] not in ("idx", "bfly") or ins.operands[3] != Immediate(31):
        raise UnsupportedInstruction("kind of shuffle")
    lanes = whole_warps(m, mask)
    x, count = m.read(ins.operands[1], "b32", mask), m.read(ins.operands[2], "u32", mask).astype(np.int64) % WARP
    source = count if ins.opcode[2] == "idx" else (lanes % WARP) ^ count
    values = np.take_along_axis(x.reshape(-1, WARP), source.reshape(-1, WARP), 1).ravel()
    destination = ins.operands[0]
    m.write(destination.items[0] if isinstance(destination, Vector) else destination, values, mask)


def _fragments(m: Machine, operand: Operand, kind: str, mask: Mask) -> NDArray[np.int64]:
    """(warps, 32, registers, elements of a register)."""
    items = operand.items if isinstance(operand, Vector) else (operand,)
    words = np.stack([m.read(item, "b32", mask) for item in items], axis=1)
    dtype = {"s8": np.int8, "u8": np.uint8, "s32": np.int32}[kind]
    return words.view(dtype).reshape(-1, WARP, len(items), 4 // np.dtype(dtype).itemsize).astype(np.int64)


def _rows_of(fragments: NDArray[np.int64], tall: bool) -> NDArray[np.int64]:
    """8-bit fragments to (warps, rows, k): lane 4 * g + t holds row g, bytes 4 * t to 4 * t + 3 of a 16-byte piece of k.

    A tall operand (16 rows) alternates rows g and g + 8 from register to register.
    """
    warps, _, registers, _ = fragments.shape
    split = fragments.reshape(warps, 8, 4, registers, 4)  # warp, g, t, register, byte
    if not tall:
        return split.transpose(0, 1, 3, 2, 4).reshape(warps, 8, 16 * registers)
    halves = split.reshape(warps, 8, 4, registers // 2, 2, 4)  # ..., piece of k, row half, byte
    return halves.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 8 * registers)


@instruction("mma")
def matrix_multiply(m: Machine, ins: Instruction, mask: Mask) -> None:
    """mma.sync m8n8k16, m16n8k16 and m16n8k32 of 8-bit integers, exact in 64 bits; without satfinite it wraps."""
    parts = ins.opcode
    shape = re.fullmatch(r"m(8|16)n8k(16|32)", parts[3])
    saturate = "satfinite" in parts
    kinds = parts[-4:]
    if parts[1:3] != ("sync", "aligned") or not shape or parts[4:6] != ("row", "col") or kinds[0] != "s32":
        raise UnsupportedInstruction("kind of mma")
    whole_warps(m, mask)
    d, a, b, c = ins.operands
    tall = shape[1] == "16"
    left = _rows_of(_fragments(m, a, kinds[1], mask), tall)
    right = _rows_of(_fragments(m, b, kinds[2], mask), False)
    # float64 goes through BLAS and is exact: sums of 32 products stay far below 2**53.
    product = (left.astype(np.float64) @ right.astype(np.float64).transpose(0, 2, 1)).astype(np.int64)
    halves = product.reshape(len(product), -1, 8, 4, 2)  # warp, row half, g, t, element
    sums = halves.transpose(0, 2, 3, 1, 4).reshape(len(product), WARP, -1)
    sums = sums + _fragments(m, c, "s32", mask).reshape(sums.shape)
    if saturate:
        sums = np.clip(sums, -(2**31), 2**31 - 1)
    items = d.items if isinstance(d, Vector) else (d,)
    for i, item in enumerate(items):
        m.write(item, sums[:, :, i].astype(np.int32).ravel(), mask)
