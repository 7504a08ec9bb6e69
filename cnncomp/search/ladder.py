"""From tables to an order of configurations: each rung is a little faster, and loses a little more, than the one before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cnncomp.search.space import DENSE, Choice, Config

#: (seconds, loss, choice)
Cost = tuple[float, float, Choice]


def hull(costs: Sequence[Cost]) -> list[Cost]:
    """The lower convex hull of one layer's choices, from the slowest useful one to the fastest: each step saves time at a
    higher price, in loss per second, than the one before."""
    kept: list[Cost] = []
    for cost in sorted(costs):  # the fastest first; of equally fast ones the least loss
        if kept and cost[1] >= kept[-1][1]:
            continue  # slower, and no better
        while len(kept) >= 2 and _price(kept[-2], kept[-1]) <= _price(kept[-1], cost):
            kept.pop()
        kept.append(cost)
    return kept[::-1]


def _price(fast: Cost, slow: Cost) -> float:
    """Loss per second saved by going from ``slow`` to ``fast``."""
    return (fast[1] - slow[1]) / (slow[0] - fast[0])


def ladder(
    layers: Sequence[str],
    choices: Sequence[Choice],
    seconds: Callable[[str, Choice], float],
    losses: Mapping[tuple[str, Choice], float],
) -> list[Config]:
    """Configurations from dense to the fastest.

    Time and loss are taken as sums over the layers. For a price λ of a second, the best configuration minimises
    Σ (loss + λ·seconds), which each layer does alone; as λ grows, layers move along their own convex hulls, in the order of
    the slopes. The rungs are all configurations met on the way (Shoham & Gersho, "Efficient bit allocation for an arbitrary
    set of quantizers", 1988). Layers or choices without a loss are left out.
    """
    steps: list[tuple[float, str, Choice]] = []
    for layer in layers:
        costs = [(seconds(layer, DENSE), 0.0, DENSE)]
        costs += [(seconds(layer, c), max(0.0, losses[layer, c]), c) for c in choices if (layer, c) in losses]
        corners = hull([c for c in costs if c[2] == DENSE or c[0] < costs[0][0]])
        if corners[0][2] != DENSE:  # something faster loses nothing
            corners.insert(0, costs[0])
        steps += [(_price(fast, slow), layer, fast[2]) for slow, fast in zip(corners, corners[1:], strict=False)]
    rungs: list[Config] = [{}]
    for _, layer, choice in sorted(steps, key=lambda s: s[0]):  # stable: hulls stay in order where prices are equal
        rungs.append({**rungs[-1], layer: choice})
    return rungs
