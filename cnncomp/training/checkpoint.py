"""The state of a training: in memory, to go back to, and in a file, to go on from."""

from __future__ import annotations

import copy
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnncomp.errors import ArgumentError, FileFormatError

VERSION = 1

State = dict[str, Any]


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  others' data loaders draw from it


def random_state() -> State:
    """The state of all generators that :func:`seed_everything` seeds."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    numbers = torch.from_numpy(np.asarray(keys).astype(np.int64))  # torch can't send uint32 to other processes
    state: State = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(kind), numbers, int(position), int(has_gauss), float(gauss)),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: State) -> None:
    """Put back what :func:`random_state` gave."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def snapshot(state: State) -> State:
    """A copy that later training does not change."""
    return copy.deepcopy(state)


def is_finite(state: State) -> bool:
    """Whether all floating tensors of a state dict are finite."""
    return all(
        bool(t.isfinite().all()) for t in state.values() if isinstance(t, torch.Tensor) and t.is_floating_point()
    )


def write(state: State, path: Path) -> None:
    """Write atomically: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            torch.save({"cnncomp_training": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> State | None:
    """The state in a file; None where there is no file.

    Raises:
        ArgumentError: it is a folder.
        FileFormatError: the file is damaged, of another version, or no checkpoint.
        OSError: it can't be read.
    """
    if not path.exists():
        return None
    if path.is_dir():
        raise ArgumentError("checkpoint", f"the folder {path}", "a file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what unpickling raises of a damaged file may be anything
        raise FileFormatError(f"{path} can't be read as a checkpoint: {error}") from error
    version = state.get("cnncomp_training") if isinstance(state, dict) else None
    if version != VERSION:
        raise FileFormatError(f"{path} is no checkpoint of version {VERSION} of cnncomp's training: it says {version}")
    return state
