"""Channel pruning that does nothing, or can't be done, says so and leaves the model as it was."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import cnncomp
from cnncomp.models import ConcatNet
from cnncomp.structured import channels_of, prune_channels
from cnncomp.structured.layers import Node
from tests.channel_nets import ReadsItsWidth

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """Can't be traced, as a whole or in parts that have channels of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) if x.sum() > -1e9 else -self.a(x))


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Branches(), "no channel was taken out: .*model.* can't be traced"),
        (tied(), "no channel was taken out: .*shares its weights"),
        (ReadsItsWidth(), "no channel was taken out: the model was left as it is"),
        (nn.ReLU(), "no channel was taken out: no layer has channels"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), "no channel was taken out: sparsity"),
    ],
)
def test_a_warning_says_why_nothing_goes(model: nn.Module, reason: str) -> None:
    model = nn.Sequential(model).eval() if isinstance(model, nn.ReLU) else model.eval()
    before = copy.deepcopy(model.state_dict())
    sparsity = 0.1 if "sparsity" in reason else 0.5
    with pytest.warns(UserWarning, match=reason):
        cnncomp.prune(model, sparsity, pattern="channel", example_inputs=X)
    recipe = cnncomp.Recipe(sparsity=sparsity, pattern="channel", int8=False)
    with pytest.warns(UserWarning, match=reason):
        cnncomp.compress(model, None, recipe, example_inputs=X, measure=False)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_no_warning_where_channels_go_or_none_should() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = prune_channels(ConcatNet(), 0.0, X)
        for _ in range(2):  # the second time nothing is left to do
            prune_channels(model, 0.5, X)
    assert model.stem.out_channels < 16


@pytest.mark.parametrize("fails_at", [0, 1, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_layer_that_cannot_be_made_smaller(
    monkeypatch: pytest.MonkeyPatch, fails_at: int, error: type[BaseException]
) -> None:
    model = ConcatNet().eval()
    graph, before, expected = channels_of(model, X), copy.deepcopy(model), model(X)
    calls = 0
    for kind in {type(node) for node in graph.nodes}:

        def shrink(self: Node, *keep: Tensor | None, original=kind.shrink) -> None:  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls > fails_at:
                raise error("no memory")
            original(self, *keep)

        monkeypatch.setattr(kind, "shrink", shrink)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            prune_channels(model, 0.5, X, graph=graph)
    else:
        with pytest.warns(UserWarning, match="left as it is"):
            prune_channels(model, 0.5, X, graph=graph)
    assert calls == fails_at + 1
    for module, was in zip(model.modules(), before.modules(), strict=True):
        assert {k for k in vars(module) if k[0] != "_"} == {k for k in vars(was) if k[0] != "_"}
    assert str(model) == str(before) and torch.equal(model(X), expected)
