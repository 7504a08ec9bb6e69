"""Masks: parametrizations that keep pruned weights at zero while the model trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cnncomp._modules import (
    Layer,
    WeightParametrization,
    add_parametrization,
    drop_parametrization,
    layers_of,
    parametrization_of,
    weight_parameter,
)


class Mask(WeightParametrization):
    """``weight = where(mask, weight, 0)``: pruned weights are zero and get no gradient.

    Args:
        mask: bool, of the weight's shape; False where the weight is pruned.
        pattern: Name of the pattern that the mask follows.
        note: What is special about it in this layer, "" if nothing.

    While ``watched`` is set, ``gradient`` sums up what backward passes give for the masked weight, pruned entries included.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, pattern: str = "unstructured", note: str = "") -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.pattern, self.note = pattern, note
        self.watched = False
        self.gradient: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        # Not weight * mask, which gives −0 for pruned negative weights and NaN for infinite ones.
        masked = torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
        if self.watched and masked.requires_grad:
            masked.register_hook(self._take)
        return masked

    def _take(self, gradient: Tensor) -> None:
        total = gradient.detach().clone()
        self.gradient = total if self.gradient is None else self.gradient + total

    def right_inverse(self, weight: Tensor) -> Tensor:
        # Zeroed here too, so that the parameter in the state_dict shows what the model computes with.
        return self.forward(weight)

    def extra_repr(self) -> str:
        note = f", {self.note}" if self.note else ""
        return f"sparsity={1.0 - self.mask.float().mean().item():.4f}, pattern={self.pattern}{note}"


def mask_of(layer: nn.Module) -> Tensor | None:
    """The layer's mask (bool, of the weight's shape), or None where it has none."""
    found = parametrization_of(layer, Mask)
    return None if found is None else found.mask


def apply_mask(layers: list[Layer], mask: Tensor, pattern: str = "unstructured", note: str = "") -> Mask:
    """Give ``mask`` to all ``layers``, which share one weight; masks that are there already are updated in place."""
    shared = next((m for m in (parametrization_of(layer, Mask) for layer in layers) if m is not None), None)
    if shared is None:
        shared = Mask(mask, pattern, note)
    else:
        shared.mask.copy_(mask)
        shared.pattern, shared.note = pattern, note
    for layer in layers:
        if parametrization_of(layer, Mask) is None:
            add_parametrization(layer, shared)
        else:
            with torch.no_grad():
                parameter = weight_parameter(layer, "")
                parameter.copy_(shared(parameter))
    return shared


@contextmanager
def temporarily_masked(parameter: Tensor, mask: Tensor) -> Iterator[None]:
    """Zeros in ``parameter`` where ``mask`` is False; afterwards its values again."""
    with torch.no_grad():
        saved = parameter.detach().clone()
        parameter.masked_fill_(~mask, 0)
        try:
            yield
        finally:
            parameter.copy_(saved)


def remove_masks(model: nn.Module) -> nn.Module:
    """Make the pruning permanent, in place: weights keep their zeros, masks go, the state_dict is the plain one again.

    Quantisation stays. Training afterwards would fill the zeros again. A model without masks is returned as it is.

    Returns:
        ``model``.
    """
    for name, layer in layers_of(model).items():
        mask = mask_of(layer)
        if mask is None:
            continue
        with torch.no_grad():
            weight_parameter(layer, name).masked_fill_(~mask, 0)
        drop_parametrization(layer, Mask)
    return model
