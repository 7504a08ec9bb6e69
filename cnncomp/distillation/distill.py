"""``cnncomp.distill``: train a student to say what a teacher says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp._batches import evaluating
from cnncomp.distillation.hints import Features, build_projections, hint_loss
from cnncomp.distillation.losses import soft_cross_entropy
from cnncomp.errors import ArgumentError, DeviceError
from cnncomp.training.loop import History, Validate, check_training, cross_entropy, split_batch, train
from cnncomp.training.settings import Settings

#: Fine-tuning after pruning: few epochs at a low rate, for the weights that are left are almost right.
FINETUNE = Settings(epochs=3, lr=0.02, warmup=0.1, schedule="cosine")


#: Of the labels' term, where there are labels and nothing is said.
LABEL_WEIGHT = 0.1


class _Student(nn.Module):
    """The student, with its hints' projections, as one module: what is trained, synchronised and kept in checkpoints."""

    def __init__(self, student: nn.Module, features: Features, hints: Mapping[str, str]) -> None:
        super().__init__()
        self.student = student
        self.projections = nn.ModuleList()
        self.features, self.hints = features, hints

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits = self.student(x)
        found = [self.features.values[name] for name in self.hints]
        return logits, [p(f) for p, f in zip(self.projections, found, strict=True)]


@dataclass
class _Objective:
    """The loss of a batch; the arguments are those of :func:`distill`."""

    teacher: nn.Module
    features: Features
    hints: list[str]
    temperature: float
    label_weight: float | None
    hint_weight: float

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        logits, projected = model(x)
        loss = soft_cross_entropy(logits, target, self.temperature)
        weight = LABEL_WEIGHT if self.label_weight is None else self.label_weight
        if weight and (y is not None or self.label_weight is not None):
            loss = (1 - weight) * loss + weight * cross_entropy(nn.Identity(), logits, y)
        for ours, name in zip(projected, self.hints, strict=True):
            loss = loss + self.hint_weight * hint_loss(ours, self.features.values[name])
        return loss


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    settings: Settings | None = None,
    *,
    temperature: float = 4.0,
    label_weight: float | None = None,
    hints: Mapping[str, str] | None = None,
    hint_weight: float = 1.0,
    validate: Validate | None = None,
    after_step: Callable[[int], object] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    log: str | Path | None = None,
    title: str = "distilling",
    progress: bool = True,
) -> History:
    """Train ``student`` in place on the teacher's softened probabilities, labels where there are some, and feature hints.

    The loss is ``(1 − w)·T²·CE(softmax(teacher/T), student/T) + w·CE(labels) + h·Σ hints``, w = ``label_weight``,
    h = ``hint_weight`` (Hinton et al., 2015; hints after Romero et al., "FitNets", 2014, with learned projections to the
    teacher's channels, which are thrown away afterwards). Batches of images alone are learnt from the teacher only: any
    unlabelled images of the kind that the model will see do.

    Args:
        student: Trained; left in eval mode.
        teacher: Runs in eval mode without gradients and is not changed; a converted model will do.
        data: Batches of (images, labels) or of images alone.
        settings: As in :func:`cnncomp.training.train`.
        temperature: T, above 0.
        label_weight: w, 0 to 1; above 0 every batch needs labels. None: 0.1 for batches that have labels.
        hints: Names of the student's modules, each with the name of the teacher's module that it imitates.
        hint_weight: h, 0 or more.
        validate, after_step, checkpoint, checkpoint_every, log, title, progress: As in :func:`cnncomp.training.train`.

    Raises:
        ArgumentError: No batch, a batch without labels though ``label_weight`` is given, classes that don't match, an
            unknown module, a teacher that shares weights with the student, or a number out of its range.
        DeviceError: Teacher and student lie on different devices.
        TrainingError: The loss is not finite.
    """
    _check(student, teacher, temperature, label_weight, hint_weight)
    settings = Settings() if settings is None else settings
    check_training(student, data, settings)
    hints = dict(hints or {})
    with ExitStack() as stack:
        stack.enter_context(evaluating(teacher))
        ours = stack.enter_context(Features(student, list(hints), "student"))
        theirs = stack.enter_context(Features(teacher, list(hints.values()), "teacher"))
        model = _Student(student, ours, hints)
        _try_out(model, teacher, theirs, data, settings.seed)

        objective = _Objective(teacher, theirs, list(hints.values()), temperature, label_weight, hint_weight)
        return train(
            model,
            data,
            settings,
            objective=objective,
            validate=None if validate is None else lambda m: validate(student),
            after_step=after_step,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            log=log,
            title=title,
            progress=progress,
            # As floats: 4 and 4.0 are the same temperature.
            identity=repr(
                (
                    float(temperature),
                    None if label_weight is None else float(label_weight),
                    sorted(hints.items()),
                    float(hint_weight),
                )
            ),
        )


