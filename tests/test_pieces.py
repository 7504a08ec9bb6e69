"""Batches that run in pieces give what the network gives, and networks in which images meet don't run so."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnncomp
from cnncomp import pieces
from cnncomp.convert import ConvertedModel
from cnncomp.pieces import Pieces
from tests.helpers import mask_weights
from tests.saved_networks import NETWORKS, converted


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces as small as possible, as if the activations were large."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)


def in_pieces(model: ConvertedModel, *inputs: Tensor) -> bool:
    """Whether the model, called often enough, runs in pieces."""
    with torch.no_grad():
        for _ in range(3):
            model(*inputs)
    return any(isinstance(r, Pieces) for r in model._recordings._by_key.values())


def sparse(net: nn.Module, *inputs: Tensor) -> ConvertedModel:
    return cnncomp.convert(mask_weights(net, 0.8).eval(), inputs, measure=False, cache=False)


@pytest.mark.parametrize("case", [c for c in NETWORKS if c != "dense"])
@pytest.mark.parametrize("images", [3, 4, 7])
def test_pieces_give_what_the_network_gives(case: str, images: int) -> None:
    model, example = converted(case)
    model = copy.deepcopy(model)  # which others use, without pieces
    x = torch.randn(images, *example.shape[1:])
    assert in_pieces(model, x)
    # float32 classifiers are torch's, whose sums go in another order for another number of images.
    torch.testing.assert_close(model(x), model.network(x), atol=1e-6, rtol=1e-5)
    assert model(x).stride() == model.network(x).stride()


class Net(nn.Module):
    """A convolution, and what a function makes of its output."""

    def __init__(self, then: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.conv, self.then = nn.Conv2d(3, 8, 3, padding=1), then

    def forward(self, x: Tensor) -> object:
        return self.then(self.conv(x))


X = torch.randn(5, 3, 6, 8, generator=torch.Generator().manual_seed(3))

APART = {
    "several results": lambda y: (y, {"mean": y.mean((2, 3))}),
    "view": lambda y: y.view(y.size(0), -1),
    "shape": lambda y: y.reshape(y.shape[0], 4, -1),
    "mean over negative dimensions": lambda y: y.mean([-1, -2], keepdim=True),
    "cat of channels": lambda y: torch.cat([y, F.relu(y)], 1),
    "pad": lambda y: F.pad(y, (1, 2)),
    "gate": lambda y: y * torch.sigmoid(F.adaptive_avg_pool2d(y, 1)),
}
TOGETHER = {
    "mean over images": lambda y: y - y.mean(0, keepdim=True),
    "mean over all": lambda y: y / y.mean(),
    "cat of images": lambda y: torch.cat([y, y]),
    "softmax over images": lambda y: torch.softmax(y, 0),
    "divided by their number": lambda y: y / y.size(0),
    "turned around": lambda y: y.flip(0),
    "transposed": lambda y: y.transpose(0, 1),
    "one image": lambda y: y[0],
    "a number": lambda y: (y, y.size(0)),
    "a vector of images on the last dimension": lambda y: y.mean((2, 3)) + y.mean((1, 2, 3)),
}


@pytest.mark.parametrize("then", APART.values(), ids=APART)
def test_images_that_do_not_meet(then: Callable[[Tensor], object]) -> None:
    model = sparse(Net(then), X)
    assert in_pieces(model, X)
    torch.testing.assert_close(model(X), model.network(X))


@pytest.mark.parametrize("name", TOGETHER)
def test_images_that_meet(name: str) -> None:
    # Of eight images, as many as there are channels and columns, so that no shape tells them apart.
    x = torch.randn(8, 3, 6, 8)
    model = sparse(Net(TOGETHER[name]), x)
    assert not in_pieces(model, x)
    torch.testing.assert_close(model(x), model.network(x))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv(x) + y


def test_other_arguments_are_cut_only_if_they_are_batches_too() -> None:
    y = torch.randn(5, 8, 4, 6)
    both, one = sparse(Two(), X, y), sparse(Two(), X, y[:1])
    assert in_pieces(both, X, y) and not in_pieces(one, X, y[:1])
    torch.testing.assert_close(both(X, y), both.network(X, y))
    torch.testing.assert_close(one(X, y[:1]), one.network(X, y[:1]))


def test_small_activations_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not in_pieces(sparse(Net(F.relu), X), X)


def test_sizes_are_even_and_as_few_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model, x = sparse(net, X), torch.randn(11, 3, 6, 8)
    image = 8 * 4 * 6 * 4  # bytes between the two layers
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * image + 100)
    assert in_pieces(model, x)
    recording = next(r for r in model._recordings._by_key.values() if isinstance(r, Pieces))
    assert recording.sizes == [4, 4, 3]
    assert all(r.arena_bytes <= pieces.PIECE_BYTES for r in recording.recordings.values())


def test_weights_that_are_replaced_count_in_every_piece() -> None:
    model = sparse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), X)
    assert in_pieces(model, X)
    for layer in (m for m in model.modules() if hasattr(m, "values")):
        layer.values = layer.values * 0.5
    torch.testing.assert_close(model(X), model.network(X))
