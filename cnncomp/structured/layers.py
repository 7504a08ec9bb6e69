"""Layers whose parameters have a channel axis: one class for each kind, which knows how to lose channels and what they weigh.

Axes: "out" are the channels that the layer gives, "in" those that it sums over. Layers that work on each channel alone have
only "out", which is then their input too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cnncomp._modules import _chain
from cnncomp.pruning.criteria import as_float
from cnncomp.pruning.mask import Mask


class Node:
    """A layer in the graph. ``name`` is its path in the model."""

    #: Whether "out" channels are made here, so that they can be counted and excluded by this layer's name.
    produces = False

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module

    def __repr__(self) -> str:
        return f"{self.name or '(model)'} ({type(self.module).__name__.removeprefix('Parametrized')})"

    def size(self, axis: str) -> int:
        """Channels on ``axis``."""
        raise NotImplementedError

    def shrink(self, keep_in: Tensor | None, keep_out: Tensor | None) -> None:
        """Lose the channels where a mask (bool, one per channel) is False; None keeps all."""
        raise NotImplementedError

    def slices(self, axis: str, values: dict[str, Tensor]) -> list[Tensor]:
        """From tensors shaped like the layer's parameters, by name, those that have ``axis``, as (channels, rest)."""
        raise NotImplementedError

    @torch.no_grad()
    def zero(self, keep_in: Tensor | None, keep_out: Tensor | None) -> None:
        """Make zero what :meth:`shrink` would take away: parameters, not statistics."""
        if keep_out is not None:
            for parameter in self.parameters().values():
                parameter[~keep_out.to(parameter.device)] = 0

    def parameters(self) -> dict[str, Tensor]:
        """The layer's parameters; a weight behind a mask under its plain name."""
        found: dict[str, Tensor] = dict(self.module.named_parameters(recurse=False))
        if parametrize.is_parametrized(self.module, "weight"):
            found["weight"] = _chain(self.module).original
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers that have channels, masks too, for :meth:`_replace`."""
        yield from self.parameters().items()
        yield from ((name, b) for name, b in self.module.named_buffers(recurse=False) if b.dim() > 0)

    def _take(self, name: str, keep: Tensor | None, dim: int = 0) -> None:
        """Let the tensor called ``name``, if there is one, lose entries along ``dim``."""
        tensor = dict(self.tensors()).get(name)
        if tensor is None or keep is None:
            return
        index = keep.nonzero().flatten().to(tensor.device)
        set_data(tensor, tensor.detach().index_select(dim, index))
        if name == "weight" and (mask := mask_buffer(self.module)) is not None:
            set_data(mask, mask.index_select(dim, index))


def mask_buffer(module: nn.Module) -> Tensor | None:
    """The pruning mask on the module's weight, if any."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    return next((p.mask for p in _chain(module) if isinstance(p, Mask)), None)


def set_data(tensor: Tensor, data: Tensor) -> None:
    """Put other values of any shape into a parameter, which stays the one that optimisers know; its gradient goes."""
    tensor.data = data
    tensor.grad = None


