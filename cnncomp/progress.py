"""A progress bar for work over a second, on a terminal only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[str], None]

_PATIENCE_S = 1.0


@contextmanager
def track(title: str, total: int | None, show: bool = True) -> Iterator[Advance]:
    """Yield ``advance(label)``, to be called once per step; ``total`` None: nobody knows how many. The bar appears after a
    second, if stderr is a terminal."""
    if not show or not sys.stderr.isatty():
        yield lambda label: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[label]}"), console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=total, label="")
    start, started = time.monotonic(), False

    def advance(label: str) -> None:
        nonlocal started
        bar.update(task, advance=1, label=label)
        if not started and time.monotonic() - start > _PATIENCE_S:
            bar.start()
            started = True

    try:
        yield advance
    finally:
        if started:
            bar.stop()
