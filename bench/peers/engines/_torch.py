"""What the engines on torch share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import cnncomp
from bench.peers.case import Case


def model_of(case: Case) -> nn.Module:
    """The network as a torch module, in eval mode."""
    model = getattr(cnncomp.models, case.network)()
    model.load_state_dict(load_file(case.folder / "weights.safetensors"))
    return model.eval()


def images(case: Case) -> list[torch.Tensor]:
    """The calibration images, one batch each."""
    return [torch.from_numpy(x) for x in case.calibration_batches()]


def binder(
    model: Callable[[torch.Tensor], torch.Tensor], layout: torch.memory_format = torch.contiguous_format
) -> Callable[[Any], Callable[[], torch.Tensor]]:
    """``Loaded.bind`` of a model whose input is laid out beforehand."""

    def bind(array: Any) -> Callable[[], torch.Tensor]:
        x = torch.from_numpy(array).contiguous(memory_format=layout)

        def run() -> torch.Tensor:
            with torch.inference_mode():
                return model(x)

        return run

    return bind


def to_numpy(y: torch.Tensor) -> Any:
    return y.numpy()
