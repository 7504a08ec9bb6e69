"""What a search may do to each layer, and what it is to reach."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cnncomp.errors import ArgumentError


@dataclass(frozen=True, order=True)
class Choice:
    """What is done to one layer: nothing, zeros in a pattern, int8, or both."""

    sparsity: float = 0.0
    pattern: str = "unstructured"
    int8: bool = False

    def __str__(self) -> str:
        parts = [f"{self.sparsity:.0%} {self.pattern}"] if self.sparsity else []
        return " ".join([*parts, *(["int8"] if self.int8 else [])]) or "dense"


DENSE = Choice()

#: What is done to every layer, by name; layers that are not named stay as they are.
Config = dict[str, Choice]


@dataclass(frozen=True)
class Target:
    """What :func:`cnncomp.compress` is to reach.

    Args:
        latency: at most this fraction of the latency of the dense network, converted with the best dense kernels and measured
            in the same run; None for as low as possible.
        accuracy_drop: accuracy may fall by at most this much, 0.01 for one point; with unlabelled data, agreement with the
            dense network's first class. None for as little as possible.

    Raises:
        ArgumentError: both None, or one out of range.
    """

    latency: float | None = None
    accuracy_drop: float | None = None

    def __post_init__(self) -> None:
        if self.latency is None and self.accuracy_drop is None:
            raise ArgumentError("target", "neither latency nor accuracy_drop", "at least one of them")
        for name, least in (("latency", math.ulp(0.0)), ("accuracy_drop", 0.0)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= 1:
                raise ArgumentError(name, repr(value), "a number from 0 to 1" + (", not 0" if least else ""))

    def __str__(self) -> str:
        parts = []
        if self.latency is not None:
            parts.append(f"{self.latency:.3g} of the dense latency")
        if self.accuracy_drop is not None:
            parts.append(f"at most {100 * self.accuracy_drop:.3g} points lost")
        return ", ".join(parts)


@dataclass(frozen=True)
class Space:
    """What a search may try.

    Args:
        choices: for each layer, besides leaving it dense.
        channels: fractions of all channels to take out of the network first (:func:`cnncomp.prune_channels`), each a search of
            its own; 0 for none.
        round_to: as in :func:`cnncomp.prune_channels`.
    """

    choices: tuple[Choice, ...] = (
        *(Choice(s) for s in (0.5, 0.6, 0.7, 0.8, 0.9)),
        Choice(int8=True),
        *(Choice(s, "1x4", int8=True) for s in (0.5, 0.75)),
    )
    channels: tuple[float, ...] = (0.0,)
    round_to: int = 8

    def __post_init__(self) -> None:
        if not self.channels or any(not 0 <= c < 1 for c in self.channels):
            raise ArgumentError("channels", self.channels, "fractions from 0 to below 1, at least one")
        if not all(isinstance(c, Choice) for c in self.choices):
            raise ArgumentError("choices", self.choices, "cnncomp.search.Choice objects")
