"""Calibration batches, run through a model as often as the methods need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp._batches import evaluating, inputs_of
from cnncomp.errors import CalibrationError
from cnncomp.progress import track


class Feed:
    """Runs a model on calibration batches, in eval mode and without gradients.

    Args:
        model: the model.
        calibration: as in :func:`cnncomp.quantize`.
        again: whether it will run more than once; all batches are kept in memory then.
        progress: show a bar on a terminal when a run takes more than a second.

    Raises:
        CalibrationError: no batches, but something else. A call also raises it for no batch at all, or one that is no tensor
            or holds NaN or infinity.
    """

    def __init__(self, model: nn.Module, calibration: Tensor | Iterable[Any], again: bool, progress: bool) -> None:
        batches = [calibration] if isinstance(calibration, Tensor) else calibration
        if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Mapping)):
            raise CalibrationError(f"calibration: got {type(calibration).__name__}, expected batches of input tensors")
        self.model, self.progress = model, progress
        self.batches: Iterable[Any] = list(batches) if again else batches
        self.index = -1  # of the batch that is running

    def __call__(self, title: str = "calibrating", each: Callable[[Any], None] | None = None) -> None:
        """Run all batches; ``each`` gets what the model returns."""
        self.index = -1
        total = len(self.batches) if isinstance(self.batches, Sized) else None
        with evaluating(self.model), torch.no_grad(), track(title, total, self.progress) as advance:
            device = next(self.model.parameters()).device
            for batch in self.batches:
                self.index += 1
                args, kwargs = inputs_of(batch, self.index, device)
                result = self.model(*args, **kwargs)
                if each is not None:
                    each(result)
                advance("")
        if self.index < 0:
            raise CalibrationError(
                "calibration: got no batches, expected at least one (was an iterator used up before?)"
            )
