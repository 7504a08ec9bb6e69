"""How many weights each layer loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnncomp._batches import evaluating, inputs_of
from cnncomp.errors import ArgumentError, CalibrationError
from cnncomp.progress import track
from cnncomp.pruning.criteria import as_batches
from cnncomp.pruning.mask import temporarily_masked
from cnncomp.pruning.targets import Target
from cnncomp.training import distributed

ALLOCATIONS = ("global", "uniform", "erdos-renyi", "erdos-renyi-kernel", "sensitivity")

#: Sparsities at which a layer's sensitivity is measured; in between it is taken as linear.
LEVELS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)

#: The mask of target number i with that many zeros.
MaskAt = Callable[[int, int], Tensor]


def uniform(targets: Sequence[Target], sparsity: float) -> list[int]:
    """Zeros per target: the same fraction of each."""
    return [round(sparsity * t.numel) for t in targets]


def erdos_renyi(targets: Sequence[Target], sparsity: float, kernel: bool) -> list[int]:
    """Zeros per target such that densities are proportional to (K + C) / (K·C) (Mocanu et al., 2018), or with ``kernel``
    to (K + C + R + S) / (K·C·R·S) (Evci et al., "Rigging the Lottery", 2020), none above 1; in total exactly
    ``round(sparsity · numel)``. C are the input channels of a group."""
    sizes = [t.numel for t in targets]
    left = sum(sizes) - round(sparsity * sum(sizes))
    shares = []  # what stays of each, up to a factor: density · numel
    for t in targets:
        shape = t.parameter.shape
        taps = math.prod(shape[2:])
        shares.append(float(sum(shape)) if kernel else float((shape[0] + shape[1]) * taps))
    return [n - k for n, k in zip(sizes, _share(left, shares, sizes), strict=True)]


def _share(total: int, shares: Sequence[float], limits: Sequence[int]) -> list[int]:
    """Integers that add up to ``total``, in proportion to ``shares``, none above its limit."""
    found = [0.0] * len(shares)
    full: set[int] = set()
    while True:
        rest = total - sum(limits[i] for i in full)
        weight = sum(s for i, s in enumerate(shares) if i not in full)
        found = [float(limits[i]) if i in full else rest * s / weight for i, s in enumerate(shares)]
        over = {i for i, x in enumerate(found) if i not in full and x > limits[i]}
        if not over:
            break
        full |= over
    return _round_to(total, found, limits)


def _round_to(total: int, values: Sequence[float], limits: Sequence[int]) -> list[int]:
    """``values`` as integers that add up to ``total``: the largest remainders are rounded up, the first of equal ones."""
    floors = [min(int(v), limit) for v, limit in zip(values, limits, strict=True)]
    order = sorted(range(len(values)), key=lambda i: floors[i] - values[i])
    missing = total - sum(floors)
    for i in order * 2:
        if missing <= 0:
            break
        if floors[i] < limits[i]:
            floors[i] += 1
            missing -= 1
    return floors


def explicit(targets: Sequence[Target], sparsity: float, given: Mapping[str, float]) -> list[int]:
    """Zeros per target: what ``given`` says by layer name, ``sparsity`` for the others.

    Raises:
        ArgumentError: a name that no pruned layer has, or a value outside 0 to 1.
    """
    names = {name.name for name in targets}
    for name, value in given.items():
        if name not in names:
            raise ArgumentError(
                "allocation", repr(name), f"names of layers that are pruned, such as {sorted(names)[:3]}"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ArgumentError("allocation", f"{value!r} for layer {name!r}", "a number from 0 to 1")
    return [round(given.get(t.name, sparsity) * t.numel) for t in targets]


def sensitivity_of(
    targets: Sequence[Target],
    model: nn.Module,
    data: Iterable[Any] | Tensor,
    mask_at: MaskAt,
    levels: Sequence[float] = LEVELS,
    progress: bool = True,
) -> list[list[float]]:
    """How much the model's outputs change when one target alone is pruned to each of ``levels``.

    Returns:
        Per target and level the mean over samples of the divergence KL(dense ‖ pruned) of the softmax of (N, classes)
        outputs; of others, the squared error over the squared dense output.

    Raises:
        CalibrationError: no batch, or one that can't be used.
    """
    batches = list(as_batches(data))
    if not batches:
        raise CalibrationError("data: got no batches, expected at least one (was an iterator used up before?)")
    with (
        evaluating(model),
        torch.no_grad(),
        track("measuring sensitivity", len(targets) * len(levels), progress) as tick,
    ):
        dense = _outputs(model, batches, targets[0].parameter.device)
        found = []
        for i, t in enumerate(targets):
            row = []
            for level in levels:
                with temporarily_masked(t.parameter, mask_at(i, max(t.masked, round(level * t.numel)))):
                    here = _divergence(dense, _outputs(model, batches, t.parameter.device))
                row.append(float(distributed.mean(t.parameter.new_tensor(here))))
                tick(t.name)
            found.append(row)
    return found


def _outputs(model: nn.Module, batches: Iterable[Any], device: torch.device) -> Tensor:
    out = []
    for i, batch in enumerate(batches):
        args, kwargs = inputs_of(batch, i, device)
        result = model(*args, **kwargs)
        if not isinstance(result, Tensor):
            raise ArgumentError("model", f"an output of type {type(result).__name__}", "one tensor, to compare it")
        out.append(result)
    return torch.cat(out).float()


def _divergence(dense: Tensor, pruned: Tensor) -> float:
    if dense.dim() == 2 and dense.shape[1] > 1:
        p, q = F.log_softmax(dense, 1), F.log_softmax(pruned, 1)
        return float(F.kl_div(q, p, reduction="batchmean", log_target=True))
    return float((dense - pruned).square().sum() / dense.square().sum().clamp(min=1e-30))


def by_sensitivity(
    targets: Sequence[Target], sparsity: float, errors: Sequence[Sequence[float]], levels: Sequence[float] = LEVELS
) -> list[int]:
    """Zeros per target, ``round(sparsity · numel)`` in total, that cost the least if errors add up.

    Each target's error over its number of zeros is replaced by its lower convex hull; the flattest pieces of all hulls
    are taken first, of equal ones those of the first target.
    """
    budget = round(sparsity * sum(t.numel for t in targets))
    zeros = [t.masked for t in targets]
    pieces = []  # slope, target, zeros gained
    for i, (t, row) in enumerate(zip(targets, errors, strict=True)):
        points = [(float(t.masked), 0.0)]
        points += [(float(round(level * t.numel)), e) for level, e in zip(levels, row, strict=True)]
        hull = _lower_hull([p for p in points if p[0] >= t.masked])
        for (x0, y0), (x1, y1) in zip(hull, hull[1:], strict=False):
            pieces.append(((y1 - y0) / (x1 - x0), i, int(x1 - x0)))
    rest = budget - sum(zeros)
    for _, i, gain in sorted(pieces, key=lambda piece: piece[:2]):
        step = min(gain, max(0, rest))
        zeros[i] += step
        rest -= step
    return zeros


def _lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of points in ascending x, the first of which is always on it."""
    hull: list[tuple[float, float]] = []
    for p in points:
        if hull and p[0] == hull[-1][0]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], p):
            hull.pop()
        hull.append(p)
    return hull


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
