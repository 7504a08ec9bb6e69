"""Following channels through a traced graph: what each operation does with the channels of its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from cnncomp.graph import operations as ops
from cnncomp.structured.layers import GroupNormNode, Node, WeightNode
from cnncomp.structured.units import Channels, Units

#: What a graph node gives: channels of a tensor, of each tensor of a tuple, or None where none are followed.
Value = Channels | list["Channels | None"] | None


class Propagation:
    """Walks one traced graph whose nodes carry shapes (``ShapeProp``) and notes the channels of its layers.

    Args:
        gm: the graph.
        units: shared by all graphs of a model.
        node_of: for a called module, the :class:`Node` of a layer that may lose channels; None where there is none or it may
            not, then with the reason.

    Attributes:
        out_ids, in_ids: for each layer, the unit of each of its channels, or absent where not followed.
    """

    def __init__(
        self, gm: fx.GraphModule, units: Units, node_of: Callable[[str], tuple[Node | None, str]], noun: str = "model"
    ) -> None:
        self.gm, self.units, self.node_of, self.noun = gm, units, node_of, noun
        self.values: dict[fx.Node, Value] = {}
        self.out_ids: dict[Node, tuple[int, ...]] = {}
        self.in_ids: dict[Node, tuple[int, ...]] = {}
        for node in gm.graph.nodes:
            if "input" in node.kwargs and not node.args:  # torch's name of the first argument, in functions and layers
                node.args = (node.kwargs["input"],)
                node.kwargs = {k: v for k, v in node.kwargs.items() if k != "input"}
            try:
                self.values[node] = self._visit(node)
            except (AssertionError, AttributeError, IndexError, TypeError, ValueError):
                self.values[node] = self._unknown(node)  # arguments of a form that no rule expects

    def _visit(self, node: fx.Node) -> Value:
        if node.op in ("placeholder", "get_attr"):
            return None
        if node.op == "output":
            return self._stop(node, f"is the {self.noun}'s output")
        if node.op == "call_module":
            return self._module(node)
        return self._operation(node, node.target, node.args[1:])

    # Helpers

    def _channels(self, x: Any) -> Channels | None:
        value = self.values.get(x) if isinstance(x, fx.Node) else None
        return value if isinstance(value, Channels) else None

    def _stop(self, node: fx.Node, reason: str) -> Value:
        """Nothing is known of ``node``: whatever channels it reads stay."""
        for arg in node.all_input_nodes:
            value = self.values[arg]
            for channels in value if isinstance(value, list) else [value]:
                if channels is not None:
                    self.units.fix(channels.ids, reason)
        return None

    def _unknown(self, node: fx.Node) -> Value:
        name = str(node.target) if node.op == "call_module" else getattr(node.target, "__name__", node.target)
        return self._stop(node, f"is read by {name!r}, which channels are not followed through")

    # Layers

    def _module(self, node: fx.Node) -> Value:
        module = self.gm.get_submodule(str(node.target))
        layer, reason = self.node_of(str(node.target))
        if layer is None and not reason and ops.is_channelwise(module):
            return self._channelwise(node)
        if layer is None and not reason and type(module) is nn.Flatten:
            return self._flatten(node, module.start_dim, module.end_dim)
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if layer is None or not isinstance(source, fx.Node):
            return self._stop(node, reason) if reason else self._unknown(node)
        return self._layer(node, layer, source)

    def _layer(self, node: fx.Node, layer: Node, source: fx.Node) -> Value:
        shape = shape_of(source)
        if shape is None:
            return self._unknown(node)
        channels, dim = self._channels(source), ops.channel_dim(layer.module, len(shape))
        if dim is None or (channels is not None and channels.dim != dim):
            return self._unknown(node)
        if isinstance(layer, WeightNode):
            return self._weight(layer, channels, dim)
        if channels is None:
            return None
        self._same(self.out_ids, layer, channels.ids)
        if isinstance(layer, GroupNormNode):
            assert isinstance(layer.module, nn.GroupNorm)
            size = len(channels.ids) // layer.module.num_groups
            for start in range(0, len(channels.ids), size):
                self.units.join_all(channels.ids[start : start + size])
        return channels

    def _same(self, known: dict[Node, tuple[int, ...]], layer: Node, ids: tuple[int, ...]) -> None:
        """A layer that is called again loses the same channels in each call."""
        if layer in known:
            self.units.join(known[layer], ids)
        known.setdefault(layer, ids)

    def _weight(self, layer: WeightNode, channels: Channels | None, dim: int) -> Channels:
        called_before = layer in self.out_ids
        if not called_before:
            self.out_ids[layer] = self.units.new(layer.size("out"))
        out, groups = self.out_ids[layer], layer.groups
        unfollowed = "reads channels that are not followed"
        ids = self.units.new(layer.size("in"), unfollowed) if channels is None else channels.ids
        self._same(self.in_ids, layer, ids)
        if groups > 1 and not called_before:
            self._grouped(layer, ids, out)
        return Channels(dim, out)

    def _grouped(self, layer: WeightNode, ids: tuple[int, ...], out: tuple[int, ...]) -> None:
        """Whole groups go with all that they read and give, or the same positions of every group."""
        sides = [
            [x[j * len(x) // layer.groups :][: len(x) // layer.groups] for j in range(layer.groups)] for x in (ids, out)
        ]
        if layer.by_group:
            for read, given in zip(*sides, strict=True):
                self.units.join_all((*read, *given))
        else:
            for side in sides:
                for other in side[1:]:
                    self.units.join(side[0], other)

    # Operations

    def _operation(self, node: fx.Node, target: Any, rest: tuple[Any, ...]) -> Value:
        inputs = [n for n in node.all_input_nodes if self.values[n] is not None]
        if not inputs or ops.reads_shape(target, rest):
            return None
        handlers: tuple[tuple[frozenset[Any], Callable[[fx.Node], Value]], ...] = (
            (ops.CHANNELWISE, self._channelwise),
            (ops.COMBINING, self._combine),
            (ops.CONCATENATING, self._concatenate),
            (ops.FLATTENING, lambda n: self._flatten(n, *ops.arguments(n, ("start_dim", "end_dim"), (0, -1)))),
            (ops.RESHAPING, self._reshape),
            (ops.REDUCING, self._reduce),
            (ops.PERMUTING, self._permute),
            (ops.SQUEEZING, self._squeeze),
            (ops.CHUNKING, self._chunk),
            (ops.INDEXING, self._index),
        )
        for targets, handler in handlers:
            if node.args and target in targets:
                return handler(node)
        return self._unknown(node)

    def _channelwise(self, node: fx.Node) -> Value:
        """Each channel of the result comes from the same channel of the first input alone."""
        source = node.args[0] if node.args else None
        channels, shape = self._channels(source), shape_of(node)
        others = [n for n in node.all_input_nodes if n is not source and self.values[n] is not None]
        if channels is None or others or not isinstance(source, fx.Node) or shape is None:
            return self._unknown(node)
        before = shape_of(source)
        if before is None or shape[: channels.dim + 1] != before[: channels.dim + 1] or len(shape) != len(before):
            return self._unknown(node)
        return channels

    def _combine(self, node: fx.Node) -> Value:
        """Elementwise on two tensors, broadcast: channels at the same place go together."""
        shape = shape_of(node)
        found = [c for c in map(self._channels, node.all_input_nodes) if c is not None]
        if shape is None or not found:
            return self._unknown(node)
        # Broadcasting lines dimensions up from the last one.
        sides = [(n, len(shape_of(n) or ()), self._channels(n)) for n in node.all_input_nodes]
        places = {c.dim - d for _, d, c in sides if c is not None}
        if len(places) != 1:
            return self._unknown(node)
        place = places.pop()
        size = shape[place]
        wide: list[Channels] = []
        for n, d, c in sides:
            own = shape_of(n)
            if own is None and self.values[n] is None:
                continue  # a number
            if own is None or (c is None and d >= -place and own[place] == size > 1):
                return self._unknown(node)  # a tensor with channels that are not followed
            if c is not None and len(c.ids) == size:
                wide.append(c)
            elif c is not None:
                self.units.fix(c.ids, "is broadcast over other channels")
        for other in wide[1:]:
            self.units.join(wide[0].ids, other.ids)
        return Channels(place + len(shape), wide[0].ids)

    def _concatenate(self, node: fx.Node) -> Value:
        parts, dim = ops.arguments(node, ("tensors", "dim"), (None, 0), method=False)
        shape = shape_of(node)
        if shape is None or not isinstance(parts, (list, tuple)) or not isinstance(dim, int):
            return self._unknown(node)
        dim %= len(shape)
        known = [self._channels(p) for p in parts]
        dims = {c.dim for c in known if c is not None}
        if len(dims) != 1 or not all(isinstance(p, fx.Node) for p in parts):
            return self._unknown(node)
        if dims != {dim}:
            if None in known:
                return self._unknown(node)
            followed = [c for c in known if c is not None]
            for c in followed[1:]:
                self.units.join(followed[0].ids, c.ids)
            return followed[0]
        ids: list[int] = []
        for part, maybe in zip(parts, known, strict=True):
            own = shape_of(part)
            assert own is not None
            ids.extend(self.units.new(own[dim], "is concatenated unfollowed") if maybe is None else maybe.ids)
        return Channels(dim, tuple(ids))

    def _flatten(self, node: fx.Node, start: int, end: int) -> Value:
        channels, before = self._channels(node.args[0]), shape_of(node.args[0])
        if channels is None or before is None:
            return self._unknown(node)
        start, end = start % len(before), end % len(before)
        if channels.dim < start:
            return channels
        if channels.dim == start:
            return Channels(start, _repeated(channels.ids, math.prod(before[start + 1 : end + 1])))
        if channels.dim > end:
            return Channels(channels.dim - (end - start), channels.ids)
        return self._unknown(node)

    def _reshape(self, node: fx.Node) -> Value:
        """A view whose channel dimension is computed when it runs: it may swallow dimensions behind it."""
        channels, before, after = self._channels(node.args[0]), shape_of(node.args[0]), shape_of(node)
        if channels is None or before is None or after is None:
            return self._unknown(node)
        dim, n = channels.dim, len(channels.ids)
        sizes = ops.sizes(node)
        if (
            len(after) <= dim
            or before[:dim] != after[:dim]
            or after[dim] % n
            or math.prod(before[dim + 1 :]) % (after[dim] // n)
        ):
            return self._unknown(node)
        if sizes is not None and (len(sizes) <= dim or (isinstance(sizes[dim], int) and sizes[dim] != -1)):
            return self._stop(node, "is reshaped to a fixed size")
        return Channels(dim, _repeated(channels.ids, after[dim] // n))

    def _reduce(self, node: fx.Node) -> Value:
        """Mean, sum or extremum over other dimensions than the channels'."""
        channels, before, after = self._channels(node.args[0]), shape_of(node.args[0]), shape_of(node)
        dims, keep = ops.arguments(node, ("dim", "keepdim"), (None, False))
        if channels is None or before is None or after is None or dims is None:
            return self._unknown(node)
        dims = [dims] if isinstance(dims, int) else dims
        gone = {d % len(before) for d in dims if isinstance(d, int)}
        if channels.dim in gone or not all(isinstance(d, int) for d in dims):
            return self._unknown(node)
        return Channels(channels.dim - (0 if keep else sum(d < channels.dim for d in gone)), channels.ids)

    def _permute(self, node: fx.Node) -> Value:
        channels, before = self._channels(node.args[0]), shape_of(node.args[0])
        if channels is None or before is None or node.kwargs:
            return self._unknown(node)
        order = ops.dimension_order(node, len(before))
        return self._unknown(node) if order is None else Channels(order.index(channels.dim), channels.ids)

    def _squeeze(self, node: fx.Node) -> Value:
        """A dimension of one goes away, or comes."""
        channels, before, after = self._channels(node.args[0]), shape_of(node.args[0]), shape_of(node)
        (dim,) = ops.arguments(node, ("dim",), (None,))
        if channels is None or before is None or after is None or not isinstance(dim, int):
            return self._unknown(node)
        change = len(after) - len(before)
        dim %= max(len(before), len(after))
        if change < 0 and dim == channels.dim:
            return self._unknown(node)
        return Channels(channels.dim + (change if dim < channels.dim + max(0, change) else 0), channels.ids)

    def _chunk(self, node: fx.Node) -> Value:
        """Equal parts stay equal: the same channel of each part goes."""
        count, dim = ops.arguments(node, ("chunks", "dim"), (None, 0))
        channels, before = self._channels(node.args[0]), shape_of(node.args[0])
        if channels is None or before is None or not isinstance(count, int) or not isinstance(dim, int):
            return self._unknown(node)
        n = len(channels.ids)
        if dim % len(before) != channels.dim:
            return [channels] * count
        if n % count:
            return self._unknown(node)
        parts = [channels.ids[i : i + n // count] for i in range(0, n, n // count)]
        for part in parts[1:]:
            self.units.join(parts[0], part)
        return [Channels(channels.dim, part) for part in parts]

    def _index(self, node: fx.Node) -> Value:
        source, index = node.args[:2]
        value = self.values[source] if isinstance(source, fx.Node) else None
        if isinstance(value, list) and isinstance(index, int) and -len(value) <= index < len(value):
            return value[index]
        return self._unknown(node)


def _repeated(ids: tuple[int, ...], times: int) -> tuple[int, ...]:
    return tuple(i for i in ids for _ in range(times))


def shape_of(node: Any) -> tuple[int, ...] | None:
    """The shape that ShapeProp saw; None for what is no tensor."""
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    if isinstance(meta, TensorMetadata):
        return tuple(int(n) for n in meta.shape)
    return None
