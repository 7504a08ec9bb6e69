"""Measuring: interleaved rounds in one process, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def _once(fn: Callable[[], object], cuda: bool) -> float:
    if not cuda:
        start = time.perf_counter()
        fn()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    fns: Mapping[str, Callable[[], object]],
    min_rounds: int = 7,
    max_rounds: int = 200,
    budget_s: float = 0.2,
    cuda: bool = False,
) -> dict[str, float]:
    """Median seconds of each function. Rounds call every function once, so that a slower moment of the machine hits all.

    Args:
        fns: the functions by name, called without arguments.
        budget_s: rounds go on until this much time is spent, within ``min_rounds`` and ``max_rounds``.
        cuda: time with CUDA events.
    """
    samples: dict[str, list[float]] = {name: [] for name in fns}
    for fn in fns.values():  # warm caches, pools and lazy initialisation
        fn()
    start, rounds = time.perf_counter(), 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() - start < budget_s):
        for name, fn in fns.items():
            samples[name].append(_once(fn, cuda))
        rounds += 1
    return {name: statistics.median(values) for name, values in samples.items()}
