"""Rows of a results table: one JSON file each, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Row:
    """One trained or compressed model, scored.

    Attributes:
        name: Of the row, and of its file.
        accuracy: On the test images, a fraction.
        agreement: With the parent, a fraction; None for the parent itself.
        corrupted: Accuracy by corruption.
        parameters: Without pruned ones.
        megabytes: Of its file, 10⁶ bytes.
        hours: Spent on training it, without those of the model that it started from.
    """

    name: str
    accuracy: float
    agreement: float | None
    corrupted: dict[str, float]
    parameters: int
    megabytes: float
    hours: float


def write_row(row: Row, folder: Path) -> None:
    """Write atomically: there is a whole row or none."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{row.name}.json"
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(asdict(row), indent=1))
    part.replace(path)


def read_row(name: str, folder: Path) -> Row | None:
    """The row, or None where it has not been finished."""
    path = folder / f"{name}.json"
    return Row(**json.loads(path.read_text())) if path.exists() else None


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error: the sample's standard deviation over √n; NaN for fewer than two values."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
