"""The table of the Fashion-MNIST results, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from cnncomp.demo.common import machine_line
from cnncomp.results.rows import Row, mean_and_error

SEEDS = (0, 1, 2)
TITLES = {
    "teacher": "teacher, fp32",
    "int8": "int8 after training",
    "unstructured-90": "90 % zeros",
    "unstructured-90-int8": "90 % zeros, int8",
    "unstructured-95": "95 % zeros",
    "2of4": "2:4",
    "all": "distilled, 90 % zeros, int8",
}
COMMAND = "python -m cnncomp.results.fashion_mnist --docs docs/results.md"


def text(names: Sequence[str], rows: Mapping[str, Row], ms: Mapping[str, float]) -> str:
    """The section: one line per model, then the gain by distillation, then what it was measured with.

    Args:
        names: All rows that there should be; those that ``rows`` lacks are said not to have finished.
        ms: Median time of each compressed model, of "teacher" and of "dense", the teacher converted without compression.
    """
    teacher = rows["teacher"]
    kinds = list(teacher.corrupted)
    header = [
        "",
        "accuracy",
        "to teacher",
        "agreement",
        *kinds,
        "parameters",
        "MB",
        "× smaller",
        "ms",
        "× eager",
        "× dense",
        "h",
    ]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name in names:
        title = TITLES.get(name, name.replace("-", ", ", 1).replace("-", ", seed "))
        if name not in rows:
            lines.append([title, "did not finish", *[""] * (len(header) - 2)])
            continue
        lines.append([title, *_cells(rows[name], teacher, kinds, ms)])
    parts = ["## Fashion-MNIST", "\n".join(f"| {' | '.join(line)} |" for line in lines), _gain(rows), _notes(rows)]
    return "\n\n".join(parts)


def _cells(row: Row, teacher: Row, kinds: Sequence[str], ms: Mapping[str, float]) -> list[str]:
    time = ms.get(row.name)
    return [
        f"{row.accuracy:.2%}",
        "" if row is teacher else f"{100 * (row.accuracy - teacher.accuracy):+.2f}",
        "" if row.agreement is None else f"{row.agreement:.2%}",
        *(f"{row.corrupted[kind]:.1%}" for kind in kinds),
        f"{row.parameters:,}",
        f"{row.megabytes:.3f}",
        f"{teacher.megabytes / row.megabytes:.1f}",
        "" if time is None else f"{time:.2f}",
        "" if time is None else f"{ms['teacher'] / time:.2f}",
        "" if time is None or row is teacher else f"{ms['dense'] / time:.2f}",
        f"{row.hours:.2f}",
    ]


def _gain(rows: Mapping[str, Row]) -> str:
    """What distillation adds, by seeds that have both students."""
    pairs = [(rows.get(f"student-plain-{s}"), rows.get(f"student-distilled-{s}")) for s in SEEDS]
    both = [(p, d) for p, d in pairs if p is not None and d is not None]
    if not both:
        return "Gain by distillation: did not finish."

    def said(values: Sequence[float]) -> str:
        mean, error = mean_and_error([100 * v for v in values])
        return f"{mean:.2f}" if math.isnan(error) else f"{mean:.2f} ± {error:.2f}"

    plain, distilled = said([p.accuracy for p, _ in both]), said([d.accuracy for _, d in both])
    gain = said([d.accuracy - p.accuracy for p, d in both])
    missing = "" if len(both) == len(SEEDS) else f" ({len(SEEDS) - len(both)} of {len(SEEDS)} seeds did not finish)"
    return (
        f"Student without distillation {plain} %, with {distilled} %: gain {gain} points, mean ± standard error over "
        f"{len(both)} seed{'s' if len(both) > 1 else ''}, paired{missing}."
    )


def _notes(rows: Mapping[str, Row]) -> str:
    hours = sum(row.hours for name, row in rows.items() if not name.endswith("-int8") and name != "all")
    return (
        f"Command: `{COMMAND}`; {hours:.1f} hours of training, on cores shared with other work. {machine_line()}.\n"
        "Test images: 10,000, used for nothing else; 5,000 of the training images are held out and only watched: "
        "rates and epochs are usual ones, not searched for. Compressed models: one seed. "
        "Agreement: same class as the teacher. Corruptions at severity 3 of 5. Parameters: without zeros. ms: 8 images a call, "
        "median, all models timed in turn in one process; × dense is against the teacher converted without compression. "
        "h: hours of training."
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
