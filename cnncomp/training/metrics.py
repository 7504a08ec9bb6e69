"""What training reports: one row per epoch, to CSV and, where it is installed, TensorBoard."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

Row = dict[str, float]


def write_csv(rows: list[Row], path: Path) -> None:
    """All rows, anew: after a resume no row stands there twice. Columns are those of any row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


class TensorBoard:
    """Scalars to TensorBoard; does nothing without a folder, or where TensorBoard isn't installed."""

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(folder))

    def add(self, row: Row) -> None:
        if self._writer is not None:
            for key, value in row.items():
                if key != "epoch":
                    self._writer.add_scalar(key, value, int(row["epoch"]))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
