"""The register file of a kernel, and the table of functions that lower an instruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.ptx.errors import UnsupportedInstruction
from tests.ptx.parser import Address, Immediate, Instruction, Kernel, Operand, Register, Sink, Special, Symbol, Vector

WINDOWS = {"shared": 1 << 32, "local": 2 << 32, "param": 3 << 32, "global": 0, "const": 0}
FLAGS = {"sat": 1, "ftz": 2, "NaN": 4, "relu": 4}
_SPECIALS = (
    [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
    + ["%laneid", "%warpid", "%nwarpid", "%smid"]
    + [f"%lanemask_{which}" for which in ("eq", "lt", "le", "gt", "ge")]
    + ["%dynamic_smem_size", "%total_smem_size", "%clock", "%clock64", "%gridid"]
)
_CLOCKS = {"%clock", "%clock64", "%clock_hi", "%globaltimer"}
_FIXED = {"%cluster_ctarank": 0, "%cluster_nctarank": 1, "%nsmid": 1}

Slot = tuple[int, int, int]  # byte offset in the register file, width in bits, displacement of an address


class Lowered(NamedTuple):
    handler: str
    operands: list[Slot]
    ints: list[int]
    touches_async: bool = False  # may use the registers of a wgmma under way


class Lowering:
    """Gives registers, constants and special registers their places in the register file."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.bytes = 0
        self.slots: dict[str, tuple[int, int]] = {}
        self.constants: dict[tuple[int, int], int] = {}
        self.specials: dict[str, int] = {}
        self.sinks: dict[int, int] = {}
        for name, kind in kernel.registers.items():
            width = 1 if kind == "pred" else int(kind[1:])
            if width not in (1, 16, 32, 64):
                width = 64  # .b8 and .b128: whatever uses them is not supported, and says so
            self.slots[name] = (self._allocate(width), width)

    def _allocate(self, width: int) -> int:
        size = 4 if width == 1 else width // 8 * 32
        align = min(size, 64)
        at = -(-self.bytes // align) * align
        self.bytes = at + size
        return at

    def constant(self, value: int, width: int) -> Slot:
        """A register that always holds ``value``."""
        width = max(width, 16) if width != 1 else 1
        value &= (1 << width) - 1
        if (value, width) not in self.constants:
            self.constants[value, width] = self._allocate(width)
        return (self.constants[value, width], width, 0)

    def register(self, operand: Operand, width: int) -> Slot:
        """Slot of a scalar that is used ``width`` bits wide (only constants depend on it)."""
        if isinstance(operand, Register):
            return (*self.slots[operand.name], 0)
        if isinstance(operand, Immediate):
            return self.constant(operand.bits, width)
        if isinstance(operand, Sink):
            if width not in self.sinks:
                self.sinks[width] = self._allocate(max(width, 16) if width != 1 else 1)
            return (self.sinks[width], width, 0)
        if isinstance(operand, Special):
            return self.special(operand.name)
        if isinstance(operand, Symbol):
            return self.constant(self.kernel.symbols[operand.name][1] + operand.offset, max(width, 32))
        raise UnsupportedInstruction(f"operand {operand}")

    def special(self, name: str) -> Slot:
        if name in _FIXED:
            return self.constant(_FIXED[name], 32)
        if name not in _SPECIALS or name in _CLOCKS:
            raise UnsupportedInstruction(f"special register {name}")
        if name not in self.specials:
            self.specials[name] = self._allocate(32)
        return (self.specials[name], 32, 0)

    def registers(self, operand: Operand, width: int) -> list[Slot]:
        """Slots of a vector or a scalar."""
        return [self.register(o, width) for o in (operand.items if isinstance(operand, Vector) else (operand,))]

    def address(self, operand: Operand) -> Slot:
        if not isinstance(operand, Address):
            raise UnsupportedInstruction(f"address {operand}")
        if isinstance(operand.base, Register):
            return (*self.slots[operand.base.name], operand.offset)
        slot, width, _ = self.register(operand.base, 64)
        return (slot, width, operand.offset)

    def space(self, operand: Operand, named: str) -> str:
        """The space of an address: parameters of inlined calls lie in local memory."""
        if isinstance(operand, Address) and isinstance(operand.base, Symbol):
            return self.kernel.symbols[operand.base.name][0]
        return named

    def initial(self) -> NDArray[np.uint8]:
        """The register file of a starting warp."""
        file = np.zeros(self.bytes, np.uint8)
        for (value, width), at in self.constants.items():
            raw = (
                (0xFFFFFFFF if value else 0).to_bytes(4, "little")
                if width == 1
                else value.to_bytes(width // 8, "little") * 32
            )
            file[at : at + len(raw)] = np.frombuffer(raw, np.uint8)
        return file

    def special_slots(self) -> NDArray[np.int32]:
        return np.array([self.specials.get(name, -1) for name in _SPECIALS], np.int32)


Lowerer = Callable[[Lowering, Instruction], Lowered]
TABLE: dict[str, Lowerer] = {}


def lowers(*bases: str) -> Callable[[Lowerer], Lowerer]:
    """Enter a function into the table under the first parts of the opcodes that it lowers."""

    def register(function: Lowerer) -> Lowerer:
        TABLE.update(dict.fromkeys(bases, function))
        return function

    return register


def only(ins: Instruction, parts: tuple[str, ...] | list[str], *known: str) -> None:
    """Refuse modifiers that are not in ``known``."""
    unknown = [p for p in parts if p not in known]
    if unknown:
        raise UnsupportedInstruction(f"modifier .{unknown[0]} of {ins.base}")


def flags_of(parts: tuple[str, ...] | list[str]) -> int:
    return sum(FLAGS[p] for p in set(parts) if p in FLAGS)


def immediate(operand: Operand) -> int:
    if not isinstance(operand, Immediate):
        raise UnsupportedInstruction(f"{operand}, expected a constant")
    return operand.bits


@dataclass
class Program:
    """A kernel as the engine takes it. ``problems`` are instructions that raise when they are reached."""

    kernel: Kernel
    lowered: list[Lowered]
    predicates: list[tuple[int, bool]]
    initial: NDArray[np.uint8]
    special_slots: NDArray[np.int32]
    problems: dict[int, str] = field(default_factory=dict)
    bytewise: bool = False  # accesses less than a word of shared memory at once

    @cached_property
    def flat(self) -> tuple[bytes, NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """The instructions as the engine reads them: handlers; predicate, negated, touches_async, numbers of operands and ints
        of each; all operands; all ints."""
        each = zip(self.lowered, self.predicates, strict=True)
        heads = [(*predicate, one.touches_async, len(one.operands), len(one.ints)) for one, predicate in each]
        operands = [part for one in self.lowered for operand in one.operands for part in operand]
        ints = [value for one in self.lowered for value in one.ints]
        names = "".join(f"{one.handler}\0" for one in self.lowered).encode()
        return names, np.array(heads, np.int32), np.array(operands, np.int64), np.array(ints, np.int64)


def _bytewise(ins: Instruction) -> bool:
    shared = any(p.startswith("shared") for p in ins.opcode) or (
        ins.base in ("ld", "st") and ins.opcode[1] not in ("global", "param", "local")
    )
    elements = next((int(p[1:]) for p in ins.opcode if p in ("v2", "v4")), 1)
    small = ins.type[1:] in ("8", "16") and elements * int(ins.type[1:]) < 32
    return ins.base in ("ld", "st", "atom", "red") and shared and small


def lower_kernel(kernel: Kernel, knows: Callable[[str], bool]) -> Program:
    """Lower all instructions.

    Args:
        kernel: From the parser.
        knows: Whether the engine has a handler of a name.
    """
    lowering = Lowering(kernel)
    lowered, predicates, problems = [], [], {}
    for number, ins in enumerate(kernel.instructions):
        try:
            function = TABLE.get(ins.base)
            if function is None:
                raise UnsupportedInstruction("unknown instruction")
            one = function(lowering, ins)
            if not knows(one.handler):
                raise UnsupportedInstruction(f"{'.'.join(ins.opcode)} is not known")
        except (UnsupportedInstruction, ValueError, IndexError, KeyError) as error:
            problems[number] = str(error)
            one = Lowered("unsupported", [], [])
        lowered.append(one)
        predicates.append((lowering.slots[ins.predicate][0], ins.negated) if ins.predicate else (-1, False))
    bytewise = any(_bytewise(ins) for ins in kernel.instructions)
    return Program(kernel, lowered, predicates, lowering.initial(), lowering.special_slots(), problems, bytewise)
