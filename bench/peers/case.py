"""A model in files: what a worker of any engine is given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One variant of a network. ``macs``: multiply-adds of a call, all and without the zeros.

    In ``folder``: ``weights.safetensors`` (the state dict), ``graph.json`` with ``graph.npz`` (the same network with its
    BatchNorm folded, see :func:`bench.peers.networks.describe`), ``input.npy``, ``output.npy`` (of the float model) and
    ``calibration.npy``.
    """

    folder: Path
    network: str
    variant: str
    int8: bool
    batch: int
    macs: tuple[int, int]

    def write(self) -> None:
        values = {k: v for k, v in self.__dict__.items() if k != "folder"}
        (self.folder / "case.json").write_text(json.dumps(values))

    @classmethod
    def read(cls, folder: Path) -> Case:
        values = json.loads((folder / "case.json").read_text())
        return cls(folder, **{**values, "macs": tuple(values["macs"])})

    def array(self, name: str) -> Any:
        """``input``, ``output`` or ``calibration``."""
        return np.load(self.folder / f"{name}.npy")

    def graph(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The operations and the tensors that they name."""
        with np.load(self.folder / "graph.npz") as tensors:
            return json.loads((self.folder / "graph.json").read_text()), dict(tensors)

    def calibration_batches(self) -> list[Any]:
        """The calibration images, as many at a time as the model takes."""
        images, n = self.array("calibration"), self.batch
        return [images[i : i + n] for i in range(0, len(images) - n + 1, n)]
