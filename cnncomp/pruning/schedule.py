"""When to prune while training: objects whose ``step(i)`` a training loop calls after each iteration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp.errors import ArgumentError, PatternError
from cnncomp.pruning.criteria import as_float
from cnncomp.pruning.mask import apply_mask
from cnncomp.pruning.masking import prune
from cnncomp.pruning.patterns import Blocks, grouped, parse_pattern
from cnncomp.pruning.targets import Target, targets_of
from cnncomp.training import distributed

SELECTION = ("include_first_last", "include_depthwise", "exclude")


def _targets(model: nn.Module, options: Mapping[str, Any]) -> list[Target]:
    """What :func:`cnncomp.prune` with these options prunes; with masks from now on, so that the ``state_dict`` has the same
    keys before and after pruning."""
    targets = targets_of(model, **{key: options[key] for key in SELECTION if key in options})
    for t in targets:
        _ = t.mask_module
    return targets


def _count(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(name, repr(value), f"an integer from {least} on")
    return value


class OneShot:
    """Prune once, at iteration ``at``.

    Args:
        model: pruned in place.
        sparsity: as in :func:`cnncomp.prune`.
        at: the iteration.
        options: further arguments of :func:`cnncomp.prune`.
    """

    def __init__(self, model: nn.Module, sparsity: float | None = None, at: int = 0, **options: Any) -> None:
        self.model, self.sparsity, self.at, self.options = model, sparsity, _count("at", at, 0), options
        _targets(model, options)

    def step(self, i: int) -> bool:
        """Call after iteration ``i`` (0, 1, ...); whether it has pruned."""
        if i != self.at:
            return False
        prune(self.model, self.sparsity, **self.options)
        return True


class GradualCubic:
    """Raise the sparsity in steps, fast at first: ``s + (s₀ − s)·(1 − t)³``, t from 0 at ``begin`` to 1 at ``end``
    (Zhu and Gupta, "To prune, or not to prune", 2017).

    Nothing is kept but what the masks hold: training that goes on from a checkpoint goes on pruning where it was.

    Args:
        model: pruned in place.
        sparsity: the last sparsity s.
        begin: iteration of the first pruning.
        end: iteration of the last.
        every: iterations between two.
        initial: the first sparsity s₀.
        options: further arguments of :func:`cnncomp.prune`; patterns n:m, which have one sparsity only, are refused.

    Raises:
        ArgumentError: numbers out of range, or ``end`` before ``begin``.
        PatternError: an n:m pattern.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float = 0.9,
        begin: int = 0,
        end: int = 1000,
        every: int = 100,
        initial: float = 0.0,
        **options: Any,
    ) -> None:
        for name, value in (("sparsity", sparsity), ("initial", initial)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ArgumentError(name, repr(value), "a number from 0 to 1 (the fraction of zeros)")
        if initial > sparsity:
            raise ArgumentError("initial", initial, f"at most sparsity={sparsity}")
        pattern = options.get("pattern", "unstructured")
        if not isinstance(parse_pattern(pattern), Blocks):
            raise PatternError("pattern", repr(pattern), "one whose sparsity can rise in steps (n:m: use OneShot)")
        self.model, self.final, self.initial, self.options = model, sparsity, initial, options
        self.begin, self.end, self.every = (
            _count("begin", begin, 0),
            _count("end", end, begin),
            _count("every", every, 1),
        )
        _targets(model, options)

    def sparsity(self, i: int) -> float:
        """The sparsity that iteration ``i`` asks for; 0 before ``begin``."""
        if i < self.begin:
            return 0.0
        t = 1.0 if i >= self.end else (i - self.begin) / (self.end - self.begin)
        return self.final + (self.initial - self.final) * (1 - t) ** 3

    def step(self, i: int) -> bool:
        """Call after iteration ``i`` (0, 1, ...); whether it has pruned."""
        due = (i - self.begin) % self.every == 0 or i == self.end
        if not due or not self.begin <= i <= self.end:
            return False
        prune(self.model, self.sparsity(i), **self.options)
        return True


class RigL:
    """Train sparse from the start: now and then drop the smallest weights and let those grow whose gradient is largest
    (Evci et al., "Rigging the Lottery", 2020).

    The constructor prunes; then, after every ``every``-th iteration before ``end``, a fraction
    ``fraction/2·(1 + cos(π·i/end))`` of what is left in each layer is exchanged, within the layer. What grows starts at
    zero. Gradients of masked weights are summed over the backward passes of the iteration before the exchange only, and
    averaged over the processes of a group.

    Call :meth:`step` behind ``backward``; before or after the optimiser's step makes no difference to what grows.
    A model whose layers all have pruned weights already is taken as it is: so training goes on from a checkpoint, or starts
    from other masks.

    Args:
        model: pruned in place.
        sparsity: as in :func:`cnncomp.prune`.
        end: iteration after which masks stay.
        every: iterations between two exchanges.
        fraction: of the weights, exchanged at first.
        optimizer: its state of what is dropped or grows is set to zero; None: left alone.
        options: further arguments of :func:`cnncomp.prune`; ``allocation`` is "erdos-renyi-kernel" by default.

    Raises:
        ArgumentError: numbers out of range.
        PatternError: an n:m pattern.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | None = None,
        end: int = 1000,
        every: int = 100,
        fraction: float = 0.3,
        optimizer: torch.optim.Optimizer | None = None,
        **options: Any,
    ) -> None:
        self.end, self.every = _count("end", end, 1), _count("every", every, 1)
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
            raise ArgumentError("fraction", repr(fraction), "a number from 0 to 1")
        pattern = parse_pattern(options.get("pattern", "unstructured"))
        if not isinstance(pattern, Blocks):
            raise PatternError("pattern", f"'{pattern}'", "unstructured or blocks")
        self.model, self.fraction, self.optimizer, self.pattern = model, fraction, optimizer, pattern
        self.targets = _targets(model, options)
        if not all(t.masked for t in self.targets):
            prune(model, sparsity, **{"allocation": "erdos-renyi-kernel", **options})
        self._watch(0)

    def exchanged(self, i: int) -> float:
        """The fraction of what is left that iteration ``i`` exchanges."""
        return self.fraction / 2 * (1 + math.cos(math.pi * i / self.end)) if 0 < i < self.end else 0.0

    def step(self, i: int) -> bool:
        """Call after iteration ``i`` (0, 1, ...); whether masks have changed.

        Raises:
            ArgumentError: an exchange is due, but no gradient has come.
        """
        due = i % self.every == 0 and self.exchanged(i) > 0
        if due:
            for t in self.targets:
                self._exchange(t, self.exchanged(i))
        self._watch(i + 1)
        return due

    def _watch(self, i: int) -> None:
        """Collect the gradients of iteration ``i`` if it ends in an exchange."""
        for mask in (t.mask_module for t in self.targets):
            mask.watched, mask.gradient = i % self.every == 0 and self.exchanged(i) > 0, None

    def _exchange(self, target: Target, fraction: float) -> None:
        module = target.mask_module
        if module.gradient is None:
            raise ArgumentError("i", "an exchange without gradients", "step() after backward(), in every iteration")
        old, parameter = module.mask.clone(), target.parameter
        weight = grouped(as_float(parameter.detach()).abs().masked_fill(~old, -1.0), target.groups)
        left = int(old.sum())
        count = int(fraction * left)
        kept = self.pattern.keep([weight], target.numel - left + count)[0].view(old.shape)
        count = left - int(kept.sum())
        # What is kept can't grow: it ranks lowest, and of the rest all but the largest `count` are left out, in whole blocks
        # never more than were dropped.
        slack = self.pattern.rows * self.pattern.cols - 1
        growth = grouped(distributed.mean(as_float(module.gradient)).abs().masked_fill(kept, -1.0), target.groups)
        grown = self.pattern.keep([growth], target.numel - count + slack)[0].view(old.shape)
        new = kept | grown
        with torch.no_grad():
            parameter.masked_fill_(new & ~old, 0)
            for state in self._states(parameter):
                state.masked_fill_(new != old, 0)
        apply_mask(target.layers, new, str(self.pattern), module.note)

    def _states(self, parameter: Tensor) -> list[Tensor]:
        """The optimiser's tensors of the parameter's shape: momentum and the like."""
        state: Mapping[str, Any] = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
        return [v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]
