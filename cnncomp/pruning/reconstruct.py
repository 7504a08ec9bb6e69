"""One-shot pruning that keeps what the layers compute: no training, no labels, a few hundred inputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp._batches import evaluating
from cnncomp._modules import reduction_length, weight_parameter
from cnncomp.errors import ArgumentError, CalibrationError
from cnncomp.progress import track
from cnncomp.pruning.mask import apply_mask
from cnncomp.pruning.moments import Moments, from_columns, to_columns
from cnncomp.pruning.obs import Problem
from cnncomp.pruning.patterns import Pattern
from cnncomp.pruning.targets import Target
from cnncomp.pruning.walk import Layers, Walk, call
from cnncomp.quantization import quantization_of

Norm = nn.BatchNorm1d | nn.BatchNorm2d

#: Inputs that one output may depend on: about eight matrices of their square are held in float64, 4 GB at this size.
MAX_COLUMNS = 8192


@dataclass
class Solved:
    """What becomes of one target: its weight, its mask, and what is to be added to its outputs (K,), if that can be done:
    in its layer's bias or, where it has none, in ``norm``."""

    weight: Tensor
    keep: Tensor
    shift: Tensor | None
    norm: Norm | None

    def write(self, layers: Sequence[Any], norm: Any, pattern: Pattern, note: str = "") -> None:
        """Give the layers their new weight and mask, and shift their outputs."""
        mask = apply_mask(list(layers), self.keep, str(pattern), note)
        with torch.no_grad():
            parameter = weight_parameter(layers[0], "")
            parameter.copy_(mask(self.weight.to(parameter.dtype)))
            if self.shift is None:
                return
            if layers[0].bias is not None:
                layers[0].bias += self.shift.to(layers[0].bias.dtype)
            else:
                norm.running_mean -= self.shift.to(norm.running_mean.dtype)


@dataclass
class _Calls:
    """What one forward showed of the targets: by name how often each was called, in order of first calls, and the
    BatchNorm that reads a target's output before anything else does."""

    count: dict[str, int] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)


def solve_targets(
    model: nn.Module,
    targets: Sequence[Target],
    zeros: Sequence[int],
    pattern: Pattern,
    data: Sequence[Any],
    damping: float = 0.01,
    block: int = 128,
    progress: bool = True,
) -> dict[str, Solved]:
    """Solve the targets one after the other, each on the inputs that the ones before it, already pruned, leave.

    ``model`` stays as it is.

    Each layer's weights minimise Σ‖W·x − V·x̂ − b‖², x and x̂ its inputs in the dense and in the pruned network, over the
    weights V that the pattern allows and, where there is a bias or a BatchNorm behind, b. Which ones stay is chosen as in
    SparseGPT (Frantar and Alistarh, 2023), itself after Optimal Brain Surgeon (Hassibi et al., 1993); then what stays is
    solved for anew.

    Args:
        zeros: weights to mask, per target; of no effect for n:m.
        data: batches, held in memory with their activations between two layers.
        damping: added to the diagonal of Σ x̂·x̂ᵀ, as a fraction of its mean: more of it trusts ``data`` less.
        block: columns that are chosen from together.

    Returns:
        By name, in the order of their calls. Targets that are never called are missing, with a warning.

    Raises:
        ArgumentError: a quantised layer, or one that sums more than 8,192 products.
        CalibrationError: no batch, one that can't be used, or NaN or infinity in a layer's input.
    """
    if not data:
        raise CalibrationError("data: got no batches, expected at least one (was an iterator used up before?)")
    for t in targets:
        if quantization_of(t.layers[0]) is not None:
            raise ArgumentError("model", f"{t.name!r} quantised already", "a float model (prune, then quantize)")
        if reduction_length(t.layers[0]) > MAX_COLUMNS:
            got = f"layer {t.name!r}, which sums {reduction_length(t.layers[0]):,} products"
            raise ArgumentError("model", got, f"at most {MAX_COLUMNS:,} to reconstruct (name it in exclude)")
    by_name = {t.name: (t, n) for t, n in zip(targets, zeros, strict=True)}
    work = copy.deepcopy(model)
    names = {m: name for name, m in model.named_modules()}
    solved: dict[str, Solved] = {}
    with evaluating(model), evaluating(work), torch.no_grad():
        calls = _record_calls(model, targets, data[0])
        dense, pruned = Walk(model, data), Walk(work, data)
        missing = [name for name in by_name if name not in calls.count]
        if missing:
            warnings.warn(f"layers that data never reached stay as they are: {', '.join(missing)}", stacklevel=3)
        with track("reconstructing", len(calls.count), progress) as advance:
            for name in calls.count:
                target, zeros_here = by_name[name]
                copies: list[Any] = [work.get_submodule(names[layer]) for layer in target.layers]
                moments = _gather(target, dense, pruned, target.layers, copies, calls.count[name])
                norm = calls.norms.get(name)
                solved[name] = _solve(target, moments, zeros_here, pattern, norm, damping, block)
                solved[name].write(copies, None if norm is None else work.get_submodule(names[norm]), pattern)
                advance(name)
    return solved


