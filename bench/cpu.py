"""CPU inference engines side by side: ``python -m bench.cpu``, or ``make bench-cpu``, which installs the peers first.

ResNet-50 and MobileNetV2, dense, with zeros, and in int8, in every engine that is there, each in a process of its own, on the
same weights, masks and images. One engine runs, the others are stopped; rounds in shuffled order; medians. Outputs are compared
with the float model's, and an engine whose output is wrong is not timed.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.options import chosen
from bench.peers import networks, peaks, report
from bench.peers.case import Case
from bench.peers.environments import ENVIRONMENTS
from bench.peers.race import Engine, Entry, Worker, cores, rounds, started
from cnncomp.demo.common import machine
from cnncomp.dispatch import cpu_name

HERE = Path(sys.executable)
RUNTIMES = ENVIRONMENTS["runtimes"].python

#: Engines, and whether zeros in the weights make them faster: the others run only the variants without.
ENGINES: dict[str, tuple[Engine, bool]] = {
    e.module: (e, sparse)
    for e, sparse in (
        (Engine("cnncomp", "cnncomp", HERE), True),
        (Engine("torch eager", "torch_eager", HERE), False),
        (Engine("torch.compile", "torch_compile", HERE), False),
        (Engine("torchao", "torchao", HERE), False),
        (Engine("ONNX Runtime", "onnxruntime", RUNTIMES), False),
        (Engine("OpenVINO", "openvino", RUNTIMES), False),
        (Engine("LiteRT", "litert", ENVIRONMENTS["litert"].python), False),
        (Engine("DeepSparse", "deepsparse", ENVIRONMENTS["deepsparse"].python), True),
    )
}

#: cnncomp's variants that also run with twice the threads, and at these batches.
SCALED = (("resnet50", "dense"), ("resnet50", "sparse-90"), ("mobilenet_v2", "int8"))
BATCHES = (1, 2, 4, 8, 16, 32)

#: What can be done to a network.
VARIANTS = list(dict.fromkeys(v.name for of_network in networks.VARIANTS.values() for v in of_network))

#: A float engine's largest error, relative to the largest output, and an int8 one's least cosine.
MAX_ERROR, MIN_COSINE = 1e-3, 0.95

console = Console(width=None if sys.stdout.isatty() else 150)
progress = Console(stderr=True)


def say(text: str) -> None:
    progress.print(f"· {text}", style="dim", highlight=False, markup=False)


def wanted(engine: str, variant: networks.Variant) -> bool:
    """Whether the engine has something to show on this variant."""
    if engine.startswith("torch_") and variant.int8 or engine == "torchao" and not variant.int8:
        return False
    if variant.pattern != "unstructured":
        return engine == "cnncomp"
    return not variant.sparsity or ENGINES[engine][1]


def wrong(worker: Worker, least_cosine: float) -> str:
    """Why the worker's output is not that of the float model; empty if it is."""
    ready = worker.ready
    if worker.case.int8 and ready["cosine"] < least_cosine:
        return f"wrong output: cosine {ready['cosine']:.3f} to the float model's"
    if not worker.case.int8 and ready["error"] > MAX_ERROR:
        return f"wrong output: off by {ready['error']:.1e} of the largest"
    return ""


