"""A PTX emulator: runs the PTX of nvcc and Triton exactly, checking every memory access. See README.md."""

from __future__ import annotations

from tests.ptx.errors import (
    BarrierError,
    DeadlockError,
    EmulatorError,
    MemoryFault,
    RaceError,
    TrapError,
    UninitialisedMemory,
    UnsupportedInstruction,
)
from tests.ptx.launch import Caches, Checks, emulate, load
from tests.ptx.memory import GlobalMemory
from tests.ptx.parser import entry_names
from tests.ptx.result import Result

__all__ = [
    "BarrierError",
    "Caches",
    "Checks",
    "DeadlockError",
    "EmulatorError",
    "GlobalMemory",
    "MemoryFault",
    "RaceError",
    "Result",
    "TrapError",
    "UninitialisedMemory",
    "UnsupportedInstruction",
    "emulate",
    "entry_names",
    "load",
]
