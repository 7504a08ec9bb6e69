"""What the emulator raises. Every message ends with the line and text of the instruction at fault."""

from __future__ import annotations


class EmulatorError(Exception):
    """Base of all errors below."""


class UnsupportedInstruction(EmulatorError):
    """An instruction, modifier or operand that the emulator does not know: it never guesses."""


class MemoryFault(EmulatorError):
    """An access out of bounds or misaligned."""


class UninitialisedMemory(MemoryFault):
    """Memory is read that nothing was written to."""


class RaceError(EmulatorError):
    """Two accesses that conflict, with nothing that orders them; or data is used that is still on its way."""


class BarrierError(EmulatorError):
    """A barrier or warp-wide instruction that not all take part in who must."""


class DeadlockError(EmulatorError):
    """The kernel waits for something that never happens, or does not end."""


class TrapError(EmulatorError):
    """The kernel executed trap, or a failed assertion."""


#: By the codes of the engine's FaultKind.
FAULTS: dict[int, type[EmulatorError]] = {
    1: UnsupportedInstruction,
    2: MemoryFault,
    3: RaceError,
    4: BarrierError,
    5: DeadlockError,
    6: UninitialisedMemory,
    7: TrapError,
}
