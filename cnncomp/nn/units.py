"""Images between layers whose kernels gather them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cnncomp.sparsity.vectors import from_units, image_shape


@dataclass(frozen=True)
class Units:
    """8-bit images in units, as the kernels of runs and of V:2:M read them: from one such layer to the next on a GPU.

    Attributes:
        tensor: As ``to_units`` of :mod:`cnncomp.sparsity.vectors` or :mod:`cnncomp.sparsity.vnm` gives it, all units full.
    """

    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size(image_shape(self.tensor))

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def dim(self) -> int:
        return 4

    def clone(self) -> Units:
        return Units(self.tensor.clone())

    def images(self) -> Tensor:
        """(N, C, H, W), channels_last, copied."""
        return from_units(self.tensor)


def plain(t: Tensor | Units | None) -> Tensor | None:
    """The tensor itself, in units or not."""
    return t.tensor if isinstance(t, Units) else t


def as_images(units: Tensor) -> Tensor:
    """A view of units as images (C' * NB, U, H, W), channels_last, whose channels are the images of a unit (and four channels
    of theirs): what works on each channel alone does on these what it does on the images."""
    return units.flatten(4).flatten(0, 1).permute(0, 3, 1, 2)


def from_images(images: Tensor, units: Tensor) -> Tensor:
    """The inverse of :func:`as_images`, of images that were made of those of ``units``, of another height and width."""
    pixels = images.permute(0, 2, 3, 1)
    return pixels.reshape(*units.shape[:2], *pixels.shape[1:3], *units.shape[4:])
