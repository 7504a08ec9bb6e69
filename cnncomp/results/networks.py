"""The networks of the Fashion-MNIST results, and how the teacher is trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from cnncomp.models.thin_resnet import ThinResNet
from cnncomp.results.idx import FashionMnist, ImageSet
from cnncomp.training import Batches, Settings, shift_and_flip, train
from cnncomp.training.batches import as_float

TEACHER = Settings(epochs=12, lr=0.1, precision="bf16", channels_last=True)


def accuracy(model: nn.Module, images: ImageSet, batch: int = 250) -> float:
    """Fraction of ``images`` whose label is the class that ``model`` says."""
    return float((predict(model, images.images, batch).argmax(1) == images.labels).float().mean())


def predict(model: nn.Module, images: Tensor, batch: int = 250) -> Tensor:
    """Logits (N, classes) for (N, C, H, W) images, uint8 or float, in fp32."""
    with torch.inference_mode():
        return torch.cat([model(as_float(x)) for x in images.split(batch)])


def build_teacher() -> ThinResNet:
    """1,209,834 parameters, 36 million multiplications per 28×28 image; untrained."""
    return ThinResNet((32, 64, 128, 256))


def train_teacher(data: FashionMnist, out: Path, settings: Settings = TEACHER) -> ThinResNet:
    """The trained teacher; its checkpoint stays in ``out``, from where a second call reads it."""
    torch.manual_seed(settings.seed)
    model = build_teacher()
    train(
        model,
        Batches(data.train.images, data.train.labels, 128, augment=shift_and_flip(), seed=settings.seed),
        settings,
        validate=lambda m: accuracy(m, data.held_out),
        checkpoint=out / "teacher.ckpt",
        checkpoint_every=100,
        log=out / "teacher.csv",
        title="teacher",
    )
    return model
