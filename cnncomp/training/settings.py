"""How to train: optimiser, schedule, precision, seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from cnncomp.errors import ArgumentError

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("onecycle", "cosine", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Settings:
    """How :func:`cnncomp.training.train` trains.

    Args:
        epochs: Passes over the data.
        lr: The highest learning rate.
        optimizer: "sgd" (with Nesterov momentum) or "adamw".
        momentum: Of SGD.
        weight_decay: Of weights; biases and BatchNorms have none.
        schedule: "onecycle": linear up during ``warmup``, then linear to zero (after Smith, "Super-Convergence", 2017);
            "cosine": half a cosine to zero, after a linear ``warmup``; "constant".
        warmup: Fraction of the training in which the rate rises.
        clip_norm: Largest norm of the gradient; None for any.
        precision: "fp32", "bf16" or "fp16" (autocast; fp16 with loss scaling). "auto": on a GPU bf16 where it has it, else
            fp16; on a CPU fp32.
        channels_last: Keep model and images in that layout, which is faster for convolutions, above all in bf16.
        seed: Of everything random in training.
        patience: Stop after so many epochs without a better validation; None: never.

    Raises:
        ArgumentError: A value that can't be used.
    """

    epochs: int = 10
    lr: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "onecycle"
    warmup: float = 0.2
    clip_norm: float | None = None
    precision: str = "auto"
    channels_last: bool = False
    seed: int = 0
    patience: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ArgumentError(name, repr(getattr(self, name)), f"one of {', '.join(choices)}")
        self._check("epochs", int, lambda v: v >= 0, "a whole number, 0 or more")
        self._check("lr", float, lambda v: v > 0, "a finite number above 0")
        self._check("momentum", float, lambda v: 0 <= v < 1, "0 to below 1")
        self._check("weight_decay", float, lambda v: v >= 0, "a finite number, 0 or more")
        self._check("warmup", float, lambda v: 0 <= v < 1, "0 to below 1")
        self._check("seed", int, lambda v: True, "a whole number")
        if self.clip_norm is not None:
            self._check("clip_norm", float, lambda v: v > 0, "a finite number above 0, or None")
        if self.patience is not None:
            self._check("patience", int, lambda v: v >= 1, "a whole number, 1 or more, or None")

    def _check(self, name: str, kind: type, fits: Callable[[Any], bool], expected: str) -> None:
        """Raise ArgumentError unless the value is a finite number that fits, a whole one for ``int``."""
        value = getattr(self, name)
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not fits(value):
            raise ArgumentError(name, repr(value), expected)

    def rate(self, progress: float) -> float:
        """The learning rate when the fraction ``progress`` of the training is done."""
        if self.schedule == "constant":
            return self.lr
        if progress < self.warmup:
            return self.lr * (0.1 + 0.9 * progress / self.warmup)
        left = (1 - progress) / (1 - self.warmup)
        return self.lr * (left if self.schedule == "onecycle" else 0.5 * (1 - math.cos(math.pi * left)))

    def autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        """What autocast computes in on ``device``; None for fp32."""
        precision = self.precision
        if precision == "auto":
            if device.type != "cuda":
                return None
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of all parameters that take a gradient.

        Raises:
            ArgumentError: there is none.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise ArgumentError("model", "no parameter that takes a gradient", "one that can be trained")
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, self.lr)
        return torch.optim.SGD(groups, self.lr, self.momentum, nesterov=self.momentum > 0)