class WeightNode(Node):
    """Conv1d, Conv2d, Conv3d, Linear: a weight (K, C/G, ...) and a bias (K)."""

    produces = True

    @property
    def groups(self) -> int:
        return int(getattr(self.module, "groups", 1))

    def size(self, axis: str) -> int:
        weight = self.parameters()["weight"]
        return weight.shape[0] if axis == "out" else weight.shape[1] * self.groups

    @property
    def by_group(self) -> bool:
        """Whether whole groups of a grouped convolution go, as in a depthwise one; else the same channels of each group.
        Of the two, what leaves the finer choice."""
        k, c = self.size("out"), self.size("in")
        return self.groups > 1 and self.groups >= max(k, c) // self.groups

    def shrink(self, keep_in: Tensor | None, keep_out: Tensor | None) -> None:
        groups = self.groups
        if keep_in is not None:
            by_group = keep_in.view(groups, -1)
            left = by_group.any(1)
            self._take("weight", by_group[int(left.int().argmax())], dim=1)
            groups = int(left.sum())
        self._take("weight", keep_out)
        self._take("bias", keep_out)
        module, weight = self.module, self.parameters()["weight"]
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        else:
            assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
            module.groups = groups
            module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * groups

    @torch.no_grad()
    def zero(self, keep_in: Tensor | None, keep_out: Tensor | None) -> None:
        super().zero(keep_in, keep_out)
        if keep_in is not None:
            weight, g = self.parameters()["weight"], self.groups
            gone = (~keep_in).view(g, 1, -1, 1).to(weight.device)
            weight.view(g, weight.shape[0] // g, weight.shape[1], -1).masked_fill_(gone, 0)

    def slices(self, axis: str, values: dict[str, Tensor]) -> list[Tensor]:
        weight, g = values["weight"], self.groups
        if axis == "in":
            k, cg = weight.shape[:2]
            return [weight.reshape(g, k // g, cg, -1).transpose(1, 2).reshape(g * cg, -1)]
        rows = [weight.flatten(1)]
        return rows if "bias" not in values else [*rows, values["bias"][:, None]]


class ChannelNode(Node):
    """A layer with parameters or statistics for each channel: BatchNorm, InstanceNorm, GroupNorm, PReLU."""

    #: Attributes that hold the number of channels.
    counts: tuple[str, ...] = ("num_features",)

    def size(self, axis: str) -> int:
        return int(getattr(self.module, self.counts[0]))

    def shrink(self, keep_in: Tensor | None, keep_out: Tensor | None) -> None:
        assert keep_in is None
        if keep_out is None:
            return
        for name, _ in list(self.tensors()):
            self._take(name, keep_out)
        for attribute in self.counts:
            setattr(self.module, attribute, int(keep_out.sum()))

    def slices(self, axis: str, values: dict[str, Tensor]) -> list[Tensor]:
        return [v[:, None] for v in values.values()]


class PReLUNode(ChannelNode):
    """PReLU with one slope per channel."""

    counts = ("num_parameters",)


class GroupNormNode(ChannelNode):
    """GroupNorm: each of its groups is normalised alone, so that whole groups can go and the others stay exact."""

    counts = ("num_channels",)

    def shrink(self, keep_in: Tensor | None, keep_out: Tensor | None) -> None:
        assert isinstance(self.module, nn.GroupNorm)
        if keep_out is not None:
            groups = int(keep_out.view(self.module.num_groups, -1).any(1).sum())
            super().shrink(keep_in, keep_out)
            self.module.num_groups = groups


_NODES: dict[type[nn.Module], type[Node]] = {
    nn.Conv1d: WeightNode,
    nn.Conv2d: WeightNode,
    nn.Conv3d: WeightNode,
    nn.Linear: WeightNode,
    nn.BatchNorm1d: ChannelNode,
    nn.BatchNorm2d: ChannelNode,
    nn.BatchNorm3d: ChannelNode,
    nn.InstanceNorm1d: ChannelNode,
    nn.InstanceNorm2d: ChannelNode,
    nn.InstanceNorm3d: ChannelNode,
    nn.GroupNorm: GroupNormNode,
    nn.PReLU: PReLUNode,
}


def node_type(cls: type[nn.Module]) -> type[Node] | None:
    """The kind of node for a layer of exactly that class; None where its parameters are not known to have channels."""
    return _NODES.get(cls)


def squared(node: Node, axis: str, values: dict[str, Tensor]) -> Tensor:
    """Sum of squares of what belongs to each channel of ``axis``: (channels,), float64."""
    parts = [as_float(s).square().sum(1, dtype=torch.float64) for s in node.slices(axis, values)]
    return torch.stack(parts).sum(0) if parts else torch.zeros(node.size(axis), dtype=torch.float64)
