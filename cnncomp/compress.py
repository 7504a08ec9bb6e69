"""``cnncomp.compress``: prune, quantize and convert in one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from cnncomp.convert import ConvertedModel, convert
from cnncomp.errors import ArgumentError
from cnncomp.pruning import prune
from cnncomp.quantization import quantize


@dataclass(frozen=True)
class Recipe:
    """What :func:`compress` does, in this order.

    Args:
        sparsity: fraction of zeros, 0 for no pruning.
        pattern: as in :func:`cnncomp.prune`.
        finetune: called with the pruned model, to train it in place; None for none.
        int8: quantise after training.
        method: calibration, as in :func:`cnncomp.quantize`.
        exclude: name patterns of layers that keep their weights and precision.
    """

    sparsity: float = 0.0
    pattern: str = "unstructured"
    finetune: Callable[[nn.Module], object] | None = None
    int8: bool = True
    method: str = "mse"
    exclude: tuple[str, ...] = ()


def compress(
    model: nn.Module,
    data: Iterable[Any] | None,
    recipe: Recipe | None = None,
    *,
    example_inputs: Any,
    measure: bool = True,
    progress: bool = True,
) -> ConvertedModel:
    """The whole way in one call. ``model`` stays as it is.

    Args:
        data: batches for calibration; needed if the recipe quantises.
        recipe: what to do; by default int8 and no pruning.
        example_inputs: as in :func:`cnncomp.convert`.

    Raises:
        ArgumentError: a recipe that quantises, without data.
    """
    recipe = Recipe() if recipe is None else recipe
    if recipe.int8 and data is None:
        raise ArgumentError("data", None, "batches to calibrate int8 with (or Recipe(int8=False))")
    model = copy.deepcopy(model)
    if recipe.sparsity:
        prune(model, sparsity=recipe.sparsity, pattern=recipe.pattern, exclude=recipe.exclude)
    if recipe.finetune is not None:
        recipe.finetune(model)
    model.eval()
    if recipe.int8:
        assert data is not None
        quantize(model, data, method=recipe.method, exclude=recipe.exclude, progress=progress)
    return convert(model, example_inputs, measure=measure, progress=progress)
