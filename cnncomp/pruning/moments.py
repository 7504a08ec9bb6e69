"""Second moments of layers' inputs, gathered on calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cnncomp._im2col import im2col
from cnncomp._modules import Layer, groups_of
from cnncomp.training import distributed


def columns_of(layer: Layer, x: Tensor) -> list[Tensor]:
    """What the layer multiplies its weight with, as parts (G, D, P): D = taps · input channels of a group, in that order,
    P output positions of some of the inputs."""
    return [part.transpose(1, 2).flatten(1, 2) for part in im2col(layer, x)]


def to_columns(weight: Tensor, groups: int) -> Tensor:
    """A weight (K, C/G, ...) in the order of :func:`columns_of`: (G, K/G, D)."""
    k, cg = weight.shape[:2]
    return weight.reshape(groups, k // groups, cg, -1).transpose(2, 3).flatten(2)


def from_columns(columns: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`to_columns`, for a weight of that shape."""
    g, kg, _ = columns.shape
    return columns.view(g, kg, -1, shape[1]).transpose(2, 3).reshape(shape)


@dataclass
class Moments:
    """Sums over all positions: ``hessian`` Σ x̂·x̂ᵀ and ``cross`` Σ x·x̂ᵀ (G, D, D), ``dense`` Σ x and ``pruned`` Σ x̂ (G, D),
    with x the layer's inputs in the dense network and x̂ those in the pruned one."""

    hessian: Tensor
    cross: Tensor
    dense: Tensor
    pruned: Tensor
    count: float = 0

    @classmethod
    def zeros(cls, layer: Layer) -> Moments:
        g = groups_of(layer)
        d = layer.weight[0].numel()
        square = torch.zeros(g, d, d, dtype=torch.float64, device=layer.weight.device)
        return cls(square, square.clone(), square[:, 0].clone(), square[:, 0].clone())

    def add(self, layer: Layer, dense: Tensor, pruned: Tensor) -> None:
        """Take one call of ``layer`` in: its inputs in both networks."""
        for x, y in zip(columns_of(layer, dense), columns_of(layer, pruned), strict=True):
            transposed = y.transpose(1, 2)
            self.hessian += y @ transposed
            self.cross += x @ transposed
            self.dense += x.sum(2)
            self.pruned += y.sum(2)
            self.count += x.shape[2]

    def of_all_processes(self) -> Moments:
        """Averaged over the processes of a group: what the joined data gives, up to a common factor."""
        count = float(distributed.mean(self.hessian.new_tensor(float(self.count))))
        mean = distributed.mean
        return Moments(mean(self.hessian), mean(self.cross), mean(self.dense), mean(self.pruned), count)

    def centred(self) -> tuple[Tensor, Tensor]:
        """``hessian`` and ``cross`` about the means: what is left to the weights where an intercept takes the means."""
        mean = self.pruned / max(1, self.count)
        return (
            self.hessian - self.pruned[:, :, None] * mean[:, None, :],
            self.cross - self.dense[:, :, None] * mean[:, None, :],
        )
