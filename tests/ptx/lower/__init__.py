"""Turns parsed instructions into what the engine runs: the name of a handler, register slots and integers."""

from __future__ import annotations

from tests.ptx.lower import arithmetic, control, data, tensor  # noqa: F401  (they fill the table)
from tests.ptx.lower.registry import Lowered, Lowering, Program, lower_kernel

__all__ = ["Lowered", "Lowering", "Program", "lower_kernel"]
