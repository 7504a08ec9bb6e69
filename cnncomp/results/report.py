"""The table of the Fashion-MNIST results, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from cnncomp.demo.common import machine_line
from cnncomp.results.rows import Row, mean_and_error

SEEDS = (0, 1, 2)
#: Kinds of rows and their titles, in the order of the table. Those of "teacher" and "int8" are rows by themselves, the others
#: have one per seed, "<kind>-<seed>".
KINDS = {
    "teacher": "teacher, fp32",
    "int8": "int8 after training",
    "unstructured-90": "90 % zeros",
    "unstructured-90-int8": "90 % zeros, int8",
    "unstructured-95": "95 % zeros",
    "2of4": "2:4",
    "student-plain": "student",
    "student-distilled": "student, distilled",
    "all": "student, distilled, 75 % zeros, int8",
}
COMMAND = "python -m cnncomp.results.fashion_mnist --docs docs/results.md"


def text(rows: Mapping[str, Row], ms: Mapping[str, float]) -> str:
    """The section: one line per kind, then the gain by distillation, then what it was measured with.

    Args:
        rows: those that are finished, by name.
        ms: Median time of each compressed kind, of "teacher" and of "dense", the teacher converted without compression.
    """
    teacher = rows["teacher"]
    corruptions = list(teacher.corrupted)
    names = ["accuracy", "to teacher", "agreement", *corruptions, "parameters", "MB", "× smaller", "ms", "× eager"]
    header = ["", *names, "× dense", "h", "seeds"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for kind, title in KINDS.items():
        found = _of_kind(rows, kind)
        cells = _cells(found, teacher, corruptions, ms.get(kind), ms) if found else ["did not finish"]
        lines.append([title, *cells, *[""] * (len(header) - 1 - len(cells))])
    parts = ["## Fashion-MNIST", "\n".join(f"| {' | '.join(line)} |" for line in lines), _gain(rows), _notes(rows)]
    return "\n\n".join(parts)


def _of_kind(rows: Mapping[str, Row], kind: str) -> list[Row]:
    return [rows[name] for name in (kind, *(f"{kind}-{seed}" for seed in SEEDS)) if name in rows]


def _said(values: Sequence[float], digits: int, unit: str = "") -> str:
    """Mean ± standard error; the value alone where there is one."""
    mean, error = mean_and_error(values)
    spread = "" if math.isnan(error) else f" ± {error:.{digits}f}"
    return f"{mean:.{digits}f}{spread}{unit}"


def _cells(
    found: Sequence[Row], teacher: Row, corruptions: Sequence[str], time: float | None, ms: Mapping[str, float]
) -> list[str]:
    first = found[0]
    mb = sum(row.megabytes for row in found) / len(found)
    lost = [100 * (row.accuracy - teacher.accuracy) for row in found]
    agreed = [100 * row.agreement for row in found if row.agreement is not None]
    return [
        _said([100 * row.accuracy for row in found], 2, " %"),
        "" if first is teacher else f"{sum(lost) / len(lost):+.2f}",
        f"{sum(agreed) / len(agreed):.1f} %" if agreed else "",
        *(f"{100 * sum(row.corrupted[kind] for row in found) / len(found):.1f} %" for kind in corruptions),
        f"{round(sum(row.parameters for row in found) / len(found)):,}",
        f"{mb:.3f}",
        f"{teacher.megabytes / mb:.1f}",
        "" if time is None else f"{time:.2f}",
        "" if time is None else f"{ms['teacher'] / time:.2f}",
        "" if time is None or first is teacher else f"{ms['dense'] / time:.2f}",
        f"{sum(row.hours for row in found) / len(found):.2f}",
        str(len(found)),
    ]


def _gain(rows: Mapping[str, Row]) -> str:
    """What distillation adds, by seeds that have both students."""
    pairs = [(rows.get(f"student-plain-{s}"), rows.get(f"student-distilled-{s}")) for s in SEEDS]
    both = [(p, d) for p, d in pairs if p is not None and d is not None]
    if not both:
        return "Gain by distillation: did not finish."
    plain, distilled = _said([100 * p.accuracy for p, _ in both], 2), _said([100 * d.accuracy for _, d in both], 2)
    gain = _said([100 * (d.accuracy - p.accuracy) for p, d in both], 2)
    missing = "" if len(both) == len(SEEDS) else f" ({len(SEEDS) - len(both)} of {len(SEEDS)} seeds did not finish)"
    return (
        f"Student without distillation {plain} %, with {distilled} %: gain {gain} points, mean ± standard error over "
        f"{len(both)} seed{'s' if len(both) > 1 else ''}, paired{missing}."
    )


def _notes(rows: Mapping[str, Row]) -> str:
    hours = sum(row.hours for name, row in rows.items() if "-int8" not in name)  # which take another row's model
    return (
        f"Command: `{COMMAND}`; {hours:.1f} hours of training, on cores shared with other work. {machine_line()}.\n"
        "Test images: 10,000, used for nothing else; 5,000 of the training images are held out and watched. A first "
        "version (student trained for 12 epochs; 90 % zeros in the last row) lost more than was aimed at; 20 epochs and "
        "75 % were taken after its scores were known. Mean ± standard error over seeds. Time, on the first seed: 8 images a "
        "call, median, all models timed in turn in one process. Agreement: same class as the teacher. Corruptions at "
        "severity 3 of 5. Parameters: without zeros. × eager: the teacher in torch; × dense: the teacher converted without "
        "compression. h: hours of training per seed, without those of the model that it starts from."
    )


def replace_section(path: Path, name: str, content: str) -> None:
    """Put ``content`` between the comment lines ``<!-- name -->`` and ``<!-- /name -->`` of a Markdown file, at its end where
    it has none; the rest of the file stays."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = path.read_text() if path.exists() else ""
    block = f"{start}\n{content.strip()}\n{end}"
    if start in old and end in old:
        before, _, rest = old.partition(start)
        new = before + block + rest.partition(end)[2]
    else:
        new = f"{old.rstrip()}\n\n{block}\n".lstrip()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(new)
