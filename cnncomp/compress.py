"""``cnncomp.compress``: prune, quantize and convert in one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import nn

from cnncomp._modules import check_fraction
from cnncomp.convert import ConvertedModel, check_float_dtype, convert
from cnncomp.errors import ArgumentError
from cnncomp.pruning import prune
from cnncomp.pruning.criteria import as_batches
from cnncomp.pruning.masking import check_sparsity
from cnncomp.pruning.patterns import parse_pattern
from cnncomp.quantization import quantize
from cnncomp.quantization.calibrate import check_choices
from cnncomp.search import SearchResult, Settings, Space, Target, search


@dataclass(frozen=True)
class Recipe:
    """What :func:`compress` does, in this order.

    Args:
        sparsity: fraction of zeros. 0: no pruning, or with another pattern than "unstructured" what it prunes by itself.
        pattern: as in :func:`cnncomp.prune`.
        reconstruct: solve on the data for what the weights that stay should be, as in :func:`cnncomp.prune`: takes minutes
            and needs no training.
        finetune: called with the pruned model, to train it in place; None for none.
        int8: quantise after training.
        method, equalize, rounding, correct_bias, float_budget: how, as in :func:`cnncomp.quantize`; equalised and with
            corrected biases by default, which goes over the data three times.
        exclude: name patterns of layers that keep their weights and precision.

    Raises:
        ArgumentError: a value that can't be used, also of what the other values leave unused.
        PatternError: an unknown pattern.
    """

    sparsity: float = 0.0
    pattern: str = "unstructured"
    reconstruct: bool = False
    finetune: Callable[[nn.Module], object] | None = None
    int8: bool = True
    method: str = "mse"
    equalize: str | None = "activations"
    rounding: str = "nearest"
    correct_bias: bool = True
    float_budget: float = 0.0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fraction("sparsity", self.sparsity, "zeros, 0 for none")
        if self.pattern != "channel":
            check_sparsity(self.sparsity or None, parse_pattern(self.pattern))
        elif self.reconstruct:
            raise ArgumentError("reconstruct", True, "False with pattern 'channel'")
        if self.finetune is not None and not callable(self.finetune):
            raise ArgumentError("finetune", type(self.finetune).__name__, "a function of the model, or None")
        for name in ("reconstruct", "int8", "correct_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(name, repr(getattr(self, name)), "True or False")
        check_choices(self.method, equalize=self.equalize, rounding=self.rounding, float_budget=self.float_budget)
        if not isinstance(self.exclude, (str, tuple, list)) or not all(isinstance(e, str) for e in self.exclude):
            raise ArgumentError("exclude", repr(self.exclude), "a tuple of name patterns")

    @property
    def prunes(self) -> bool:
        """Whether it prunes at all."""
        return self.sparsity > 0 or self.pattern != "unstructured"

    def quantization(self) -> dict[str, Any]:
        """The arguments for :func:`cnncomp.quantize` that say how."""
        names = ("method", "equalize", "rounding", "correct_bias", "float_budget")
        return {name: getattr(self, name) for name in names}


@overload
def compress(
    model: nn.Module,
    data: Iterable[Any] | None,
    recipe: Recipe | None = None,
    *,
    example_inputs: Any,
    target: None = None,
    measure: bool = True,
    float_dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> ConvertedModel: ...


@overload
def compress(
    model: nn.Module,
    data: Iterable[Any] | None,
    recipe: Recipe | None = None,
    *,
    example_inputs: Any,
    target: Target,
    space: Space | None = None,
    held_out: Iterable[Any] | None = None,
    measure: bool = True,
    float_dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> SearchResult: ...


@overload
def compress(
    model: nn.Module,
    data: Iterable[Any] | None,
    recipe: Recipe | None = None,
    *,
    example_inputs: Any,
    target: Target | None,
    space: Space | None = None,
    held_out: Iterable[Any] | None = None,
    measure: bool = True,
    float_dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> ConvertedModel | SearchResult: ...


def compress(
    model: nn.Module,
    data: Iterable[Any] | None,
    recipe: Recipe | None = None,
    *,
    example_inputs: Any,
    target: Target | None = None,
    space: Space | None = None,
    held_out: Iterable[Any] | None = None,
    measure: bool = True,
    float_dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> ConvertedModel | SearchResult:
    """The whole way in one call, by a recipe or to a target. ``model`` stays as it is.

    Args:
        data: batches for calibration, held in memory; needed if the recipe quantises or reconstructs, and for a target,
            which is measured on them: as accuracy where they are (images, labels), else as agreement with ``model``.
        recipe: what to do; by default int8 and no pruning. With a target, sparsity and precision are found, and layers are
            chosen one by one: ``sparsity``, ``pattern``, ``reconstruct``, ``float_budget`` and ``equalize="weights"`` are
            refused, and nothing is equalised.
        example_inputs: as in :func:`cnncomp.convert`.
        target: what to reach; sparsity, pattern and precision of each layer are then found from measured times and measured
            sensitivity (:mod:`cnncomp.search.run`).
        space: what to try for a target.
        held_out: batches to score on for a target, in place of ``data``.
        measure, float_dtype, progress: as in :func:`cnncomp.convert`; a target is always measured, and
            the dense network that it is a fraction of may compute in ``float_dtype`` too.

    Returns:
        The converted network, or with a target a :class:`cnncomp.SearchResult`, which says whether it was reached and holds
        the network and the Pareto front.

    Raises:
        ArgumentError: a recipe that quantises, or a target, without data; beside a target, ``measure=False`` or a recipe with
            what is found then; without one, ``space`` or ``held_out``.
        CalibrationError: no batch, or one that can't be used.
    """
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
    if not isinstance(recipe, Recipe):
        raise ArgumentError("recipe", type(recipe).__name__, "a cnncomp.Recipe")
    check_float_dtype(float_dtype)
    if target is not None:
        _check_target(target, space, recipe, measure)
        settings = _settings(recipe, target, space or Space(), float_dtype, progress)
        return _to_target(model, data, example_inputs, settings, held_out)
    for name, value in (("space", space), ("held_out", held_out)):
        if value is not None:
            raise ArgumentError(name, type(value).__name__, "None without a target")
    batches = _batches(data) if recipe.int8 or (recipe.prunes and recipe.reconstruct) else []
    model = copy.deepcopy(model)
    if recipe.prunes:
        prune(
            model,
            sparsity=recipe.sparsity or None,
            pattern=recipe.pattern,
            exclude=recipe.exclude,
            reconstruct=recipe.reconstruct,
            data=batches if recipe.reconstruct else None,
            progress=progress,
            example_inputs=example_inputs,
        )
    if recipe.finetune is not None:
        recipe.finetune(model)
    model.eval()
    if recipe.int8:
        quantize(model, batches, exclude=recipe.exclude, progress=progress, **recipe.quantization())
    return convert(model, example_inputs, measure=measure, float_dtype=float_dtype, progress=progress)


def _batches(data: Iterable[Any] | None) -> list[Any]:
    """``data``, to go over more than once."""
    if data is None:
        raise ArgumentError("data", None, "batches to calibrate with (or Recipe(int8=False), without reconstruct)")
    return list(as_batches(data))


def _check_target(target: Target, space: Space | None, recipe: Recipe, measure: bool) -> None:
    """Refuse what is no target, and what would be ignored beside one."""
    if not isinstance(target, Target):
        raise ArgumentError("target", type(target).__name__, "a cnncomp.Target, or None")
    if space is not None and not isinstance(space, Space):
        raise ArgumentError("space", type(space).__name__, "a cnncomp.search.Space, or None")
    if recipe.prunes:
        got = f"sparsity {recipe.sparsity}, pattern {recipe.pattern!r}"
        raise ArgumentError("recipe", got, "neither beside a target, which finds them")
    ignored = {
        "reconstruct": recipe.reconstruct,
        "float_budget": recipe.float_budget,
        "equalize": recipe.equalize == "weights" and recipe.equalize,
    }
    for name, value in ignored.items():
        if value:
            raise ArgumentError(
                name, repr(value), "its default beside a target, for which layers are chosen one by one"
            )
    if not measure:
        raise ArgumentError("measure", measure, "True beside a target, which is reached by measuring")


def _settings(recipe: Recipe, target: Target, space: Space, float_dtype: torch.dtype, progress: bool) -> Settings:
    choices = tuple(c for c in space.choices if recipe.int8 or not c.int8)
    how = {"method": recipe.method, "rounding": recipe.rounding, "correct_bias": recipe.correct_bias}
    space = replace(space, choices=choices)
    return Settings(target, space, recipe.finetune, how, recipe.exclude, float_dtype, progress)


def _to_target(
    model: nn.Module,
    data: Iterable[Any] | None,
    example_inputs: Any,
    settings: Settings,
    held_out: Iterable[Any] | None,
) -> SearchResult:
    if data is None:
        raise ArgumentError("data", None, "batches to measure a target on")
    return search(model, data, example_inputs, settings, held_out)
