"""Workers taking turns: one runs, the others are stopped; rounds in shuffled order, all on the same cores."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.peers.case import Case

ROOT = Path(__file__).parents[2]


class WorkerError(Exception):
    """A worker that said why it can't, died, or took too long."""


@dataclass(frozen=True)
class Engine:
    """An engine of the table: its name, the module in ``engines``, and the Python that has it."""

    name: str
    module: str
    python: Path

    def missing(self) -> str:
        """Why it can't run; empty if nothing is known to be missing."""
        return "" if self.python.exists() else f"not installed: {self.python} is not there"


def cores(threads: int) -> tuple[int, ...]:
    """The last ``threads`` processors that this process may run on.

    Raises:
        ValueError: there are fewer.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise ValueError(f"{threads} threads on {len(allowed)} processors")
    return tuple(allowed[-threads:])


@contextmanager
def pinned(to: tuple[int, ...]) -> Iterator[None]:
    """This thread, and the processes that it starts meanwhile, on these processors only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, to)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Worker:
    """A process with one engine and one model, pinned to ``cores``, stopped but while it answers."""

    def __init__(self, engine: Engine, case: Case, threads: int, log: Path, patience: float = 900.0) -> None:
        """Start it and wait until it is ready.

        Raises:
            WorkerError: it can't run this.
        """
        self.engine, self.case, self.threads, self.patience = engine, case, threads, patience
        self.log = log.open("w")
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        with pinned(cores(threads)):
            self.process = subprocess.Popen(
                [engine.python, "-m", "bench.peers.worker", engine.module, case.folder, str(threads)],
                cwd=ROOT,
                env={**os.environ, **limits, "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                bufsize=0,
            )
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise
        if "skip" in self.ready:
            self.close()
            raise WorkerError(self.ready["skip"])
        self._signal(signal.SIGSTOP)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer to a request, for which alone it runs.

        Raises:
            WorkerError: it died or took too long.
        """
        self._signal(signal.SIGCONT)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError as error:
            raise WorkerError(f"died; see {self.log.name}") from error
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], self.patience)
            if not ready:
                raise WorkerError(f"no answer in {self.patience:.0f} s")
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                raise WorkerError(f"died with {self.process.wait()}; see {self.log.name}")
            line += part
        return json.loads(line)

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def close(self) -> None:
        self._signal(signal.SIGKILL)  # which also ends a stopped one
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class Entry:
    """What is timed: a worker at a batch size, and its times so far. ``failed``: why it dropped out."""

    worker: Worker
    batch: int
    ms: list[float] = field(default_factory=list)
    failed: str = ""


def rounds(entries: Sequence[Entry], n: int, advance: Callable[[str], None], **request: Any) -> None:
    """Time every entry ``n`` times, each round in another order."""
    order = random.Random(0)
    for _ in range(n):
        for entry in order.sample(entries, len(entries)):
            if not entry.failed:
                try:
                    entry.ms += entry.worker.ask(batch=entry.batch, **request)["ms"]
                except WorkerError as error:
                    entry.failed = str(error)
            advance(entry.worker.engine.name)


@contextmanager
def started(
    wanted: Sequence[tuple[Engine, Case, int]],
    logs: Path,
    skip: Callable[[Engine, Case, str], None],
    say: Callable[[str], None],
) -> Iterator[list[Worker]]:
    """Workers for all that can run, started one after the other; ``skip`` hears of those that can't, ``say`` of the others."""
    with ExitStack() as stack:
        workers = []
        for engine, case, threads in wanted:
            if why := engine.missing():
                skip(engine, case, why)
                continue
            log = logs / f"{case.folder.name}-{engine.module}-{threads}.log"
            start = time.monotonic()
            try:
                workers.append(stack.enter_context(Worker(engine, case, threads, log)))
            except WorkerError as error:
                skip(engine, case, str(error))
                continue
            say(f"{case.network} {case.variant}: {engine.name} is ready after {time.monotonic() - start:.0f} s")
        yield workers
