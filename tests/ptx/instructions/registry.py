"""The table of instructions: opcode to handler."""

from __future__ import annotations

from collections.abc import Callable

from tests.ptx.errors import UnsupportedInstruction
from tests.ptx.machine import Machine, Mask
from tests.ptx.parser import Instruction

Handler = Callable[[Machine, Instruction, Mask], None]

HANDLERS: dict[str, Handler] = {}


def instruction(*opcodes: str) -> Callable[[Handler], Handler]:
    """Register a handler for the first part of these opcodes."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(opcodes, handler))
        return handler

    return register


def expect_modifiers(ins: Instruction, *allowed: str) -> None:
    """Raise unless every part between the opcode and its last type is known."""
    unknown = set(ins.opcode[1:-1]) - set(allowed)
    if unknown:
        raise UnsupportedInstruction(f"modifiers {sorted(unknown)}")
