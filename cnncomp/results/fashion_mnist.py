"""Fashion-MNIST: a teacher, students, and compressed models. ``python -m cnncomp.results.fashion_mnist --help``.

Whatever is stopped goes on where it was: trainings have checkpoints, finished rows are files.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import cnncomp
from cnncomp.demo.common import Options, race, save_and_load, save_float, say
from cnncomp.errors import CnncompError
from cnncomp.evaluation import evaluate
from cnncomp.results import networks, report
from cnncomp.results.idx import FashionMnist, fashion_mnist
from cnncomp.results.networks import Trained
from cnncomp.results.rows import Row, read_row, write_row
from cnncomp.training import Settings
from cnncomp.training.batches import as_float

#: Zeros in the student that is distilled, pruned and int8.
ALL_SPARSITY = 0.75
#: Training images that int8 is calibrated on.
CALIBRATION = 1024
#: Images per call when timing.
TIMED_BATCH = 8


class Remembered:
    """A model's outputs, computed once per batch: the teacher's are asked for by each row."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._outputs = model, dict[bytes, Tensor]()

    def __call__(self, x: Tensor) -> Tensor:
        key = hashlib.sha256(x.contiguous().numpy().tobytes()).digest()
        if key not in self._outputs:
            self._outputs[key] = self._model(x)
        return self._outputs[key]


@dataclass
class Experiment:
    """Everything that the rows share.

    Args:
        data: The images.
        out: Folder of checkpoints, models and rows; it exists.
        quick: One epoch each and kernels by rule of thumb: shows that it runs.
    """

    data: FashionMnist
    out: Path
    quick: bool = False

    def settings(self, settings: Settings) -> Settings:
        return replace(settings, epochs=1) if self.quick else settings

    @cached_property
    def teacher(self) -> Trained:
        return networks.train_teacher(self.data, self.out, self.settings(networks.TEACHER))

    @cached_property
    def parent(self) -> Remembered:
        return Remembered(self.teacher.model)

    def student(self, seed: int, distilled: bool) -> Trained:
        teacher = self.teacher.model if distilled else None
        return networks.train_student(self.data, self.out, seed, teacher, self.settings(networks.STUDENT))

    def pruned(self, name: str, seed: int, sparsity: float | str, model: nn.Module | None = None) -> Trained:
        model = copy.deepcopy(self.teacher.model if model is None else model)
        settings = replace(self.settings(networks.PRUNED), seed=seed)
        return networks.prune_and_finetune(model, self.teacher.model, self.data, self.out, name, sparsity, settings)

    def quantized(self, model: nn.Module) -> nn.Module:
        images = as_float(self.data.train.images[:CALIBRATION])
        return cnncomp.quantize(copy.deepcopy(model), list(images.split(128)), progress=False)

    def example(self) -> Tensor:
        return as_float(self.data.test.images[:TIMED_BATCH])

    def score(self, name: str, model: nn.Module, hours: float, compressed: bool) -> Row:
        """The row of a trained model; a compressed one is converted and scored as it comes back from its file."""
        left = _parameters(model)
        if compressed:
            fast = cnncomp.convert(model, self.example(), measure=not self.quick, cache=False, progress=False)
            model, mb = save_and_load(fast, self.out / f"{name}.cnncomp")
        else:
            mb = save_float(model, self.out / f"{name}.pt")
        parent = None if name == "teacher" else self.parent
        test = self.data.test
        e = evaluate(model, test.images, test.labels, parent=parent, progress=False)
        return Row(name, e.accuracy, e.agreement, e.corrupted, left, mb, hours)


def _parameters(model: nn.Module) -> int:
    """Parameters but those that pruning took."""
    zeros = {
        id(layer): int((~layer.mask).sum()) for layer in model.modules() if isinstance(layer, cnncomp.pruning.Mask)
    }
    return sum(p.numel() for p in model.parameters()) - sum(zeros.values())


