"""Integer and float arithmetic, comparison, selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.errors import UnsupportedInstruction
from tests.ptx.instructions.registry import expect_modifiers, instruction
from tests.ptx.machine import Machine, Mask, dtype_of
from tests.ptx.parser import Instruction

_BINARY: dict[str, Callable[..., Any]] = {"add": np.add, "sub": np.subtract, "min": np.fmin, "max": np.fmax}
_COMPARE: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _wider(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


@instruction("add", "sub", "min", "max")
def binary(m: Machine, ins: Instruction, mask: Mask) -> None:
    expect_modifiers(ins, "rn")
    d, a, b = ins.operands
    m.write(d, _BINARY[ins.base](m.read(a, ins.type, mask), m.read(b, ins.type, mask)), mask)


def _multiply(m: Machine, ins: Instruction, mask: Mask) -> tuple[str, Any]:
    """Type and value of operands 1 times 2 of mul and mad; integers say lo, hi or wide."""
    expect_modifiers(ins, "lo", "hi", "wide", "rn")
    kind = ins.type
    a, b = (m.read(o, kind, mask) for o in ins.operands[1:3])
    if "wide" in ins.opcode or "hi" in ins.opcode:
        width = int(kind[1:])
        if width > 32:
            raise UnsupportedInstruction("64-bit mul.hi")
        wide = dtype_of(_wider(kind))
        product = a.astype(wide) * b.astype(wide)
        if "wide" in ins.opcode:
            return _wider(kind), product
        return kind, (product >> wide.type(width)).astype(dtype_of(kind))
    return kind, a * b


@instruction("mul")
def multiply(m: Machine, ins: Instruction, mask: Mask) -> None:
    m.write(ins.operands[0], _multiply(m, ins, mask)[1], mask)


@instruction("mad")
def multiply_add(m: Machine, ins: Instruction, mask: Mask) -> None:
    if ins.type[0] == "f":
        raise UnsupportedInstruction("a contracted float multiply and add")
    kind, product = _multiply(m, ins, mask)
    m.write(ins.operands[0], product + m.read(ins.operands[3], kind, mask), mask)


@instruction("div", "rem")
def divide(m: Machine, ins: Instruction, mask: Mask) -> None:
    """Integers only, towards zero."""
    expect_modifiers(ins)
    if ins.type[0] == "f":
        raise UnsupportedInstruction("float division")
    d, a, b = ins.operands
    x, y = m.read(a, ins.type, mask), m.read(b, ins.type, mask)
    if (y == 0).any():
        raise UnsupportedInstruction("division by zero, whose result is unspecified")
    remainder = np.fmod(x, y)
    m.write(d, remainder if ins.base == "rem" else (x - remainder) // y, mask)


@instruction("neg", "abs")
def unary(m: Machine, ins: Instruction, mask: Mask) -> None:
    expect_modifiers(ins)
    x = m.read(ins.operands[1], ins.type, mask)
    m.write(ins.operands[0], -x if ins.base == "neg" else np.abs(x), mask)


@instruction("setp")
def compare(m: Machine, ins: Instruction, mask: Mask) -> None:
    """Ordered comparisons; NaN compares false but for ne, which PTX says of neu only."""
    if len(ins.opcode) != 3 or ins.opcode[1] not in _COMPARE or (ins.type[0] == "f" and ins.opcode[1] == "ne"):
        raise UnsupportedInstruction("comparison")
    d, a, b = ins.operands
    m.write(d, _COMPARE[ins.opcode[1]](m.read(a, ins.type, mask), m.read(b, ins.type, mask)), mask)


@instruction("selp")
def select(m: Machine, ins: Instruction, mask: Mask) -> None:
    d, a, b, p = ins.operands
    values = np.where(m.read(p, "pred", mask), m.read(a, ins.type, mask), m.read(b, ins.type, mask))
    m.write(d, values, mask)
