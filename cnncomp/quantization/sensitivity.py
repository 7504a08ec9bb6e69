"""Mixed precision: which layers suffer most from 8 bit, and which of them stay float under a budget."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp._modules import Layer, parametrization_of
from cnncomp.quantization.fake import FakeQuantizeInput, FakeQuantizeWeight
from cnncomp.quantization.feed import Feed


def sensitivities(model: nn.Module, layers: dict[str, Layer], feed: Feed) -> dict[str, float]:
    """How much the model's output changes when one layer alone is quantised: Σ|y − y_float|² / Σ|y_float|².

    Args:
        layers: the quantised layers of ``model``, by name.
        feed: runs ``model``; once for each layer, and once more.
    """
    expected: list[Tensor] = []
    with only_quantized(layers, ()):
        feed("sensitivity", lambda y: expected.append(_flat(y)))
    norm = sum(y.square().sum().item() for y in expected)
    found: dict[str, float] = {}
    for name in layers:
        errors: list[float] = []
        with only_quantized(layers, (name,)):
            feed(f"sensitivity of {name}", lambda y: errors.append(_error(_flat(y), expected[len(errors)])))  # noqa: B023
        found[name] = sum(errors) / max(norm, torch.finfo(torch.float64).tiny)
    return found


def most_sensitive(sensitivity: dict[str, float], cost: dict[str, int], budget: float) -> list[str]:
    """The most sensitive layers first, as many as together cost at most ``budget`` of all; those too costly are passed
    over."""
    left = budget * sum(cost.values())
    chosen = []
    for name in sorted(sensitivity, key=lambda n: -sensitivity[n]):
        if cost[name] <= left:
            left -= cost[name]
            chosen.append(name)
    return chosen


def multiplications(layers: dict[str, Layer], feed: Feed) -> dict[str, int]:
    """Multiplications of each layer over all calibration batches."""
    counts = dict.fromkeys(layers, 0)

    def watch(name: str) -> Any:
        def hook(layer: Layer, args: Any, out: Tensor) -> None:
            counts[name] += out.numel() * layer.weight[0].numel()

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        feed("counting")
    finally:
        for handle in handles:
            handle.remove()
    return counts


@contextmanager
def only_quantized(layers: dict[str, Layer], names: Iterable[str]) -> Any:
    """Inside, of the quantised ``layers`` only those with these names compute with 8 bit."""
    chosen = set(names)
    switches: list[FakeQuantizeWeight | FakeQuantizeInput] = []
    for name, layer in layers.items():
        if name not in chosen:
            weight = parametrization_of(layer, FakeQuantizeWeight)
            switches += [s for s in (weight, getattr(layer, "input_quantizer", None)) if s is not None]
    before = [s.enabled for s in switches]
    try:
        for s in switches:
            s.enabled = False
        yield
    finally:
        for s, enabled in zip(switches, before, strict=True):
            s.enabled = enabled


def _flat(output: Any) -> Tensor:
    """All floats of an output, of whatever structure, in one vector."""
    if isinstance(output, Tensor):
        return output.detach().double().flatten() if output.is_floating_point() else torch.zeros(0)
    if isinstance(output, dict):
        output = list(output.values())
    parts = [_flat(y) for y in output] if isinstance(output, (list, tuple)) else []
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _error(y: Tensor, expected: Tensor) -> float:
    return (y - expected).square().sum().item()
