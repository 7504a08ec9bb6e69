"""How sparse a model is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cnncomp._modules import layers_of
from cnncomp.pruning.mask import mask_of


@dataclass(frozen=True)
class LayerSparsity:
    """Zeros in one layer's weight."""

    name: str
    kind: str
    shape: tuple[int, ...]
    zeros: int
    masked: bool

    @property
    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def sparsity(self) -> float:
        return self.zeros / max(1, self.numel)


@dataclass(frozen=True)
class SparsityReport:
    """Zeros in the Conv and Linear weights of a model; ``str()`` is a table."""

    layers: tuple[LayerSparsity, ...]

    @property
    def zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)

    @property
    def numel(self) -> int:
        return sum(layer.numel for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all layers."""
        return self.zeros / max(1, self.numel)

    def __str__(self) -> str:
        rows = [("layer", "type", "weight", "zeros", "sparsity", "")]
        for x in self.layers:
            shape = "×".join(map(str, x.shape))
            rows.append(
                (x.name or "(model)", x.kind, shape, f"{x.zeros:,}", f"{x.sparsity:.1%}", "masked" if x.masked else "")
            )
        rows.append(("total", "", f"{self.numel:,}", f"{self.zeros:,}", f"{self.sparsity:.1%}", ""))
        width = [max(len(row[i]) for row in rows) for i in range(6)]
        align = "<<<>><"
        lines = ("  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, align, width, strict=True)).rstrip() for row in rows)
        return "\n".join(lines)


def sparsity_of(model: nn.Module) -> SparsityReport:
    """Count the zeros in the weights of all Conv1d, Conv2d and Linear layers, masked or not.

    A weight that several layers share is counted in each of them.
    """
    rows = []
    for name, layer in layers_of(model).items():
        weight = layer.weight.detach()
        kind = type(layer).__name__.removeprefix("Parametrized")
        zeros = weight.numel() - int(weight.count_nonzero())
        rows.append(LayerSparsity(name, kind, tuple(weight.shape), zeros, mask_of(layer) is not None))
    return SparsityReport(tuple(rows))