def _teacher(e: Experiment, name: str) -> Row:
    return e.score(name, e.teacher.model, e.teacher.hours, False)


def _int8(e: Experiment, name: str) -> Row:
    return e.score(name, e.quantized(e.teacher.model), 0.0, True)


def _student(e: Experiment, name: str, seed: int, distilled: bool) -> Row:
    trained = e.student(seed, distilled)
    return e.score(name, trained.model, trained.hours, False)


def _pruned(e: Experiment, name: str, seed: int, sparsity: float | str, int8: bool = False) -> Row:
    """int8 takes the model that the row without it trained."""
    trained = e.pruned(name.replace("-int8", ""), seed, sparsity)
    model = e.quantized(trained.model) if int8 else trained.model
    return e.score(name, model, trained.hours, True)


def _all_three(e: Experiment, name: str, seed: int) -> Row:
    trained = e.pruned(name, seed, ALL_SPARSITY, e.student(seed, True).model)
    return e.score(name, e.quantized(trained.model), trained.hours, True)


_SEEDED: dict[str, Callable[..., Row]] = {
    "unstructured-90": partial(_pruned, sparsity=0.9),
    "unstructured-90-int8": partial(_pruned, sparsity=0.9, int8=True),
    "unstructured-95": partial(_pruned, sparsity=0.95),
    "2of4": partial(_pruned, sparsity="2:4"),
    "student-plain": partial(_student, distilled=False),
    "student-distilled": partial(_student, distilled=True),
    "all": _all_three,
}
#: By name: one row for what has no seed, one per seed for the others, the first seed of all before the second.
ROWS: dict[str, Callable[[Experiment, str], Row]] = {
    "teacher": _teacher,
    "int8": _int8,
    **{f"{kind}-{seed}": partial(make, seed=seed) for seed in report.SEEDS for kind, make in _SEEDED.items()},
}


def measure(e: Experiment) -> dict[str, float]:
    """Median ms of the teacher in torch eager, of the dense converted one, and of each kind of compressed model that is
    there (its first seed), by the kind's name, timed in turn."""
    x = e.example()
    models: dict[str, Callable[[Tensor], Tensor]] = {"teacher": e.teacher.model}
    dense = cnncomp.convert(e.teacher.model, x, measure=not e.quick, cache=False, progress=False)
    models["dense"] = dense
    for kind in report.KINDS:
        path = next((p for p in (e.out / f"{kind}.cnncomp", e.out / f"{kind}-0.cnncomp") if p.exists()), None)
        if path is not None:
            models[kind] = cnncomp.load(path, replan=not e.quick)
    return race(models, x, Options(e.out, e.quick))


def main(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints, models and rows.")] = Path("build/fashion"),
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the IDX files.")] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="ROW", help="Rows to make; all by default.")] = None,
    docs: Annotated[Path | None, typer.Option(metavar="FILE", help="Markdown file to write the table into.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 1,
    quick: Annotated[bool, typer.Option(help="One epoch each: shows that it runs.")] = False,
) -> None:
    """Train, compress and score; then time all models in turn and write the table. A run that was stopped goes on."""
    torch.set_num_threads(threads)
    unknown = [name for name in only or [] if name not in ROWS]
    if unknown:
        raise typer.BadParameter(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}", param_hint="--only")
    try:
        out.mkdir(parents=True, exist_ok=True)
        e = Experiment(fashion_mnist(data, 100 if quick else 5000), out, quick)
        for name in only or ROWS:
            if read_row(name, out / "rows") is None:
                say(f"{name} ...")
                made = ROWS[name](e, name)
                write_row(made, out / "rows")
                say(f"{name}: {made.accuracy:.2%}")
        if read_row("teacher", out / "rows") is not None:
            rows = {name: row for name in ROWS if (row := read_row(name, out / "rows")) is not None}
            text = report.text(rows, measure(e))
            typer.echo(text)
            if docs is not None:
                report.replace_section(docs, "fashion-mnist", text)
    except CnncompError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
