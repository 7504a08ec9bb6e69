"""Bits: logic, shifts, fields, byte permutation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.errors import UnsupportedInstruction
from tests.ptx.instructions.registry import expect_modifiers, instruction
from tests.ptx.machine import Machine, Mask
from tests.ptx.parser import Immediate, Instruction, Operand

_LOGIC: dict[str, Callable[..., Any]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@instruction("and", "or", "xor")
def logic(m: Machine, ins: Instruction, mask: Mask) -> None:
    expect_modifiers(ins)
    d, a, b = ins.operands
    m.write(d, _LOGIC[ins.base](m.read(a, ins.type, mask), m.read(b, ins.type, mask)), mask)


@instruction("not")
def invert(m: Machine, ins: Instruction, mask: Mask) -> None:
    expect_modifiers(ins)
    m.write(ins.operands[0], ~m.read(ins.operands[1], ins.type, mask), mask)


@instruction("shl", "shr")
def shift(m: Machine, ins: Instruction, mask: Mask) -> None:
    """Counts of the width and more shift everything out; a signed shr then leaves the sign."""
    expect_modifiers(ins)
    d, a, b = ins.operands
    x, count = m.read(a, ins.type, mask), m.read(b, "u32", mask)
    width = int(ins.type[1:])
    clipped = np.minimum(count, width - 1).astype(x.dtype)
    values = np.left_shift(x, clipped) if ins.base == "shl" else np.right_shift(x, clipped)
    beyond = x >> x.dtype.type(width - 1) if ins.base == "shr" and ins.type[0] == "s" else np.zeros_like(x)
    m.write(d, np.where(count >= width, beyond, values).astype(x.dtype), mask)


def _constant(operand: Operand) -> int:
    if not isinstance(operand, Immediate):
        raise UnsupportedInstruction("a bit field whose place is in a register")
    return operand.bits


@instruction("bfe")
def extract_field(m: Machine, ins: Instruction, mask: Mask) -> None:
    expect_modifiers(ins)
    x, width = m.read(ins.operands[1], ins.type, mask), int(ins.type[1:])
    position, length = _constant(ins.operands[2]), _constant(ins.operands[3])
    if position + length > width or length == 0:
        raise UnsupportedInstruction("a bit field that reaches past the register")
    up = x << x.dtype.type(width - position - length)
    m.write(ins.operands[0], up >> x.dtype.type(width - length), mask)


@instruction("bfi")
def insert_field(m: Machine, ins: Instruction, mask: Mask) -> None:
    expect_modifiers(ins)
    d, a, b, position, length = ins.operands
    field, into = m.read(a, ins.type, mask), m.read(b, ins.type, mask)
    place = ((1 << _constant(length)) - 1) << _constant(position)
    place &= (1 << int(ins.type[1:])) - 1
    kind = into.dtype.type
    m.write(d, (into & ~kind(place)) | ((field << kind(_constant(position))) & kind(place)), mask)


@instruction("prmt")
def permute_bytes(m: Machine, ins: Instruction, mask: Mask) -> None:
    """Each nibble of the selector picks one of 8 bytes, or with its top bit that byte's sign eight times."""
    if ins.opcode != ("prmt", "b32"):
        raise UnsupportedInstruction("mode of prmt")
    d, a, b, c = ins.operands
    low, high, selector = (m.read(o, "u32", mask).astype(np.uint64) for o in (a, b, c))
    source = low | high << np.uint64(32)
    value = np.zeros_like(source)
    for i in range(4):
        nibble = selector >> np.uint64(4 * i) & np.uint64(15)
        byte = source >> ((nibble & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        value |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
    m.write(d, value.astype(np.uint32), mask)
