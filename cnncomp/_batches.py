"""What calibrating functions share: batches of any usual form, eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp.errors import CalibrationError


def inputs_of(batch: Any, index: int, device: torch.device) -> tuple[list[Tensor], dict[str, Any]]:
    """Positional and keyword arguments to call the model with, checked and moved to ``device``."""
    if isinstance(batch, Mapping):
        return [], {key: _input(v, index, device) if isinstance(v, Tensor) else v for key, v in batch.items()}
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    return [_input(first, index, device)], {}


def _input(x: Any, index: int, device: torch.device) -> Tensor:
    if not isinstance(x, Tensor):
        raise CalibrationError(f"calibration batch {index}: got {type(x).__name__}, expected a tensor")
    if not x.numel():
        raise CalibrationError(f"calibration batch {index}: got shape {tuple(x.shape)}, expected at least one input")
    if x.is_floating_point() and not torch.isfinite(x).all():
        raise CalibrationError(f"calibration batch {index}: NaN or infinity in the input")
    return x.to(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module's own training flag again."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
