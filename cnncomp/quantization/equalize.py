"""Cross-layer equalisation: channels are rescaled so that one step suits all of a tensor's channels.

A channel between two layers may be divided by any s > 0 if what reads it multiplies by s; a ReLU between them does not
mind, and a ReLU6 becomes a clamp at 6/s. Nagel et al. ("Data-free quantization through weight equalization and bias
correction", 2019) choose s by the ranges of the two weights. With one scale per output channel, as here, the first weight
does not care; what profits is the tensor between the layers, which has one step for all of its channels: ``by="activations"``
balances its ranges against those of the second weight's columns (as Xiao et al., "SmoothQuant", 2022, do for transformers).
Layers whose outputs are added share one factor per channel, so that residual streams are equalised too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp._modules import groups_of, is_depthwise, layers_of, weight_parameter
from cnncomp._norms import BatchNorm
from cnncomp.errors import ArgumentError, CalibrationError
from cnncomp.quantization.clamp import ClampChannels
from cnncomp.quantization.links import NORMS, Link, layer_graph, links_of

CRITERIA = ("activations", "weights")
#: No channel is rescaled by more than this: beyond, it is as good as dead.
MAX_FACTOR = 1e4
#: Standard deviations of a channel that count as its range.
SPREAD = 3.0
_SWEEPS = 20


def equalize(model: nn.Module, run: Callable[[], None], by: str = "activations") -> list[Link]:
    """Rescale channels in place. The model computes what it did, but for rounding.

    Args:
        model: a float model; its masks stay.
        run: calls the model on all calibration batches.
        by: "activations" looks at ranges on the calibration batches; "weights" is the method of the 2019 paper and does
            not call ``run``.

    Returns:
        The layers between which channels were rescaled.

    Raises:
        ArgumentError: another value of ``by``.
        CalibrationError: NaN or infinity in a layer's input; nothing is changed then.
    """
    if by not in CRITERIA:
        raise ArgumentError("equalize", repr(by), f"one of {', '.join(map(repr, CRITERIA))}, or None")
    links = links_of(model, layer_graph(model))
    if by == "activations":
        with _watching(model, links) as ranges:
            run()
        bad = next((name for name, r in ranges.items() if not torch.isfinite(r).all()), None)
        if bad is not None:
            raise CalibrationError(f"calibration: NaN or infinity in the input of layer {bad!r}")
        for link in links:
            if all(ranges[name].numel() for name in link.seconds):
                rescale(model, link, _activation_factors(model, link, ranges))
        return links
    # Each link changes the ranges that its neighbours see.
    for _ in range(_SWEEPS):
        factors = [_weight_factors(model, link) for link in links]
        for link, factor in zip(links, factors, strict=True):
            rescale(model, link, factor)
        if all(((f - 1).abs() < 1e-3).all() for f in factors):
            break
    return links


@contextmanager
def _watching(model: nn.Module, links: list[Link]) -> Iterator[dict[str, Tensor]]:
    """Largest magnitude of each input channel of the links' second layers, filled in while the model runs; empty for those
    that it does not reach."""
    ranges = {name: torch.zeros(0) for link in links for name in link.seconds}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().float().abs()
            channels = x.movedim(-1 if isinstance(module, nn.Linear) else 1, 0)
            largest = channels.flatten(1).amax(1)
            ranges[name] = torch.maximum(ranges[name], largest) if ranges[name].numel() else largest

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in ranges]
    try:
        yield ranges
    finally:
        for handle in handles:
            handle.remove()


def _by_input(weight: Tensor, expand: int, groups: int) -> Tensor:
    """Largest magnitude of a second layer's weights by the channel that they meet: (C,)."""
    rows = weight.abs().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return rows.transpose(1, 2).reshape(groups * weight.shape[1] // expand, -1).amax(1)


def _expected_range(model: nn.Module, link: Link) -> Tensor | float:
    """What a channel reaches by its BatchNorm, whose statistics are of the whole training set: |β| + 3·|γ|, or β + 3·|γ| at
    least 0 where a clamp cuts the other side off, and no more than its upper bound."""
    norms = [_norm(model, name) for name in link.firsts.values()]
    if link.pooled or any(norm is None for norm in norms):
        return 0.0
    means, spreads = zip(
        *((n.bias.detach(), SPREAD * n.weight.detach().abs()) for n in norms if n is not None), strict=True
    )
    if not link.clamps:
        return torch.stack([m.abs() + s for m, s in zip(means, spreads, strict=True)]).amax(0)
    reach = torch.stack([m + s for m, s in zip(means, spreads, strict=True)]).amax(0).clamp(min=0)
    for name in link.clamps:
        clamp = model.get_submodule(name)
        assert isinstance(clamp, (nn.Hardtanh, ClampChannels))
        reach = reach.clamp(max=clamp.hi if isinstance(clamp, ClampChannels) else float(clamp.max_val))
    return reach


def _activation_factors(model: nn.Module, link: Link, seen: dict[str, Tensor]) -> Tensor:
    """Factors from the largest magnitudes seen, and from those to be expected: calibration sees few images, and a channel
    that none of them excites must not be scaled up to the end of the range."""
    layers = layers_of(model)
    ranges = torch.stack([seen[name].reshape(-1, expand).amax(1) for name, expand in link.seconds.items()]).amax(0)
    ranges = torch.maximum(ranges, torch.as_tensor(_expected_range(model, link)).to(ranges))
    # Rows have scales of their own, so what counts is a column's share of its rows' ranges.
    shares = []
    for name, expand in link.seconds.items():
        weight = layers[name].weight.detach()
        largest = weight.abs().flatten(1).amax(1).clamp_min(torch.finfo(weight.dtype).tiny)
        share = weight / largest.view(-1, *[1] * (weight.dim() - 1))
        if not is_depthwise(layers[name]):  # where each channel has a scale of its own: nothing is lost
            shares.append(_by_input(share, expand, groups_of(layers[name])))
    return _bounded((ranges / torch.stack(shares).amax(0)).sqrt() if shares else ranges)


def _weight_factors(model: nn.Module, link: Link) -> Tensor:
    """s = √(r₁·r₂) / r₂ (equation 11 of the 2019 paper, there of the weight with BatchNorm folded in)."""
    layers = layers_of(model)
    rows = []
    for name, norm_name in link.firsts.items():
        rows.append(layers[name].weight.detach().abs().flatten(1).amax(1))
        norm = _norm(model, norm_name)
        if norm is not None and norm.running_var is not None:
            rows[-1] = rows[-1] * (norm.weight.detach() / (norm.running_var + norm.eps).sqrt()).abs()
    columns = [_by_input(layers[n].weight.detach(), expand, groups_of(layers[n])) for n, expand in link.seconds.items()]
    return _bounded((torch.stack(rows).amax(0) / torch.stack(columns).amax(0)).sqrt())


def _bounded(factor: Tensor) -> Tensor:
    """Factors with geometric mean 1; 1 for channels that are dead on either side."""
    live = torch.isfinite(factor) & (factor > 0)
    if not live.any():
        return torch.ones_like(factor)
    mean = factor[live].log().mean().exp()
    return torch.where(live, factor / mean, torch.ones_like(factor)).clamp(1 / MAX_FACTOR, MAX_FACTOR)


def _norm(model: nn.Module, name: str | None) -> BatchNorm | None:
    norm = None if name is None else model.get_submodule(name)
    assert norm is None or isinstance(norm, NORMS)
    return norm


@torch.no_grad()
def rescale(model: nn.Module, link: Link, factor: Tensor) -> None:
    """Divide the channels between a link's layers by ``factor`` (C,), above 0, and multiply behind them."""
    layers = layers_of(model)
    for name, norm_name in link.firsts.items():
        if (norm := _norm(model, norm_name)) is not None:
            norm.weight.div_(factor)
            norm.bias.div_(factor)
            continue
        weight = weight_parameter(layers[name], name)
        weight.div_(factor.view(-1, *[1] * (weight.dim() - 1)))
        if (bias := layers[name].bias) is not None:
            bias.div_(factor)
    for name, expand in link.seconds.items():
        weight, groups = weight_parameter(layers[name], name), groups_of(layers[name])
        by_input = factor.repeat_interleave(expand).view(groups, 1, weight.shape[1])
        rows = by_input.expand(groups, weight.shape[0] // groups, weight.shape[1])
        weight.mul_(rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2)))
    for name in link.clamps:
        _rescale_clamp(model, name, factor)


def _rescale_clamp(model: nn.Module, name: str, factor: Tensor) -> None:
    clamp = model.get_submodule(name)
    if not isinstance(clamp, ClampChannels):
        assert isinstance(clamp, nn.Hardtanh)
        bounded = ClampChannels(factor.numel()).to(factor.device)
        bounded.hi.fill_(float(clamp.max_val))
        bounded.train(clamp.training)
        model.set_submodule(name, bounded)
        clamp = bounded
    clamp.hi.div_(factor)
