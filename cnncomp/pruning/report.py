"""How sparse a model is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cnncomp._modules import layers_of, parametrization_of
from cnncomp.pruning.mask import Mask


@dataclass(frozen=True)
class LayerSparsity:
    """Zeros in one layer's weight; ``pattern`` and ``note`` say how it was pruned ("" where it has no mask)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    zeros: int
    masked: bool
    pattern: str = ""
    note: str = ""

    @property
    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def sparsity(self) -> float:
        return self.zeros / max(1, self.numel)

    @property
    def remark(self) -> str:
        """ "masked", and the pattern unless it is unstructured, and the note."""
        if not self.masked:
            return ""
        pattern = "" if self.pattern == "unstructured" else f" {self.pattern}"
        return f"masked{pattern}" + (f": {self.note}" if self.note else "")


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
            rows.append((x.name or "(model)", x.kind, shape, f"{x.zeros:,}", f"{x.sparsity:.1%}", x.remark))
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
        mask = parametrization_of(layer, Mask)
        how = ("", "") if mask is None else (mask.pattern, mask.note)
        rows.append(LayerSparsity(name, kind, tuple(weight.shape), zeros, mask is not None, *how))
    return SparsityReport(tuple(rows))
