"""The networks of the Fashion-MNIST results, and how they are trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp.distillation import FINETUNE, distill, finetune
from cnncomp.models.thin_resnet import ThinResNet
from cnncomp.pruning.schedule import GradualCubic, OneShot
from cnncomp.results.idx import FashionMnist, ImageSet
from cnncomp.training import Batches, History, Settings, shift_and_flip, train
from cnncomp.training.batches import as_float

TEACHER = Settings(epochs=12, lr=0.1, precision="bf16", channels_last=True)
PRUNED = replace(FINETUNE, epochs=3, lr=0.03, precision="bf16", channels_last=True)
STUDENT = Settings(epochs=20, lr=0.1, weight_decay=1e-4, precision="bf16", channels_last=True)


@dataclass
class Trained:
    """A trained model, and what happened."""

    model: nn.Module
    history: History

    @property
    def hours(self) -> float:
        """Of training, validation not counted."""
        return sum(row["seconds"] for row in self.history.rows) / 3600


def accuracy(model: nn.Module, images: ImageSet, batch: int = 250) -> float:
    """Fraction of ``images`` whose label is the class that ``model`` says."""
    return float((predict(model, images.images, batch).argmax(1) == images.labels).float().mean())


def predict(model: nn.Module, images: Tensor, batch: int = 250) -> Tensor:
    """Logits (N, classes) for (N, C, H, W) images, uint8 or float, in fp32."""
    with torch.inference_mode():
        return torch.cat([model(as_float(x)) for x in images.split(batch)])


def build_teacher() -> ThinResNet:
    """1,209,834 parameters, 37 million multiplications per 28×28 image; untrained."""
    return ThinResNet((32, 64, 128, 256))


def build_student() -> ThinResNet:
    """51,578 parameters, less than 1/20 of the teacher's, and 4.7 million multiplications per 28×28 image; untrained."""
    return ThinResNet((16, 32, 48))


def batches(data: ImageSet, seed: int) -> Batches:
    """What everything here trains on: 128 images, moved by up to two pixels, half of them mirrored."""
    return Batches(data.images, data.labels, 128, augment=shift_and_flip(), seed=seed)


def train_teacher(data: FashionMnist, out: Path, settings: Settings = TEACHER) -> Trained:
    """The trained teacher; its checkpoint stays in ``out``, from where a second call reads it."""
    torch.manual_seed(settings.seed)
    model = build_teacher()
    history = train(model, batches(data.train, settings.seed), settings, **_options(data, out, "teacher"))
    return Trained(model, history)


def train_student(
    data: FashionMnist, out: Path, seed: int, teacher: nn.Module | None, settings: Settings = STUDENT
) -> Trained:
    """The student, from the labels alone or with the help of ``teacher``; all else equal, its first weights included."""
    torch.manual_seed(seed)
    model, settings = build_student(), replace(settings, seed=seed)
    options = _options(data, out, f"student-{'plain' if teacher is None else 'distilled'}-{seed}")
    loader = batches(data.train, seed)
    if teacher is None:
        return Trained(model, train(model, loader, settings, **options))
    return Trained(model, distill(model, teacher, loader, settings, **options))


def prune_and_finetune(
    model: nn.Module,
    teacher: nn.Module,
    data: FashionMnist,
    out: Path,
    name: str,
    sparsity: float | str,
    settings: Settings = PRUNED,
) -> Trained:
    """``model``, pruned in place and fine-tuned on what ``teacher`` says.

    Args:
        sparsity: The fraction of zeros, reached by steps during the first two thirds of the epochs; or an n:m pattern, taken
            at once.
    """
    loader = batches(data.train, settings.seed)
    if isinstance(sparsity, str):
        schedule: OneShot | GradualCubic = OneShot(model, pattern=sparsity)
    else:
        schedule = GradualCubic(model, sparsity, end=2 * settings.epochs * len(loader) // 3, every=20)
    history = finetune(model, teacher, loader, settings, after_step=schedule.step, **_options(data, out, name))
    return Trained(model, history)


def _options(data: FashionMnist, out: Path, name: str) -> dict[str, Any]:
    return {
        "validate": lambda model: accuracy(model, data.held_out),
        "checkpoint": out / f"{name}.ckpt",
        "checkpoint_every": 100,
        "log": out / f"{name}.csv",
        "title": name,
    }
