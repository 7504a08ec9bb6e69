"""What the emulator raises. Every message ends with the line and text of the instruction at fault."""

from __future__ import annotations


class EmulatorError(Exception):
    """Base of all errors below."""


class UnsupportedInstruction(EmulatorError):
    """An instruction, modifier or operand that the emulator does not know: it never guesses."""


class MemoryFault(EmulatorError):
    """An access out of bounds, misaligned, or to shared memory that nothing was written to."""


class RaceError(EmulatorError):
    """Two warps touch a shared word with no barrier between, one of them writing; or data is read that is still on its way."""
