"""Accuracy, agreement with the dense parent, and accuracy on corrupted images, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnncomp._batches import evaluating
from cnncomp.errors import ArgumentError
from cnncomp.evaluation.corruptions import CORRUPTIONS, corrupt
from cnncomp.progress import track
from cnncomp.training.batches import as_float
from cnncomp.training.loop import check_labels

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """One model's scores, fractions from 0 to 1.

    Attributes:
        accuracy: Images whose label is the model's class.
        agreement: Images for which model and parent say the same class, right or wrong; None without a parent.
        corrupted: Accuracy by corruption.
        corrupted_agreement: Agreement by corruption, both seeing the corrupted image; empty without a parent.
        images: How many there were.
    """

    accuracy: float
    agreement: float | None
    corrupted: dict[str, float]
    corrupted_agreement: dict[str, float]
    images: int


def evaluate(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    parent: Model | None = None,
    corruptions: Sequence[str] = CORRUPTIONS,
    severity: int = 3,
    normalize: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 250,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Score a model, compressed, converted or not, on more than its accuracy.

    A compressed model can keep its accuracy and yet err on other images than its parent, or lose most where images are worse
    than those it was tuned on: agreement shows the first, corruptions the second.

    Args:
        model: Takes (N, C, H, W) images, gives (N, classes) logits. A module is run in eval mode.
        images: (N, C, H, W), uint8, or float from 0 to 1.
        labels: (N,) integers.
        parent: The model that it was made from.
        corruptions: Of :data:`CORRUPTIONS`.
        severity: Of the corruptions, 1 to 5.
        normalize: What the models want done to images from 0 to 1, such as subtracting a mean.
        batch_size: Images per call.
        seed: Of the noise; each batch has its own.

    Raises:
        ArgumentError: No image, another number of labels, an unknown corruption, or logits that don't fit the labels.
        DtypeError: Images of integers other than uint8.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ArgumentError("batch_size", repr(batch_size), "a whole number, 1 or more")
    if len(images) == 0 or len(images) != len(labels):
        raise ArgumentError("labels", f"{len(labels)} for {len(images)} images", "one for each image, and at least one")
    kinds = ("clean", *corruptions)
    right, same = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0)
    steps = range(0, len(images), batch_size)
    with _ready(model, parent), track("evaluating", len(steps), show=progress) as advance:
        for start in steps:
            x, y = images[start : start + batch_size], labels[start : start + batch_size]
            x = as_float(x)
            for kind in kinds:
                seen = x if kind == "clean" else corrupt(x, kind, severity, seed + start)
                seen = seen if normalize is None else normalize(seen)
                ours = classes_of(model, seen, y)
                right[kind] += int((ours == y.to(ours.device)).sum())
                if parent is not None:
                    same[kind] += int((classes_of(parent, seen, y) == ours).sum())
            advance("")
    n = len(images)
    return Evaluation(
        accuracy=right["clean"] / n,
        agreement=None if parent is None else same["clean"] / n,
        corrupted={kind: right[kind] / n for kind in corruptions},
        corrupted_agreement={} if parent is None else {kind: same[kind] / n for kind in corruptions},
        images=n,
    )


@contextmanager
def _ready(*models: Model | None) -> Iterator[None]:
    """Inference mode, and those that are modules in eval mode."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for model in models:
            if isinstance(model, nn.Module):
                stack.enter_context(evaluating(model))
        yield


def classes_of(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """The class that ``model`` says for each image.

    Raises:
        ArgumentError: it gives no (N, classes) logits, or the labels ``y`` (N,) are no integers or no classes of its own.
    """
    logits = model(x)
    check_labels(y, logits)
    return logits.argmax(1)


def table(evaluations: Mapping[str, Evaluation]) -> str:
    """The scores as a Markdown table, percent; one row per model."""
    kinds = list(dict.fromkeys(kind for e in evaluations.values() for kind in e.corrupted))
    header = ["", "accuracy", "agrees with parent", *kinds]
    lines = [" | ".join(header), "|".join(["---", *["---:"] * (len(header) - 1)])]
    for name, e in evaluations.items():
        cells = [e.accuracy, e.agreement, *(e.corrupted.get(kind) for kind in kinds)]
        lines.append(" | ".join([name, *("" if c is None else f"{c:.2%}" for c in cells)]))
    return "\n".join(f"| {line} |" if " | " in line else f"|{line}|" for line in lines)
