"""The weights that pruning works on: each once, with the layers that share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnncomp._modules import Layer, groups_of, is_depthwise, layers_of, parametrization_of, select, weight_parameter
from cnncomp.errors import ArgumentError
from cnncomp.pruning.mask import Mask, apply_mask, mask_of


@dataclass
class Target:
    """One weight and the layers that share it."""

    name: str
    layers: list[Layer]

    @property
    def value(self) -> Tensor:
        """What the layers compute with: masked, and rounded where quantised."""
        return self.layers[0].weight.detach()

    @property
    def parameter(self) -> Tensor:
        """What an optimiser changes."""
        return weight_parameter(self.layers[0], self.name)

    @property
    def mask(self) -> Tensor | None:
        return next((m for m in map(mask_of, self.layers) if m is not None), None)

    @property
    def mask_module(self) -> Mask:
        """The parametrization that holds the mask; one that prunes nothing is added where there is none."""
        found = parametrization_of(self.layers[0], Mask)
        return found or apply_mask(self.layers, torch.ones_like(self.parameter, dtype=torch.bool))

    @property
    def groups(self) -> int:
        return groups_of(self.layers[0])

    @property
    def numel(self) -> int:
        return self.parameter.numel()

    @property
    def masked(self) -> int:
        """Weights that are pruned already."""
        return 0 if self.mask is None else self.numel - int(self.mask.sum())


def targets_of(
    model: nn.Module,
    include_first_last: bool = False,
    include_depthwise: bool = False,
    exclude: str | Sequence[str] = (),
) -> list[Target]:
    """The weights to prune. One that any protected layer shares is protected too.

    Raises:
        ArgumentError: a pattern in ``exclude`` that matches nothing, nothing left to prune, weights that are NaN or
            parametrised by others.
    """
    layers = layers_of(model)
    names = list(layers)
    selected = set(select(names, exclude))
    if not include_first_last:
        selected -= {*names[:1], *names[-1:]}
    if not include_depthwise:
        selected -= {name for name in names if is_depthwise(layers[name])}
    protected = {id(weight_parameter(layers[n], n)) for n in names if n not in selected}
    targets: dict[int, Target] = {}
    for name in names:
        key = id(weight_parameter(layers[name], name))
        if key not in protected:
            targets.setdefault(key, Target(name, [])).layers.append(layers[name])
    if not targets:
        raise ArgumentError("model", f"{len(names)} Conv and Linear layers, none to be pruned", "at least one")
    for t in targets.values():
        if torch.isnan(t.value).any():
            raise ArgumentError("model", f"NaN in the weight of layer {t.name!r}", "weights that can be ranked")
    return list(targets.values())
