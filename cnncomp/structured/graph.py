"""Which channels of a model can go: nodes, dependencies, groups and the graph of them.

A *node* is a layer whose parameters have channels. A *dependency* says which channels of one of its axes belong to each unit
of a group. A *group* is a row of units in the same layers; a unit's channels stay or go together, in all of its dependencies.
The idea of one dependency graph for any network is that of Fang et al., "DepGraph: Towards Any Structural Pruning", 2023;
here channels are followed one by one, so that concatenation, groups and flattening need no index arithmetic of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cnncomp._modules import select
from cnncomp.structured.layers import Node
from cnncomp.structured.units import Units

#: Where a layer remembers, for each group along its outputs, how many units that had before any were pruned.
_MEMORY = "units_before_pruning"


@dataclass(frozen=True, eq=False)
class Dependency:
    """Channels of one axis of a node, one row per unit of a group: ``index`` is int64 (units, channels)."""

    node: Node
    axis: str
    index: Tensor

    def __str__(self) -> str:
        return f"{self.node.name}.{self.axis}"


@dataclass(eq=False)
class Group:
    """Units that are alike: each has the same number of channels in the same axes of the same layers."""

    dependencies: list[Dependency]
    #: Place of this group among those along its first layer's outputs.
    place: int = 0

    def __len__(self) -> int:
        """Units that it has now."""
        return len(self.dependencies[0].index)

    @property
    def producers(self) -> list[Dependency]:
        """The outputs of convolutions and linear layers that make its channels."""
        return [d for d in self.dependencies if d.axis == "out" and d.node.produces]

    @property
    def name(self) -> str:
        """The first layer that makes its channels; with a number where that makes several groups."""
        first = self.producers[0].node.name or "(model)"
        return f"{first}:{self.place}" if self.place else first

    @property
    def before(self) -> int:
        """Units that it had before any were pruned."""
        memory: Mapping[int, int] = getattr(self.producers[0].node.module, _MEMORY, {})
        return memory.get(self.place, len(self))

    def remember(self) -> None:
        """Note on the layer how many units there were."""
        module = self.producers[0].node.module
        setattr(module, _MEMORY, {**getattr(module, _MEMORY, {}), self.place: self.before})

    def __str__(self) -> str:
        others = [str(d) for d in self.dependencies if d is not self.producers[0]]
        count = f"{len(self)}" if self.before == len(self) else f"{len(self)} of {self.before}"
        each = self.producers[0].index.shape[1]
        units = "channels" if each == 1 else f"units of {each} channels"
        return f"{self.name}: {count} {units}, with {', '.join(others)}"


@dataclass(eq=False)
class ChannelGraph:
    """What of a model can lose channels. ``str()`` lists the groups, and the layers whose outputs stay with the reason."""

    model: nn.Module
    groups: list[Group] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.groups)} groups of channels", *(f"  {g}" for g in self.groups)]
        lines += [f"  {name or '(model)'} stays: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)

    @property
    def nodes(self) -> list[Node]:
        """The layers that the groups reach, each once."""
        return list(dict.fromkeys(d.node for g in self.groups for d in g.dependencies))

    def without(self, exclude: str | Sequence[str]) -> ChannelGraph:
        """The graph without the groups that reach a layer matched by ``exclude``.

        Raises:
            ArgumentError: a pattern that matches nothing.
        """
        if not exclude:
            return self
        names = [name for name, module in self.model.named_modules() if name and any(True for _ in module.parameters())]
        left = set(select(names, exclude))
        groups, kept = [], dict(self.kept)
        for group in self.groups:
            if all(d.node.name in left for d in group.dependencies):
                groups.append(group)
            else:
                kept.update({d.node.name: "is excluded, or tied to what is" for d in group.producers})
        return ChannelGraph(self.model, groups, kept)

    def masks(self, removed: Mapping[Group, Tensor]) -> dict[Node, dict[str, Tensor]]:
        """For every layer that is touched, and each of its axes, which channels stay (bool, one per channel).

        Args:
            removed: for each group, the units that go: bool, one per unit.
        """
        masks: dict[Node, dict[str, Tensor]] = defaultdict(dict)
        for group, gone in removed.items():
            if not gone.any():
                continue
            for d in group.dependencies:
                if d.axis not in masks[d.node]:
                    masks[d.node][d.axis] = torch.ones(d.node.size(d.axis), dtype=torch.bool)
                masks[d.node][d.axis][d.index[gone].flatten()] = False
        return masks


def build(model: nn.Module, units: Units, axes: Iterable[tuple[Node, str, tuple[int, ...]]]) -> ChannelGraph:
    """Sort channels into groups.

    Args:
        axes: for each axis of each node in the order of execution, the unit of each channel.
    """
    axes = list(axes)
    where: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for a, (_, _, ids) in enumerate(axes):
        for position, i in enumerate(ids):
            where[units.find(i)][a].append(position)
    groups: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for unit, places in where.items():
        groups[tuple((a, len(positions)) for a, positions in places.items())].append(unit)
    graph = ChannelGraph(model)
    seen: dict[str, int] = defaultdict(int)
    for signature, members in groups.items():
        free = [u for u in members if not units.why_fixed(u)]
        reason = next((why for u in members if (why := units.why_fixed(u))), "has one unit only, which can't go")
        group = Group([Dependency(*axes[a][:2], torch.tensor([where[u][a] for u in free])) for a, _ in signature])
        if not group.producers:
            continue
        first = group.producers[0].node.name
        group.place = seen[first]
        seen[first] += 1
        if free and group.before > 1:
            graph.groups.append(group)
        else:
            graph.kept.update({d.node.name: reason for d in group.producers})
    made = {d.node.name for g in graph.groups for d in g.producers}
    graph.kept = {name: why for name, why in graph.kept.items() if name not in made}
    return graph
