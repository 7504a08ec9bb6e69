"""Counts of kernels on layers, kept in build/bench/counts by content: of the emulator, of the kernel and of the layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from bench import files
from bench.gpu_model import Launch
from tests.ptx import Result

CACHE = Path("build/bench/counts")
EMULATOR = Path(__file__).parent.parent / "tests" / "ptx"

Counted = tuple[dict[str, Any], Launch]


@cache
def _emulator() -> str:
    """Of what decides counts: not of the package's tests, nor of what they alone use."""
    h = hashlib.sha256()
    single = [EMULATOR / f"{name}.py" for name in ("engine", "launch", "memory", "parser", "result")]
    for path in sorted([*single, *(EMULATOR / "lower").rglob("*.py"), *(EMULATOR / "engine").glob("*.*")]):
        h.update(path.read_bytes())
    return h.hexdigest()


def counted(key: object, run: Callable[[], tuple[Result, Launch]]) -> Counted:
    """Counts and launch of a kernel, run only if they aren't known.

    Args:
        key: All that decides them beside the emulator; its text is what counts.
        run: Runs the kernel.
    """
    path = CACHE / (hashlib.sha256(f"{_emulator()} {key}".encode()).hexdigest()[:24] + ".json")
    if not path.exists():
        result, launch = run()
        fences = sum(n for opcode, n in result.instructions.items() if opcode.startswith(("fence", "membar")))
        counts = result.summary() | {"fences": fences}
        files.write(path, json.dumps({"counts": counts, "launch": asdict(launch)}))
    known = json.loads(path.read_text())
    return known["counts"], Launch(**known["launch"])
