"""Prune, quantise and convert in one call, by a recipe."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import cnncomp
from cnncomp.errors import ArgumentError
from cnncomp.nn import ConvertedLayer
from cnncomp.search import Space

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


def test_the_plan_knows_what_floats_may_be() -> None:
    def data() -> Iterator[torch.Tensor]:
        pytest.fail("read before the arguments were looked at")
        yield X

    model = cnncomp.models.ArticleNet()
    for dtype in (torch.float32, torch.bfloat16):
        fast = cnncomp.compress(model, [X], example_inputs=X, measure=False, float_dtype=dtype, progress=False)
        assert fast.plan.float_dtype == str(dtype).removeprefix("torch.")
    for target in (None, cnncomp.Target(latency=0.5)):
        with pytest.raises(
            ArgumentError, match=r"float_dtype: got torch.int8, expected torch.float32, torch.float16 or"
        ):
            cnncomp.compress(model, data(), example_inputs=X, target=target, float_dtype=torch.int8)


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": -0.5}, "sparsity: got -0.5"),
        ({"sparsity": float("nan")}, "sparsity: got nan"),
        ({"sparsity": "0.5"}, "sparsity: got '0.5'"),
        ({"sparsity": None}, "sparsity: got None"),
        ({"sparsity": False}, "sparsity: got False"),
        ({"sparsity": 1.5, "pattern": "channel"}, "sparsity: got 1.5"),
        ({"sparsity": 0.9, "pattern": "2:4"}, "sparsity: got 0.9"),
        ({"pattern": "4:2"}, "pattern: got '4:2'"),
        ({"pattern": "channel", "reconstruct": True}, "reconstruct: got True"),
        ({"reconstruct": "no"}, "reconstruct: got 'no'"),
        ({"finetune": 3}, "finetune: got int"),
        ({"int8": "no"}, "int8: got 'no'"),
        ({"correct_bias": None}, "correct_bias: got None"),
        ({"method": "kl"}, "method: got 'kl'"),
        ({"equalize": "outputs"}, "equalize: got 'outputs'"),
        ({"rounding": "up"}, "rounding: got 'up'"),
        ({"float_budget": "a"}, "float_budget: got 'a'"),
        ({"exclude": 3}, "exclude: got 3"),
    ],
)
def test_recipes_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        cnncomp.Recipe(**{"int8": False, **fields})


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"reconstruct": True}, {}, "reconstruct: got True"),
        ({"float_budget": 0.1}, {}, "float_budget: got 0.1"),
        ({"equalize": "weights"}, {}, "equalize: got 'weights'"),
        ({"pattern": "2:4"}, {}, "recipe: got sparsity 0.0, pattern '2:4'"),
        ({}, {"measure": False}, "measure: got False"),
        ({}, {"space": 3}, "space: got int"),
        ({}, {"target": 0.5}, "target: got float"),
        ({}, {"target": None, "space": Space()}, "space: got Space"),
        ({}, {"target": None, "held_out": [X]}, "held_out: got list"),
    ],
)
def test_nothing_is_ignored(fields: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    given = {"target": cnncomp.Target(latency=0.5), "example_inputs": X, **arguments}
    with pytest.raises(ArgumentError, match=message):
        cnncomp.compress(cnncomp.models.ArticleNet(), [X], cnncomp.Recipe(**fields), **given)


def test_a_star_import_leaves_torch_its_names() -> None:
    namespace: dict[str, object] = {"nn": nn}
    exec("from cnncomp import *", namespace)
    assert namespace["nn"] is nn and "ops" not in namespace and namespace["compress"] is cnncomp.compress