def finetune(
    model: nn.Module, parent: nn.Module, data: Iterable[Any], settings: Settings = FINETUNE, **options: Any
) -> History:
    """Self-distillation: train a pruned or quantised ``model`` in place to say what its dense ``parent`` said.

    The default recipe after pruning: the parent's probabilities hold more about each image than its label, and unlabelled
    images do. As the ``finetune`` of a recipe: ``Recipe(sparsity=0.9, finetune=lambda m: finetune(m, parent, loader))``.

    Args:
        parent: The dense model, for instance ``copy.deepcopy(model)`` from before pruning.
        options: As in :func:`distill`; ``temperature`` is 2 by default, for the two are close.

    Raises:
        As :func:`distill` does.
    """
    return distill(model, parent, data, settings, **{"temperature": 2.0, "title": "fine-tuning", **options})


def check_temperature(temperature: float) -> None:
    if not isinstance(temperature, Real) or not 0 < temperature < math.inf:
        raise ArgumentError("temperature", repr(temperature), "a finite number above 0")


def check_weight(name: str, weight: float, largest: float, expected: str) -> None:
    if not isinstance(weight, Real) or not 0 <= weight <= largest or weight == math.inf:
        raise ArgumentError(name, repr(weight), expected)


def _check(
    student: nn.Module, teacher: nn.Module, temperature: float, label_weight: float | None, hint_weight: float
) -> None:
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise ArgumentError(name, type(model).__name__, "a torch.nn.Module")
    if not any(True for _ in student.parameters()):
        raise ArgumentError("student", "a model without parameters", "one that can be trained")
    check_temperature(temperature)
    if label_weight is not None:
        check_weight("label_weight", label_weight, 1, "0 to 1, or None")
    check_weight("hint_weight", hint_weight, math.inf, "a finite number, 0 or more")
    shared = {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    if shared:
        raise ArgumentError(
            "teacher", f"{len(shared)} of the student's parameters", "a model of its own (copy.deepcopy)"
        )
    devices = {t.device for m in (student, teacher) for t in itertools.chain(m.parameters(), m.buffers())}
    if len(devices) > 1:
        raise DeviceError("teacher", " and ".join(sorted(map(str, devices))), "the student's device")


def _try_out(model: _Student, teacher: nn.Module, theirs: Features, data: Iterable[Any], seed: int) -> None:
    """One batch through both: the classes match, and the hints' projections get their channels."""
    if isinstance(data, Iterator):
        raise ArgumentError("data", "an iterator", "one that can be iterated anew, such as a DataLoader or a list")
    batch = next(iter(data), None)
    if batch is None:
        raise ArgumentError("data", "no batches", "at least one")
    x = split_batch(batch)[0][:2].to(next(model.student.parameters()).device)
    with torch.no_grad(), evaluating(model.student):
        soft_cross_entropy(model.student(x), teacher(x))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.projections = build_projections(model.hints, model.features.values, theirs.values)
