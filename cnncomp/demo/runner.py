"""Runs the parts of the demonstration, prints their tables, and writes the results down."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cnncomp.demo import digits, mobilenet, resnet
from cnncomp.demo.common import Options, Report, machine, machine_line
from cnncomp.errors import ArgumentError, MissingPackageError

PARTS: dict[str, Callable[[Options], list[Report]]] = {
    "mobilenet": mobilenet.run,
    "digits": digits.run,
    "resnet": resnet.run,
}


@dataclass
class Outcome:
    """What a run of the demonstration found: the machine, tables by name, and parts that could not run, with the reason."""

    machine: dict[str, Any]
    reports: dict[str, Report] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The machine and all tables' rows."""
        tables = {name: report.to_dict() for name, report in self.reports.items()}
        return json.dumps({"machine": self.machine, "tables": tables, "missing": self.missing}, indent=1)


def run(
    parts: Sequence[str] = tuple(PARTS),
    *,
    threads: int = 1,
    quick: bool = False,
    compile: bool = True,
    out: Path | None = None,
    console: Console | None = None,
) -> Outcome:
    """Run parts of the demonstration one after the other; a part whose data are not installed is left out and says so.

    Args:
        parts: names from ``PARTS``.
        threads: of torch and of cnncomp's kernels, for the whole process.
        quick: see :class:`Options`.
        compile: race torch.compile too, the slowest step.
        out: folder for the saved models; by default a temporary one.
        console: where the tables go; by default stdout.

    Raises:
        ArgumentError: an unknown part, or fewer than one thread.
    """
    if unknown := [name for name in parts if name not in PARTS]:
        raise ArgumentError("parts", repr(unknown[0]), f"one of {', '.join(PARTS)}")
    if threads < 1:
        raise ArgumentError("threads", threads, "at least 1")
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a log's width is not a terminal's
    torch.set_num_threads(threads)
    outcome = Outcome(machine())
    console.print(machine_line(), highlight=False)
    with tempfile.TemporaryDirectory(prefix="cnncomp-demo-") as temporary:
        folder = Path(temporary) if out is None else out
        folder.mkdir(parents=True, exist_ok=True)
        options = Options(folder, quick, compile and not quick)
        for name in parts:
            try:
                reports = PARTS[name](options)
            except MissingPackageError as error:
                outcome.missing[name] = str(error)
                console.print(
                    f"{name}: left out. {error}", style="yellow", highlight=False, markup=False, soft_wrap=True
                )
                continue
            for report in reports:
                outcome.reports[report.name] = report
                report.print(console)
    return outcome
