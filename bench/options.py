"""What the commands of the benches share."""

from __future__ import annotations

import os
from collections.abc import Sequence

import typer


def chosen(names: str, known: Sequence[str], option: str) -> list[str]:
    """The comma-separated ``names``, all if there is none."""
    picked = [name.strip() for name in names.split(",") if name.strip()] or list(known)
    for name in picked:
        if name not in known:
            raise typer.BadParameter(f"{name}: not one of {', '.join(known)}", param_hint=option)
    return picked


def threads() -> int:
    """Threads of a kernel: what CNNCOMP_BENCH_THREADS says, one without it."""
    return int(os.environ.get("CNNCOMP_BENCH_THREADS", "1"))
