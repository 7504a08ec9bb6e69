"""A loader over tensors in memory whose order and augmentation depend on seed, epoch and step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cnncomp.errors import ArgumentError, DtypeError

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Batches:
    """Batches of images in memory, shuffled anew in each epoch.

    Order and augmentation are functions of ``seed``, the epoch that :meth:`set_epoch` tells, and the step: a training that is
    resumed sees what it would have seen. Of ``world_size`` processes each takes every ``world_size``-th image of the same
    batch, so that all of them together see the batches of one process; an incomplete last batch is then left out.

    Args:
        images: (N, C, H, W), float, or uint8, which is scaled to 0..1.
        labels: (N,) int64, or None: then batches are images alone.
        batch_size: Images of a batch, over all processes.
        shuffle: In a new order in each epoch; otherwise in order.
        augment: Called with the float images of a batch and a generator.
        seed: Of order and augmentation.
        rank, world_size: This process and the number of them.

    Raises:
        ArgumentError: No image, labels of another number, or a batch size that the processes can't share.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        batch_size: int = 128,
        *,
        shuffle: bool = True,
        augment: Augment | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(images) == 0:
            raise ArgumentError("images", "none", "at least one image")
        if labels is not None and len(labels) != len(images):
            raise ArgumentError("labels", f"{len(labels)} labels", f"one for each of the {len(images)} images")
        if batch_size < 1 or batch_size % world_size:
            raise ArgumentError("batch_size", batch_size, f"a multiple of world_size={world_size}, above 0")
        if not 0 <= rank < world_size:
            raise ArgumentError("rank", rank, f"0 to {world_size - 1}")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.shuffle, self.augment, self.seed = shuffle, augment, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose batches the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.world_size > 1:
            return len(self.images) // self.batch_size
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        generator = torch.Generator()
        generator.manual_seed(_mix(self.seed, self.epoch))
        count = len(self.images)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for step, index in enumerate(order.split(self.batch_size)[: len(self)]):
            index = index[self.rank :: self.world_size]
            x = as_float(self.images[index])
            if self.augment is not None:
                generator.manual_seed(_mix(self.seed, self.epoch, step, self.rank))
                x = self.augment(x, generator)
            yield x if self.labels is None else (x, self.labels[index])


def _mix(*numbers: int) -> int:
    """One seed from several numbers, different for each of their combinations in practice."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63)
    return seed


def as_float(images: Tensor) -> Tensor:
    """uint8 images scaled to 0..1; float ones as they are.

    Raises:
        DtypeError: another dtype.
    """
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise DtypeError("images", images.dtype, "uint8 or floating point")
    return images


def shift_and_flip(pixels: int = 2, flip: bool = True) -> Augment:
    """Augmentation: each image moved by up to ``pixels`` in both directions, filled with zeros, and half of them mirrored.

    Args:
        pixels: The largest shift; 0 for none.
        flip: Whether to mirror; not for digits and letters.
    """

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        n, c, h, w = x.shape
        if pixels:
            padded = F.pad(x, (pixels,) * 4)
            top, left = torch.randint(0, 2 * pixels + 1, (2, n, 1, 1, 1), generator=generator)
            rows = (top + torch.arange(h).view(1, 1, h, 1)).expand(n, c, h, w + 2 * pixels)
            columns = (left + torch.arange(w).view(1, 1, 1, w)).expand(n, c, h, w)
            x = padded.gather(2, rows).gather(3, columns)
        if flip:
            mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        return x

    return augment
