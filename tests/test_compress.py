"""Prune, quantise and convert in one call, by a recipe."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import cnncomp
from cnncomp.errors import ArgumentError
from cnncomp.nn import ConvertedLayer

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _layers(model: nn.Module) -> dict[str, ConvertedLayer]:
    return {m.info.name: m for m in model.modules() if isinstance(m, ConvertedLayer)}


def test_compress_is_the_whole_way() -> None:
    model = cnncomp.models.ArticleNet()
    trained = []
    recipe = cnncomp.Recipe(sparsity=0.5, finetune=trained.append, exclude=("features.0",))
    fast = cnncomp.compress(model, [X], recipe, example_inputs=X, measure=False, progress=False)
    kinds = {name: type(m).__name__ for name, m in _layers(fast).items()}
    assert kinds == {"features.0": "DenseConv2d", "features.3": "QuantConv2d", "classifier": "QuantLinear"}
    assert len(trained) == 1
    zeros = (
        1 - torch.count_nonzero(_layers(fast)["features.3"].weight_int8()) / _layers(fast)["features.3"].weight.numel()
    )
    assert zeros >= 0.49
    with pytest.raises(ArgumentError, match="data"):
        cnncomp.compress(model, None, example_inputs=X)


def test_recipe_says_how_to_prune_and_quantise() -> None:
    torch.manual_seed(0)
    model, data = cnncomp.models.ArticleNet().eval(), [torch.randn(8, 3, 32, 32) for _ in range(2)]
    recipe = cnncomp.Recipe(pattern="2:4", reconstruct=True, rounding="adaptive", method="minmax")
    fast = cnncomp.compress(model, iter(data), recipe, example_inputs=X, measure=False, progress=False)
    by_hand = cnncomp.prune(copy.deepcopy(model), pattern="2:4", reconstruct=True, data=data, progress=False)
    how = {"method": "minmax", "equalize": "activations", "correct_bias": True, "rounding": "adaptive"}
    cnncomp.quantize(by_hand, data, **how, progress=False)
    assert torch.equal(fast(X), cnncomp.convert(by_hand, X, measure=False, progress=False)(X))
    plain = cnncomp.Recipe(pattern="2:4", equalize=None, correct_bias=False)
    assert not torch.equal(
        fast(X), cnncomp.compress(model, data, plain, example_inputs=X, measure=False, progress=False)(X)
    )
    with pytest.raises(ArgumentError, match="reconstruct"):
        cnncomp.compress(model, None, cnncomp.Recipe(pattern="2:4", reconstruct=True, int8=False), example_inputs=X)
    with pytest.raises(ArgumentError, match="reconstruct"):
        cnncomp.prune(model, pattern="channel", reconstruct=True, data=data, example_inputs=X)


def test_channels_are_a_pattern() -> None:
    model, x = cnncomp.models.ConcatNet(), torch.randn(1, 3, 8, 8)
    recipe = cnncomp.Recipe(sparsity=0.5, pattern="channel", int8=False)
    fast = cnncomp.compress(model, None, recipe, example_inputs=x, measure=False)
    assert model.stem.out_channels == 16
    smaller = cnncomp.prune_channels(copy.deepcopy(model), 0.5, x).eval()
    assert torch.allclose(fast(x), smaller(x), atol=1e-5)


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="model: got int"):
        cnncomp.compress(3, [X], example_inputs=X)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="recipe: got dict"):
        cnncomp.compress(nn.Conv2d(3, 3, 1), [X], {"int8": True}, example_inputs=X)  # type: ignore[arg-type]
