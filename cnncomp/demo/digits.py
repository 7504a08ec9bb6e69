"""Part 2: a network trained here on scikit-learn's digits, then pruned, quantised, and both."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnncomp
from cnncomp import data
from cnncomp.convert import ConvertedModel
from cnncomp.demo.common import (
    Column,
    Options,
    Report,
    batches,
    correct,
    forward,
    kernels,
    race,
    save_and_load,
    save_float,
    say,
)
from cnncomp.models import DigitsNet
from cnncomp.progress import track

#: Images per call when timing: with one of 8×8 pixels, the calls of the layers would take longer than their kernels.
TIMED_BATCH = 8
SPARSITIES = (0.8, 0.9, 0.95)
COLUMNS = (
    Column("name", "model"),
    Column("accuracy", "accuracy", ".1%"),
    Column("mb", "MB on disk", ".3f"),
    Column("ms", "ms", ".3f"),
    Column("ratio", "× eager", ".2f"),
    Column("ratio_dense", "× dense", ".2f"),
    Column("kernels", "kernels"),
)
EAGER, DENSE = "torch eager, fp32", "cnncomp, dense"


def train(model: nn.Module, split: data.Split, epochs: int, rate: float, title: str) -> None:
    """Train in place: Adam, batches of 64, the rate falling along a half cosine."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs))
    generator = torch.Generator().manual_seed(0)
    model.train()
    with track(title, epochs) as advance:
        for _ in range(epochs):
            total = 0.0
            order = torch.randperm(len(split.train_labels), generator=generator)
            for index in order.split(64):
                loss = F.cross_entropy(model(split.train_images[index]), split.train_labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += float(loss.detach()) * len(index)
            schedule.step()
            advance(f"loss {total / len(order):.4f}")
    model.eval()


def variants(split: data.Split, quick: bool) -> dict[str, nn.Module]:
    """The trained network, and copies of it: pruned step by step with training in between, quantised, and both."""
    torch.manual_seed(0)
    model = DigitsNet()
    train(model, split, 2 if quick else 15, 2e-3, "training")
    found: dict[str, nn.Module] = {"dense": model}
    pruned = copy.deepcopy(model)
    for sparsity in SPARSITIES:
        cnncomp.prune(pruned, sparsity=sparsity)
        train(pruned, split, 1 if quick else 8, 1e-3, f"training at {sparsity:.0%} zeros")
        found[f"{sparsity:.0%} zeros"] = copy.deepcopy(pruned)
    calibration = batches(split.train_images, 64, 4)
    found["int8"] = cnncomp.quantize(copy.deepcopy(model), calibration)
    found["90% zeros, int8"] = cnncomp.quantize(copy.deepcopy(found["90% zeros"]), calibration)
    return found


def file_name(label: str) -> str:
    """ "90% zeros, int8" as "90_zeros_int8"."""
    return re.sub(r"\W+", "_", label)


def run(options: Options) -> list[Report]:
    """Accuracy, size and latency of every variant.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    split = data.digits()
    say("digits: training, and pruning with training in between")
    models = variants(split, options.quick)
    x = split.test_images[:TIMED_BATCH]
    rows: dict[str, dict[str, object]] = {}
    raced: dict[str, Callable[[Tensor], Tensor]] = {EAGER: models["dense"]}

    def accuracy(model: Callable[[Tensor], Tensor]) -> float:
        return correct(forward(model, split.test_images, batch=64), split.test_labels) / len(split.test_labels)

    rows[EAGER] = {"accuracy": accuracy(models["dense"]), "mb": save_float(models["dense"], options.out / "digits.pt")}
    for label, model in models.items():
        name = f"cnncomp, {label}"
        fast = cnncomp.convert(model, x, measure=not options.quick, cache=False)
        loaded, mb = save_and_load(fast, options.out / f"digits_{file_name(label)}.cnncomp")
        raced[name] = loaded
        rows[name] = {"accuracy": accuracy(loaded), "mb": mb, "kernels": kernels(loaded)}
    ms = race(raced, x, options)
    report = Report("digits", "DigitsNet on scikit-learn's digits, trained, pruned and quantised here", COLUMNS)
    for name, row in rows.items():
        ratios = {"ratio": ms[EAGER] / ms[name], "ratio_dense": ms[DENSE] / ms[name]} if name != EAGER else {}
        report.rows.append({"name": name, **row, "ms": ms[name], **ratios})
    report.notes += [
        f"accuracy: {len(split.test_labels)} test images. ms: {TIMED_BATCH} images a call, median, timed in turn.",
        "zeros: of the weights that are pruned, all but those of the first and the last layer. × above 1: faster.",
        *_whole_network_notes(raced),
    ]
    return [report]


def _whole_network_notes(models: dict[str, Callable[[Tensor], Tensor]]) -> list[str]:
    """Where a network went back to dense as a whole, the plan says why."""
    plans = {name: m.plan.reason for name, m in models.items() if isinstance(m, ConvertedModel)}
    return [f"{name}: {reason}" for name, reason in plans.items() if reason and name != DENSE]