def _record_calls(model: nn.Module, targets: Sequence[Target], batch: Any) -> _Calls:
    calls = _Calls()
    owner: dict[nn.Module, str] = {layer: t.name for t in targets for layer in t.layers}
    outputs: dict[int, tuple[str, Tensor, int]] = {}  # by id; holding the tensor keeps the id from being given away
    norm_calls: dict[nn.Module, int] = {}

    def after_layer(layer: nn.Module, args: Any, output: Any) -> None:
        name = owner[layer]
        calls.count[name] = calls.count.get(name, 0) + 1
        outputs[id(output)] = (name, output, output._version)

    def before_norm(norm: Any, args: tuple[Any, ...]) -> None:
        norm_calls[norm] = norm_calls.get(norm, 0) + 1
        name, output, version = outputs.get(id(args[0]) if args else 0, ("", None, 0))
        if output is not None and output._version == version and norm.running_mean is not None:
            calls.norms[name] = norm

    handles = [layer.register_forward_hook(after_layer) for layer in owner]
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    handles += [norm.register_forward_pre_hook(before_norm) for norm in norms]
    try:
        call(model, batch, 0)
    finally:
        for handle in handles:
            handle.remove()
    single = {name for name, n in calls.count.items() if n == 1}
    calls.norms = {name: m for name, m in calls.norms.items() if name in single and norm_calls[m] == 1}
    return calls


def _gather(target: Target, dense: Walk, pruned: Walk, layers: Layers, copies: Layers, calls: int) -> Moments:
    """The moments of the target's inputs in both networks."""
    moments = Moments.zeros(target.layers[0])
    together = zip(dense.inputs_at(layers, calls), pruned.inputs_at(copies, calls), strict=True)
    for index, (left, right) in enumerate(together):
        if len(left) != len(right):
            raise CalibrationError(f"layer {target.name!r} is called {len(left)} times, pruned {len(right)} times")
        for (layer, x), (_, y) in zip(left, right, strict=True):
            moments.add(layer, x, y)
        if not torch.isfinite(moments.dense.sum() + moments.pruned.sum()):
            raise CalibrationError(f"data batch {index}: NaN or infinity in the input of layer {target.name!r}")
    return moments.of_all_processes()


def _solve(
    target: Target, moments: Moments, zeros: int, pattern: Pattern, norm: Norm | None, damping: float, block: int
) -> Solved:
    layer, groups = target.layers[0], target.groups
    weight = to_columns(target.value.double(), groups)
    free = torch.ones_like(weight, dtype=torch.bool) if target.mask is None else to_columns(target.mask, groups)
    intercept = len(target.layers) == 1 and (layer.bias is not None or norm is not None)
    hessian, cross = moments.centred() if intercept else (moments.hessian, moments.cross)
    problem = Problem.of(weight, hessian, cross, free, damping)
    found, keep = problem.solve(pattern, target.parameter.shape[1], zeros, block)
    shift = None
    if intercept:
        n = max(1, moments.count)
        before = torch.einsum("grd,gd->gr", weight, moments.dense / n)
        shift = (before - torch.einsum("grd,gd->gr", found, moments.pruned / n)).flatten()
    shape = target.parameter.shape
    return Solved(from_columns(found, shape), from_columns(keep, shape), shift, norm)
