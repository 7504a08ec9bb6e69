"""What the parts of the demonstration share: options, tables, accuracy, and the race between models."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._inductor.config
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import cnncomp
from cnncomp import _cpu
from cnncomp.convert import ConvertedModel
from cnncomp.dispatch import cpu_name, interleaved
from cnncomp.progress import track

_STDERR = Console(stderr=True)


def say(text: str) -> None:
    """A line about what is being done, on stderr."""
    _STDERR.print(f"· {text}", style="dim", highlight=False)


@dataclass(frozen=True)
class Options:
    """How the demonstration runs.

    Args:
        out: folder for the saved models; it exists.
        quick: few images and rounds, no torch.compile, kernels by rule of thumb: shows that it works, times nothing well.
        compile: race torch.compile as well.
    """

    out: Path
    quick: bool = False
    compile: bool = True


class Column(NamedTuple):
    """A column of a table: key in the rows, header, and format specification of its numbers."""

    key: str
    header: str
    format: str = ""


@dataclass
class Report:
    """One table of results. ``rows`` hold plain values by column key; a missing key is an empty cell."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """The rows, formatted. Title and notes are left to the caller: they are wider than a small table."""
        table = Table()
        for column in self.columns:
            numeric = bool(column.format)
            table.add_column(column.header, justify="right" if numeric else "left", no_wrap=numeric)
        for row in self.rows:
            table.add_row(*(_cell(row.get(c.key), c.format) for c in self.columns))
        return table

    def print(self, console: Console) -> None:
        console.print(f"\n[bold]{escape(self.title)}[/bold]", highlight=False)
        console.print(self.table())
        for note in self.notes:
            console.print(note, style="dim", highlight=False, markup=False)

    def to_dict(self) -> dict[str, Any]:
        return {"title": self.title, "rows": self.rows, "notes": self.notes}


def _cell(value: Any, spec: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return format(value, spec) if isinstance(value, (int, float)) else escape(str(value))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": cpu_name(),
        "isa": _cpu.isa(),
        "threads": torch.get_num_threads(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "cnncomp": cnncomp.__version__,
    }


def machine_line() -> str:
    m = machine()
    threads = f"{m['threads']} thread{'s' if m['threads'] > 1 else ''}"
    return f"{m['cpu']} ({m['isa']}), {threads}; cnncomp {m['cnncomp']}, torch {m['torch']}, Python {m['python']}"


def forward(model: Callable[[Tensor], Tensor], images: Tensor, title: str = "", batch: int = 8) -> Tensor:
    """Outputs for all ``images`` (N, C, H, W), a batch at a time."""
    chunks = images.split(batch)
    out = []
    with torch.inference_mode(), track(title, len(chunks), show=bool(title)) as advance:
        for chunk in chunks:
            out.append(model(chunk))
            advance("")
    return torch.cat(out)


def correct(logits: Tensor, labels: Tensor, k: int = 1) -> int:
    """How many of ``logits`` (N, classes) have their label among the ``k`` highest."""
    return int((logits.topk(k).indices == labels[:, None]).any(1).sum())


def agreement(a: Tensor, b: Tensor) -> float:
    """Fraction of rows of two (N, classes) logits that have the same highest class."""
    return float((a.argmax(1) == b.argmax(1)).float().mean())


def megabytes(path: Path) -> float:
    """Size of a file, 10⁶ bytes."""
    return path.stat().st_size / 1e6


def save_float(model: nn.Module, path: Path) -> float:
    """Write the plain state dict, as one usually does; its MB."""
    torch.save(model.state_dict(), path)
    return megabytes(path)


def save_and_load(model: ConvertedModel, path: Path) -> tuple[ConvertedModel, float]:
    """The model as it comes back from its file, and the file's MB."""
    cnncomp.save(model, path)
    return cnncomp.load(path, replan=False), megabytes(path)


@contextmanager
def working(text: str) -> Iterator[None]:
    """For one long step without a count: a spinner on a terminal, a line elsewhere."""
    if not _STDERR.is_terminal:
        say(text)
        yield
        return
    with _STDERR.status(text):
        yield


def compile_float(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor] | str:
    """The model through torch.compile in its fastest form on a CPU (channels_last, weights frozen), compiled for ``x``;
    or one line why it can't be."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fast = torch.compile(last)

    def call(x: Tensor) -> Tensor:
        # In another mode than it was compiled in, torch would compile again, without freezing.
        with torch.inference_mode(False), torch.no_grad():
            return fast(x.contiguous(memory_format=torch.channels_last))

    try:
        # Not as an option of torch.compile, which freezes but does not lay the weights out for oneDNN: a third slower.
        with working("torch.compile compiles the fp32 model"), torch._inductor.config.patch(freezing=True):
            call(x)
    except Exception as error:  # no compiler, an unsupported Python, …: the rest of the demonstration needs none of it
        lines = str(error).strip().splitlines() or [""]
        return f"torch.compile does not work here: {type(error).__name__}: {lines[0]}"
    return call


def race(models: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, options: Options) -> dict[str, float]:
    """Median ms of each model on ``x``, timed in turn in this process."""
    fns = {name: (lambda model=model: model(x)) for name, model in models.items()}
    say(f"timing {len(models)} models in turn")
    rounds, seconds = (3, 0.0) if options.quick else (15, 5.0)
    with torch.inference_mode():
        times = interleaved(fns, min_rounds=rounds, budget_s=seconds)
    return {name: t * 1e3 for name, t in times.items()}


def kernels(model: ConvertedModel) -> str:
    """The kernels of a converted model, counted: "3 conv2d_sparse, 2 dense"."""
    names = ("dense" if p.kernel.startswith("dense.") else p.kernel for p in model.plan.layers.values())
    return ", ".join(f"{n} {name}" for name, n in Counter(names).most_common())


def batches(images: Tensor, size: int, limit: int | None = None) -> list[Tensor]:
    """``images`` in batches of ``size``, the first ``limit`` of them."""
    return list(itertools.islice(images.split(size), limit))
