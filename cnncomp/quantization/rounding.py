"""Adaptive rounding: up or down, whichever changes the layer's output least on calibration data.

The problem is AdaRound's (Nagel et al., "Up or down? Adaptive rounding for post-training quantization", 2020, equation 13):
minimise Δw·H·Δwᵀ for each output channel, H = Σ x̂·x̂ᵀ over the layer's quantised inputs, with each weight rounded either up
or down. The paper relaxes it and trains by gradient; here coordinate descent, starting from the nearest integers, flips a
weight where that lowers the error, until none does: no learning rate, and never worse than rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cnncomp._im2col import im2col
from cnncomp._modules import Layer, groups_of, parametrization_of, weight_parameter
from cnncomp.quantization.fake import WEIGHT_MAX, FakeQuantizeWeight
from cnncomp.quantization.feed import Feed

#: Added to H's diagonal, as a fraction of its mean: keeps the choice from following the noise of a few images.
DAMPING = 0.01
SWEEPS = 8
_BLOCK = 128
#: Bytes that the matrices H of the layers which are done in one pass over the data may take.
_MEMORY = 512 << 20


def round_adaptively(layers: dict[str, Layer], feed: Feed) -> list[str]:
    """Choose the rounding of the weights of quantised ``layers``, in place: each weight becomes a multiple of its scale.

    Layers are done in the order given, as many at a time as memory allows; those behind see the inputs that the rounded
    ones before them give. Zeros stay zero.

    Args:
        feed: runs the model that the layers are of.

    Returns:
        Names of the layers that are too large, and stay rounded to nearest.
    """
    skipped = []
    for part in _parts(layers):
        if not part:
            continue
        if len(part) == 1 and _bytes(next(iter(part.values()))) > _MEMORY:
            skipped += list(part)
            continue
        moments = _second_moments(part, feed)
        for name, layer in part.items():
            _round_layer(layer, name, moments[name])
    return skipped


def _bytes(layer: Layer) -> int:
    return 4 * groups_of(layer) * layer.weight[0].numel() ** 2


def _parts(layers: dict[str, Layer]) -> Iterator[dict[str, Layer]]:
    part: dict[str, Layer] = {}
    for name, layer in layers.items():
        if sum(map(_bytes, part.values())) + _bytes(layer) > _MEMORY:
            yield part
            part = {}
        part[name] = layer
    yield part


def columns_of(layer: Layer, x: Tensor) -> Iterator[Tensor]:
    """What the layer multiplies its filters with: (G, D, P), D = C/G·R·S as in its weight, P positions, in parts."""
    return (part.flatten(1, 2) for part in im2col(layer, x))


def _second_moments(layers: dict[str, Layer], feed: Feed) -> dict[str, Tensor]:
    """H (G, D, D) of each layer's inputs, as they are after quantisation."""
    moments: dict[str, Tensor] = {}

    def watch(name: str) -> object:
        def hook(layer: Layer, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
            x = (args[0] if args else kwargs["input"]).float()
            for columns in columns_of(layer, x):
                product = columns @ columns.transpose(1, 2)
                moments[name] = moments[name].add_(product) if name in moments else product

        return hook

    handles = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]  # type: ignore[arg-type]
    try:
        feed("rounding")
    finally:
        for handle in handles:
            handle.remove()
    return moments


@torch.no_grad()
def _round_layer(layer: Layer, name: str, hessian: Tensor) -> None:
    quantizer = parametrization_of(layer, FakeQuantizeWeight)
    assert quantizer is not None
    quantizer.enabled = False
    weight = layer.weight.detach().float()  # masks applied
    quantizer.enabled = True
    shape = (-1, *[1] * (weight.dim() - 1))
    scale, shift = quantizer.scale.view(shape), 0.0 if quantizer.shift is None else quantizer.shift.view(shape)
    steps = ((weight - shift) / scale).reshape(groups_of(layer), -1, hessian.shape[1])
    chosen = choose_rounding(steps, hessian).reshape(weight.shape)
    weight_parameter(layer, name).copy_(chosen * scale + shift)


def choose_rounding(w: Tensor, hessian: Tensor, qmax: int = WEIGHT_MAX) -> Tensor:
    """The integers next to ``w`` with a small ``(q − w)·H·(q − w)ᵀ``, in every row.

    Args:
        w: (G, M, D) weights, in steps.
        hessian: (G, D, D).
        qmax: the largest magnitude of an integer.

    Returns:
        (G, M, D): floor or ceil of ``w``, or the end of the range; integers stay.
    """
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(w.dtype).tiny)
    hessian = hessian + torch.diag_embed((DAMPING * mean)[:, None].expand(-1, hessian.shape[1]))
    q = w.round().clamp(-qmax, qmax)
    low, high = w.floor().clamp(-qmax, qmax), w.ceil().clamp(-qmax, qmax)
    gradient = (q - w) @ hessian
    for _ in range(SWEEPS):
        flips = 0
        for first in range(0, w.shape[2], _BLOCK):
            block = slice(first, min(w.shape[2], first + _BLOCK))
            before = q[:, :, block].clone()
            flips += _descend(q[:, :, block], low[:, :, block], high[:, :, block], gradient[:, :, block].clone(),
                              hessian[:, block, block])  # fmt: skip
            gradient += (q[:, :, block] - before) @ hessian[:, block]
        if flips == 0:
            break
    return q


def _descend(q: Tensor, low: Tensor, high: Tensor, gradient: Tensor, hessian: Tensor) -> int:
    """One sweep over the columns of a block, in place; how many weights were flipped."""
    flips = torch.zeros((), dtype=torch.long, device=q.device)
    for i in range(q.shape[2]):
        step = low[:, :, i] + high[:, :, i] - 2 * q[:, :, i]  # to the other integer; 0 where there is none
        change = step * (2 * gradient[:, :, i] + step * hessian[:, None, i, i])
        step = torch.where(change < 0, step, torch.zeros_like(step))
        q[:, :, i] += step
        gradient += step[:, :, None] * hessian[:, None, i]
        flips += step.count_nonzero()
    return int(flips)
