"""Instruction handlers, one module per class. Importing this fills the table."""

from __future__ import annotations

from tests.ptx.instructions import arithmetic, convert, load_store, logic, warp
from tests.ptx.instructions.registry import HANDLERS

__all__ = ["HANDLERS", "arithmetic", "convert", "load_store", "logic", "warp"]
