"""A PTX emulator on numpy: runs the PTX of nvcc and Triton exactly, checking every memory access. See README.md."""

from __future__ import annotations

from tests.ptx.errors import EmulatorError, MemoryFault, RaceError, UnsupportedInstruction
from tests.ptx.machine import Result, emulate
from tests.ptx.memory import GlobalMemory
from tests.ptx.parser import entry_names

__all__ = [
    "EmulatorError",
    "GlobalMemory",
    "MemoryFault",
    "RaceError",
    "Result",
    "UnsupportedInstruction",
    "emulate",
    "entry_names",
]
