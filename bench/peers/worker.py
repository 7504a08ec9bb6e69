"""One engine with one model in a process: ``python -m bench.peers.worker ENGINE FOLDER THREADS``.

Reads requests from stdin and answers on stdout, one JSON object a line; what libraries print goes to stderr. The first line
comes without a request: ``{"version", "note", "error", "cosine"}``, or ``{"skip": why}`` and the end.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.case import Case
from bench.peers.engines import Loaded, Unsupported


def die_with_parent() -> None:
    """Have the kernel end this process, stopped or not, when the one that started it is gone (Linux)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def private_stdout() -> Callable[[dict[str, Any]], None]:
    """Take stdout for the answers, and give what libraries print to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    return say


def compare(got: Any, expected: Any) -> dict[str, float]:
    """How near the outputs (N, classes) are to the float model's: largest error over the largest magnitude, and the least
    cosine of a row, both about the row's mean, since untrained networks give all images much the same."""
    got, expected = (np.asarray(a, np.float64) for a in (got, expected))
    if got.shape != expected.shape or not np.isfinite(got).all():
        return {"error": float("inf"), "cosine": -1.0}
    got, expected = (a - a.mean(1, keepdims=True) for a in (got, expected))
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = (got * expected).sum(1) / np.maximum(lengths, 1e-30)
    return {"error": float(np.abs(got - expected).max() / np.abs(expected).max()), "cosine": float(cosine.min())}


def times(run: Callable[[], Any], warm: float, seconds: float, least: int) -> list[float]:
    """Milliseconds of single calls: for ``seconds``, and ``least`` of them, after ``warm`` seconds and a call unmeasured."""
    run()
    end = time.perf_counter() + warm
    while time.perf_counter() < end:
        run()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < least or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def serve(case: Case, loaded: Loaded, say: Callable[[dict[str, Any]], None]) -> None:
    """Answer ``{"batch", "warm", "seconds", "least"}`` with ``{"ms": […]}`` until stdin ends."""
    x = case.array("input")
    bound = {len(x): loaded.bind(x)}
    found = compare(loaded.numpy(bound[len(x)]()), case.array("output"))
    say({"version": loaded.version, "note": loaded.note, **found})
    for line in sys.stdin:
        request = json.loads(line)
        batch = request.pop("batch")
        if batch not in bound:
            bound[batch] = loaded.bind(np.ascontiguousarray(np.resize(x, (batch, *x.shape[1:]))))
        say({"ms": times(bound[batch], **request)})


def main() -> None:
    engine, folder, threads = sys.argv[1:]
    die_with_parent()
    say = private_stdout()
    try:
        case = Case.read(Path(folder))
        loaded = importlib.import_module(f"bench.peers.engines.{engine}").load(case, int(threads))
        serve(case, loaded, say)
    except Unsupported as why:
        say({"skip": str(why)})
    except Exception as error:  # whatever a peer raises is a line in the table, not the end of the race
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        say({"skip": f"{type(error).__name__}: {first[:150]}"})


if __name__ == "__main__":
    main()
