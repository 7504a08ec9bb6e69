"""Moves and conversions."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.errors import UnsupportedInstruction
from tests.ptx.instructions.registry import expect_modifiers, instruction
from tests.ptx.machine import UNSIGNED, Machine, Mask, dtype_of
from tests.ptx.parser import Instruction, Vector

_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("mov")
def move(m: Machine, ins: Instruction, mask: Mask) -> None:
    """Also splits a register into a vector of narrower ones (low bits first) and joins them."""
    expect_modifiers(ins)
    d, a = ins.operands
    if isinstance(d, Vector):
        value = m.read(a, ins.type, mask)
        width = int(ins.type[1:]) // len(d.items)
        for i, item in enumerate(d.items):
            m.write(item, (value >> value.dtype.type(i * width)).astype(UNSIGNED[width]), mask)
    elif isinstance(a, Vector):
        total = UNSIGNED[int(ins.type[1:])]
        width = int(ins.type[1:]) // len(a.items)
        parts = [
            m.read(item, f"b{width}", mask).astype(total) << total.type(i * width) for i, item in enumerate(a.items)
        ]
        m.write(d, np.bitwise_or.reduce(parts), mask)
    else:
        m.write(d, m.read(a, ins.type, mask), mask)


@instruction("cvta")
def convert_address(m: Machine, ins: Instruction, mask: Mask) -> None:
    """Global addresses are generic ones here. Shared ones aren't, but nothing may use them as such."""
    if ins.type != "u64" or "global" not in ins.opcode:
        raise UnsupportedInstruction("conversion of an address")
    m.write(ins.operands[0], m.read(ins.operands[1], "u64", mask), mask)


def _float_to_integer(x: Any, kind: str) -> Any:
    """Saturating; NaN gives 0."""
    target = dtype_of(kind)
    info = np.iinfo(target)
    if info.bits > 32:
        raise UnsupportedInstruction("float to 64-bit integer")
    return np.clip(np.nan_to_num(x.astype(np.float64), nan=0.0), info.min, info.max).astype(target)


@instruction("cvt")
def convert(m: Machine, ins: Instruction, mask: Mask) -> None:
    expect_modifiers(ins, "rn", "rni", "rzi", "rmi", "rpi", ins.opcode[-2])
    target, source = ins.opcode[-2:]
    if "x2" in target or len(ins.operands) != 2:
        raise UnsupportedInstruction("conversion of a pair")
    x = m.read(ins.operands[1], source, mask)
    modifiers = list(ins.opcode[1:-2])
    if source[0] == "f" and target[0] != "f":
        value = _float_to_integer(_ROUND[modifiers[0]](x), target)
    else:  # numpy rounds half to even, as rn does; integers are extended or truncated
        if target[0] == "f" and modifiers not in (["rn"], []):
            raise UnsupportedInstruction(f"rounding {modifiers}")
        value = x.astype(dtype_of(target))
    m.write(ins.operands[0], value, mask)
