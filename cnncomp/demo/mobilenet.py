"""Part 1: an ImageNet-trained MobileNetV2 on twenty photographs, in full precision and in int8."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import cnncomp
from cnncomp import data
from cnncomp.demo.common import (
    Column,
    Options,
    Report,
    agreement,
    batches,
    compile_float,
    correct,
    forward,
    kernels,
    race,
    save_and_load,
    save_float,
    say,
)
from cnncomp.progress import track

TITLE = "MobileNetV2, ImageNet weights, 20 photographs"
COLUMNS = (
    Column("name", "model"),
    Column("top1", "top-1", "d"),
    Column("top5", "top-5", "d"),
    Column("agreement", "as fp32", ".1%"),
    Column("mb", "MB on disk", ".2f"),
    Column("ms", "ms", ".2f"),
    Column("ratio", "× eager", ".2f"),
    Column("ratio_compile", "× compile", ".2f"),
)
EAGER, COMPILE, INT8 = "torch eager, fp32", "torch.compile, fp32", "cnncomp, int8"


def pretrained() -> nn.Module:
    """MobileNetV2 with its trained weights, in eval mode."""
    model = cnncomp.models.mobilenet_v2().eval()
    model.load_state_dict(data.mobilenet_v2_weights())
    return model


def scored_photos() -> tuple[list[data.Photo], Tensor, Tensor]:
    """The photographs, as images (20, 3, 224, 224) in ImageNet's evaluation transform, and their classes (20,)."""
    photos = data.imagenet_photos()
    return photos, torch.stack([data.preprocess(p.image) for p in photos]), torch.tensor([p.label for p in photos])


def quantized(model: nn.Module, crops_per_photo: int) -> nn.Module:
    """A quantised copy: channels equalised, biases corrected, calibrated on crops of twelve photographs that are not among the
    scored. The method is the best of bench/quantization.py on photographs that are neither.
    """
    crops = torch.cat([data.augment(p.image, crops_per_photo, seed=1) for p in data.calibration_photos()])
    mixed = crops[torch.randperm(len(crops), generator=torch.Generator().manual_seed(0))]
    return cnncomp.quantize(copy.deepcopy(model), batches(mixed, 8), equalize="activations", correct_bias=True)


def varied(photos: list[data.Photo], crops: int) -> Tensor:
    """``crops`` random crops of each photograph, half of them mirrored."""
    out = []
    with track("cropping the photographs", len(photos)) as advance:
        for i, photo in enumerate(photos):
            out.append(data.augment(photo.image, crops, seed=100 + i))
            advance(photo.name)
    return torch.cat(out)


def run(options: Options) -> list[Report]:
    """Accuracy, agreement, size and latency of fp32 and int8.

    Raises:
        MissingPackageError: photographs or weights are not installed.
    """
    model = pretrained()
    photos, images, labels = scored_photos()
    say("MobileNetV2: full precision on the photographs")
    logits = forward(model, images, "scoring")
    say("MobileNetV2: int8, calibrated on twelve other photographs")
    changed = quantized(model, 1 if options.quick else 8)
    converted = cnncomp.convert(changed, images[:1], measure=not options.quick, cache=False)
    loaded, mb = save_and_load(converted, options.out / "mobilenet_v2_int8.cnncomp")
    logits_int8 = forward(loaded, images)
    crops = varied(photos, 3 if options.quick else 16)
    agree = agreement(forward(model, crops, "crops, fp32"), forward(loaded, crops, "crops, int8"))

    fp32_mb = save_float(model, options.out / "mobilenet_v2_fp32.pt")
    report = Report("mobilenet_v2", TITLE, COLUMNS)
    accuracy = {"top1": correct(logits, labels), "top5": correct(logits, labels, 5), "mb": fp32_mb}
    accuracy_int8 = {"top1": correct(logits_int8, labels), "top5": correct(logits_int8, labels, 5), "mb": mb}
    rivals: dict[str, Callable[[Tensor], Tensor]] = {EAGER: model}
    if options.compile:
        fast = compile_float(model, images[:1])
        if isinstance(fast, str):
            report.notes.append(fast)
        else:
            rivals[COMPILE] = fast
    ms = race({**rivals, INT8: loaded}, images[:1], options)
    for name in ms:
        values = {**accuracy_int8, "agreement": agree} if name == INT8 else accuracy
        ratios = {"ratio": ms[EAGER] / ms[name], "ratio_compile": ms.get(COMPILE, float("nan")) / ms[name]}
        report.rows.append({"name": name, **values, "ms": ms[name], **(ratios if name == INT8 else {})})
    report.notes += [
        "ms: batch 1, 224×224, median, timed in turn in one process. × above 1: faster.",
        f"as fp32: same first class on {len(crops)} random crops and flips of the photographs.",
        f"int8 is what was saved and loaded again: {kernels(loaded)}.",
    ]
    return [report]
