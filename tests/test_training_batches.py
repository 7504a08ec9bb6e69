"""Batches of images: order, shares of processes, augmentation, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cnncomp import data
from cnncomp.errors import ArgumentError, DtypeError
from cnncomp.training import Batches, shift_and_flip


def images(n: int) -> tuple[Tensor, Tensor]:
    split = data.digits()
    return split.train_images[:n], split.train_labels[:n]


def test_batches_depend_on_seed_epoch_and_step_alone() -> None:
    x, y = images(50)
    a, b = (Batches(x, y, 16, augment=shift_and_flip(2), seed=1) for _ in range(2))
    a.set_epoch(3)
    list(a)
    b.set_epoch(3)
    for (xa, ya), (xb, yb) in zip(a, b, strict=True):
        assert torch.equal(xa, xb) and torch.equal(ya, yb)
    b.set_epoch(4)
    assert not torch.equal(next(iter(a))[1], next(iter(b))[1])
    assert sorted(torch.cat([y for _, y in a]).tolist()) == sorted(y.tolist()) and len(list(a)) == len(a) == 4
    assert all(isinstance(batch, Tensor) for batch in Batches(x, None, 16))


def test_processes_share_the_batches_of_one() -> None:
    x, y = images(50)
    one = list(Batches(x, y, 16, seed=1))[:3]  # the incomplete fourth is left out
    parts = [list(Batches(x, y, 16, seed=1, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(p) for p in parts] == [3, 3]
    for (xs, ys), first, second in zip(one, *parts, strict=True):
        assert torch.equal(xs, torch.stack([first[0], second[0]], 1).flatten(0, 1))
        assert torch.equal(ys, torch.stack([first[1], second[1]], 1).flatten())


def test_batches_refuse() -> None:
    x, y = images(8)
    for arguments, message in (
        ((x[:0], y[:0]), "images"),
        ((x, y[:3]), "labels"),
        ((x, y, 0), "batch_size"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Batches(*arguments)
    with pytest.raises(ArgumentError, match="batch_size"):
        Batches(x, y, 3, world_size=2)
    with pytest.raises(DtypeError, match="images"):
        next(iter(Batches(x.long(), y)))
    whole = (x * 255).round().to(torch.uint8)
    assert torch.equal(next(iter(Batches(whole, y, shuffle=False)))[0], whole.float() / 255)


def test_shift_and_flip_moves_each_image_as_one() -> None:
    x = torch.rand(64, 3, 9, 7)
    out = shift_and_flip(2)(x, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(x, (2,) * 4)
    views = [(flip, top, left) for flip in (False, True) for top in range(5) for left in range(5)]

    def view(i: int, flip: bool, top: int, left: int) -> Tensor:
        part = padded[i, :, top : top + 9, left : left + 7]
        return part.flip(2) if flip else part

    found = [next((v for v in views if torch.equal(view(i, *v), out[i])), None) for i in range(len(x))]
    assert None not in found  # each is one of the 50 views of its own image
    assert len(set(found)) > 25
    assert torch.equal(shift_and_flip(0, flip=False)(x, torch.Generator()), x)
