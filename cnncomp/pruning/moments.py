"""Second moments of layers' inputs, gathered on calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnncomp._modules import Layer
from cnncomp.pruning.patterns import groups_of
from cnncomp.training import distributed

#: Numbers that im2col writes at a time.
_CHUNK = 1 << 24


def columns_of(layer: Layer, x: Tensor) -> list[Tensor]:
    """What the layer multiplies its weight with, as parts (G, D, P): D = taps · input channels of a group, in that order,
    P output positions of some of the inputs."""
    if isinstance(layer, nn.Linear):
        return [x.reshape(-1, x.shape[-1]).t()[None]]
    one_dimensional = isinstance(layer, nn.Conv1d)
    if x.dim() == (2 if one_dimensional else 3):
        x = x[None]
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros" or any(layer.padding):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if one_dimensional:
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    taps = kernel[0] * kernel[1]
    per_image = max(1, x[0].numel() * taps // (stride[0] * stride[1]))
    parts = []
    for chunk in x.split(max(1, _CHUNK // per_image)):
        unfolded = F.unfold(chunk, kernel, dilation=dilation, stride=stride)  # (N, C·T, L)
        n, _, positions = unfolded.shape
        split = unfolded.view(n, groups_of(layer), -1, taps, positions)
        parts.append(split.permute(1, 3, 2, 0, 4).reshape(split.shape[1], -1, n * positions))
    return parts


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