class Race:
    """One network after another; collects records, and lines about what was skipped."""

    def __init__(self, folder: Path, threads: int, batch: int, quick: bool, n: int) -> None:
        self.folder, self.threads, self.batch, self.quick, self.rounds = folder, threads, batch, quick, n
        self.peaks: dict[str, float] = {}
        self.records: list[report.Record] = []
        self.skipped: list[dict[str, str]] = []

    def skip(self, engine: Engine, case: Case, why: str) -> None:
        line = {"network": case.network, "variant": case.variant, "engine": engine.name, "why": why}
        if not why.startswith("not installed") or not any(s["engine"] == engine.name for s in self.skipped):
            say(f"skipped: {engine.name} on {case.network} {case.variant}: {why}")
        self.skipped.append(line)

    def measure_peaks(self) -> None:
        found = peaks.measure(self.folder)
        if isinstance(found, str):
            say(found)
        else:
            self.peaks = found

    def network(self, network: str, engines: Sequence[str], names: Sequence[str], scaling: bool) -> None:
        """Race the variants of one network that ``names`` are of in ``engines``, and then cnncomp alone at other sizes."""
        variants = [v for v in networks.VARIANTS[network] if v.name in names]
        if self.quick:
            variants = [v for v in variants if v.name in ("dense", "sparse-90", "int8")]
        size, images = (64, 4) if self.quick else (224, 16)
        plan: list[tuple[Engine, Case, int]] = []
        for variant in variants:
            able = [e for e in engines if wanted(e, variant)]
            if not able:
                continue
            say(f"{network} {variant.name}: writing the model")
            folder = self.folder / f"{network}-{variant.name}"
            case = networks.write(network, variant, folder, batch=self.batch, size=size, images=images * self.batch)
            plan += [(ENGINES[e][0], case, self.threads) for e in able]
            if scaling and "cnncomp" in able and (network, variant.name) in SCALED:
                plan.append((ENGINES["cnncomp"][0], case, 2 * self.threads))
        say(f"{network}: starting {len(plan)} engines, which takes some minutes")
        with started(plan, self.folder, self.skip, say) as workers:
            right = []
            for worker in workers:
                # Of small images little more is left than noise that rounding changes.
                if why := wrong(worker, 0.5 if self.quick else MIN_COSINE):
                    self.skip(worker.engine, worker.case, why)
                else:
                    right.append(worker)
            self._time([Entry(w, self.batch) for w in right], self.rounds, f"{network}: timing")
            if scaling:
                self._time(self._batches(right), max(self.rounds // 2, 2), f"{network}: larger batches", least=2)

    def _batches(self, workers: Sequence[Worker]) -> list[Entry]:
        """cnncomp's at other batches than that of the main table."""
        return [
            Entry(w, batch)
            for w in workers
            if w.engine.module == "cnncomp" and w.threads == self.threads and (w.case.network, w.case.variant) in SCALED
            for batch in BATCHES[: 3 if self.quick else None]
            if batch != self.batch
        ]

    def _time(self, entries: list[Entry], n: int, title: str, least: int = 5) -> None:
        seconds, warm = (0.05, 0.02) if self.quick else (0.5, 0.15)
        say(f"{title}: {len(entries)} in {n} rounds")
        rounds(entries, n, lambda _: None, warm=warm, seconds=seconds, least=least)
        for entry in entries:
            if entry.failed:
                self.skip(entry.worker.engine, entry.worker.case, entry.failed)
            elif entry.ms:
                self.records.append(report.record(entry, cpu_name(), self.peaks))


def main(
    engines: Annotated[str, typer.Option(help=f"Some of {', '.join(ENGINES)}, with commas.")] = "",
    only: Annotated[str, typer.Option("--networks", help=f"Some of {', '.join(networks.VARIANTS)}.")] = "",
    variants: Annotated[str, typer.Option(help=f"Some of {', '.join(VARIANTS)}.")] = "",
    n: Annotated[int, typer.Option("--rounds", min=1, help="Times that each engine gets its turn.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every engine, each on a processor of its own.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 1,
    scaling: Annotated[bool, typer.Option(help="Also cnncomp with twice the threads and at batches up to 32.")] = True,
    quick: Annotated[bool, typer.Option(help="Small images, few variants and rounds: shows that it works.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for models, logs and results.")] = Path("build/bench"),
) -> None:
    """Race the engines and print the tables; records go to OUT/cpu.json, a picture to OUT/cpu.png."""
    names = chosen(engines, list(ENGINES), "--engines")
    picked = chosen(only, list(networks.VARIANTS), "--networks")
    done = chosen(variants, VARIANTS, "--variants")
    try:
        cores(threads)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--threads") from error
    folder = (out / "peers").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    race = Race(folder, threads, batch, quick, min(n, 2) if quick else n)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # through the workers' ends
    say("measuring the core's limits")
    race.measure_peaks()
    for network in picked:
        race.network(network, names, done, scaling and has_cores(2 * threads))
    finish(race, out)


def has_cores(threads: int) -> bool:
    try:
        return bool(cores(threads))
    except ValueError:
        say(f"no rows with {threads} threads: there are fewer processors")
        return False


def finish(race: Race, out: Path) -> None:
    """Tables, JSON and picture."""
    about = {**machine(), "threads": race.threads, "batch": race.batch, "quick": race.quick}
    main_rows = [r for r in race.records if (r.threads, r.batch) == (race.threads, race.batch)]
    title = f"{about['cpu']} ({about['isa']}), {race.threads} thread(s), batch {race.batch}, medians"
    for network in dict.fromkeys(r.network for r in main_rows):
        report.show(
            console, f"{network}: {title}", report.network_table([r for r in main_rows if r.network == network])
        )
    table, bars = report.bars_table(report.medians(race.records, race.threads, race.batch), "512" in about["isa"])
    report.show(console, "Ratios, above 1 where cnncomp is faster", table)
    table, scaling = report.scaling_table(race.records, race.threads, race.batch)
    report.show(console, "cnncomp with more threads, and images/s at larger batches", table)
    if race.peaks:
        console.print(f"\nThe core: {', '.join(peaks.texts(race.peaks))}", highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    more = {"skipped": race.skipped, "bars": bars, "scaling": scaling}
    report.write(out / "cpu.json", about, race.peaks, race.records, **more)
    if main_rows:
        report.plot(main_rows, title, out / "cpu.png")
    say(f"{out / 'cpu.json'}, {out / 'cpu.png'}")


if __name__ == "__main__":
    typer.run(main)
