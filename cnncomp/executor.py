"""Runs a converted graph without Python between its layers.

The second call with inputs of a kind is recorded: every kernel that the layers called goes into a
:class:`cnncomp._cpu.Program`, and the tensors between them get places in one arena, by the time that each is needed. Later
calls only run the program. What is not ours (torch's layers, functions, layouts that had to be converted) is called in
between as before. Same kernels, same arguments: the same bits.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cnncomp._arena import ALIGN, Buffer, Pointer, merged, place, widen
from cnncomp._cpu import Program
from cnncomp._memory import forget, trim_heap
from cnncomp.graph import operations as op
from cnncomp.nn import KERNEL_MODULES, Activation, ChannelAffine, ConvertedLayer, ScaleChannels
from cnncomp.nn.base import JOINED_KERNEL

#: Idle arenas that a recording keeps, one for each caller at a time.
MAX_ARENAS = 4

#: Operators that compute nothing.
_VIEWS = frozenset(
    ("view", "_unsafe_view", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "permute", "slice")
)

#: What gives a view of its input, or the input itself, where that has the layout for it.
_LOOKS = op.FLATTENING | op.RESHAPING | {"contiguous", nn.Dropout, nn.Flatten, nn.Identity}


class NotRecordable(Exception):
    """A node whose work is not all in kernels of ours, or a network that can't be recorded."""


@dataclass
class _View:
    """A tensor in a buffer."""

    buffer: Buffer
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int  # bytes from the buffer's begin

    @classmethod
    def of(cls, t: Tensor, buffer: Buffer) -> _View:
        return cls(buffer, t.dtype, tuple(t.shape), t.stride(), t.data_ptr() - buffer.begin)

    def on(self, memory: Tensor, offset: int) -> Tensor:
        """The tensor at ``offset`` bytes of ``memory`` (uint8)."""
        begin = offset + self.start
        extent = sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True)) + 1
        # Cut to whole elements: the memory may end with those of a smaller dtype.
        values = memory[begin : begin + extent * self.dtype.itemsize].view(self.dtype)
        return values.as_strided(self.size, self.stride)

    def fits(self, t: object) -> bool:
        """Whether a tensor is of the same kind as the recorded one."""
        return isinstance(t, Tensor) and (t.dtype, tuple(t.shape), t.stride()) == (self.dtype, self.size, self.stride)


@dataclass
class _Item:
    """Kernels [first, last) of the program, or a node that Python calls. ``outside``: (number of the leaf in its result, how
    it looked) for each tensor that brings memory of its own; ``drop``: nodes whose value nobody needs afterwards."""

    first: int = 0
    last: int = 0
    node: fx.Node | None = None
    outside: list[tuple[int, _View]] = field(default_factory=list)
    drop: list[fx.Node] = field(default_factory=list)


def _alias(out: Any, inputs: Any) -> bool:
    """Whether an operator computed nothing: its results lie in the memory of its inputs."""
    known = {t.untyped_storage().data_ptr() for t in tree_leaves(inputs) if isinstance(t, Tensor)}
    return all(isinstance(t, Tensor) and t.untyped_storage().data_ptr() in known for t in tree_leaves(out))


class _Watch(TorchDispatchMode):
    """Checks, operator by operator, that a layer's work is in kernels of ours, on memory that is known."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is recorded under the compiler; to keep it away, torch would import all of it: 150 MB and a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.recorder.program)
        out = func(*args, **(kwargs or {}))
        if func.namespace == "cnncomp":
            self.recorder.look(args)
            self.recorder.found(out, ours=True)
        elif func._schema.is_mutable or not _alias(out, (args, kwargs)):
            raise NotRecordable(str(func))
        self.recorder.check(before)
        return out


class _Recorder(fx.Interpreter):
    """Runs a graph, notes the kernels and the memory that each value lies in."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.program = Program()
        self.buffers: list[Buffer] = []
        self.items: list[_Item] = []
        self.keep: list[object] = []  # all tensors stay until the end, so that an address means one of them
        self.values: dict[fx.Node, Any] = {}
        self.held: dict[fx.Node, list[Buffer]] = {}  # where the values are that are still to be read ...
        self.awaited: dict[fx.Node, int] = {}  # ... and by how many nodes
        self.position = 0
        constants = [*gm.buffers(), *gm.parameters()]
        self.constants = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in constants if t.nbytes]
        self.pointers: list[Pointer] = []
        self.last_node: fx.Node | None = None  # the one of the last step, if it had no other

    def run_node(self, n: fx.Node) -> Any:
        self.position += 1
        value = self._kernels(n) if n.op == "call_module" else None
        if value is None:
            value = super().run_node(n)
            if not self._is_view(n, value):
                self._python(n, value)
        self.values[n] = value
        self.keep.append(value)
        self._hold(n, value)
        self._read(n)
        if n.op != "output":
            self._release(n.all_input_nodes)
        return value

    def _hold(self, n: fx.Node, value: Any) -> None:
        """Note which buffers of ours the node's value lies in."""
        self.held[n] = [buffer for buffer in self.buffers_of(value) if buffer.ours]
        self.awaited[n] = len(n.users)
        for buffer in self.held[n]:
            buffer.holders += 1

    def _release(self, read: Iterable[fx.Node]) -> None:
        """Give back the contents of buffers that no node will read again; their addresses are still needed."""
        for n in read:
            self.awaited[n] -= 1
            if self.awaited[n] == 0:
                for buffer in self.held.pop(n):
                    buffer.holders -= 1
                    if buffer.holders == 0:
                        forget(buffer.begin, buffer.end)

    def _kernels(self, n: fx.Node) -> Tensor | None:
        """The node's value if it is all kernels of ours, which are then recorded."""
        layer = self.fetch_attr(str(n.target))
        ours = isinstance(layer, ConvertedLayer) and layer.own_kernels
        if not ours and not isinstance(layer, KERNEL_MODULES):
            return None
        begin, pointers, kept = len(self.program), len(self.pointers), len(self.buffers)
        self.program.record(True)
        try:
            with _Watch(self):
                value = super().run_node(n)
        except NotRecordable:
            self.program.truncate(begin)
            del self.pointers[pointers:], self.buffers[kept:]
            return None
        finally:
            self.program.record(False)
        if ours and layer.writes_over_residual and len(n.all_input_nodes) == 2:
            self._lay_over(value, n.all_input_nodes[1], -2)
        elif isinstance(layer, (Activation, ChannelAffine, ScaleChannels)):
            self._lay_over(value, n.all_input_nodes[0], 0)
        if self.items and self.items[-1].node is None and self.items[-1].last == begin:
            self.items[-1].last = len(self.program)
            if len(self.program) == begin + 1:
                self._join(n)
        else:
            self.items.append(_Item(begin, len(self.program)))
        self.last_node = n if len(self.program) == begin + 1 else None
        return value

    def _join(self, n: fx.Node) -> None:
        """Let the layer before, if all that it gives is this one's residual, be computed along with it."""
        before, step = self.last_node, len(self.program) - 1
        if before is None or list(before.users) != [n]:
            return
        if any(getattr(self.fetch_attr(str(m.target)), "kernel", None) != JOINED_KERNEL for m in (before, n)):
            return
        x, *_, residual, _ = self.program.addresses(step)
        if self.program.addresses(step - 1)[-1] != residual or self.find(x) is self.find(residual):
            return
        self.program.leave(step - 1)
        self._read(before)

    def _read(self, n: fx.Node) -> None:
        """Note that the inputs of a node are read at this position."""
        for used in n.all_input_nodes:
            for buffer in self.buffers_of(self.values[used]):
                buffer.dies = self.position

    def _lay_over(self, value: Tensor, over: fx.Node, operand: int) -> None:
        """Note that the output of the last step may lie where one of its operands is, all of a node's value, if the others
        lie elsewhere: what is read is in the caches already."""
        out, given = (self.find(t.data_ptr()) for t in (value, self.values[over]))
        if out is None or given is None or value.nbytes != given.end - given.begin:
            return
        addresses = self.program.addresses(len(self.program) - 1)
        seen, others = addresses[operand], [a for i, a in enumerate(addresses[:-1]) if i != operand % len(addresses)]
        if any(a and self.find(a) is given for a in others):
            return
        if (seen, addresses[-1]) == (
            given.begin,
            out.begin,
        ) and value.data_ptr() == out.begin:  # as they are: no copies
            out.over = given

    def _is_view(self, n: fx.Node, value: Any) -> bool:
        """Whether ``n`` only looks in another way at its input, a tensor of ours: then it does so every time."""
        what = type(self.fetch_attr(str(n.target))) if n.op == "call_module" else n.target
        if what not in _LOOKS or len(n.all_input_nodes) != 1 or not value.numel():
            return False
        x = self.values[n.all_input_nodes[0]]
        buffer = self.find(value.data_ptr())
        return buffer is not None and buffer.ours and _alias(value, x)

    def _python(self, n: fx.Node, value: Any) -> None:
        item = _Item(node=n)
        for i, t in enumerate(tree_leaves(value)):
            if isinstance(t, Tensor) and t.layout != torch.strided:
                raise NotRecordable(f"a tensor of layout {t.layout}")
            if isinstance(t, Tensor) and t.numel() and n.op != "get_attr" and self.find(t.data_ptr()) is None:
                item.outside.append((i, _View.of(t, self.found(t, ours=False))))
        if n.op != "output":
            self.items.append(item)

    def found(self, t: Tensor, ours: bool) -> Buffer:
        """Note the memory of a new tensor. What comes from outside is known by the tensor's own extent, not its storage's."""
        storage = t.untyped_storage()
        extent = sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True)) + 1
        begin = storage.data_ptr() if ours else t.data_ptr()
        end = begin + (storage.nbytes() if ours else extent * t.element_size())
        image = tuple(t.shape) if ours and t.dtype == torch.float32 and t.dim() == 4 and t.is_contiguous() else None
        buffer = Buffer(begin, end, self.position, self.position, ours, image)
        self.keep.append(t)
        self.buffers.append(buffer)
        return buffer

    def look(self, inputs: Any) -> None:
        """Note which images an operator takes for something else: their channels are not its channels."""
        for t in tree_leaves(inputs):
            buffer = self.find(t.data_ptr()) if isinstance(t, Tensor) else None
            if buffer is not None and (tuple(t.shape) != buffer.image or not t.is_contiguous()):
                buffer.image = None

    def buffers_of(self, value: Any) -> list[Buffer]:
        """Where the tensors in a value lie, as far as it is known."""
        found = (self.find(t.data_ptr()) for t in tree_leaves(value) if isinstance(t, Tensor))
        return [buffer for buffer in found if buffer is not None]

    def find(self, address: int) -> Buffer | None:
        return next((b for b in reversed(self.buffers) if b.begin <= address < b.end), None)

    def check(self, first: int) -> None:
        """See where the operands of the steps from ``first`` on lie."""
        for step in range(first, len(self.program)):
            for which, address in enumerate(self.program.addresses(step)):
                if address == 0 or any(begin <= address < end for begin, end in self.constants):
                    continue
                buffer = self.find(address)
                if buffer is None:
                    raise NotRecordable("an operand that was made inside an operator")
                self.pointers.append(Pointer(step, which, buffer, address - buffer.begin))


def _filled(value: Any, env: dict[fx.Node, Any]) -> Any:
    """A graph's result with values for nodes, in plain lists and dictionaries as its code would make them."""
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, dict):
        return {k: _filled(v, env) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_filled(v, env) for v in value]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


class Recording:
    """A network recorded for one kind of inputs. Can be run by several threads at once, each in an arena of its own."""

    def __init__(self, gm: fx.GraphModule, args: tuple[Any, ...]) -> None:
        """Record a call.

        Raises:
            NotRecordable: the network calls modules that may keep what they see, or returns part of a buffer.
        """
        self.gm = gm
        self.modules = [gm.get_submodule(str(n.target)) for n in gm.graph.nodes if n.op == "call_module"]
        if not all(type(m).__module__.startswith(("torch.nn", "cnncomp.nn")) for m in self.modules):
            raise NotRecordable("modules of the user's")
        self.parameters = list(gm.parameters())
        if any(n.op == "placeholder" and str(n.target).startswith("*") for n in gm.graph.nodes):
            raise NotRecordable("any number of arguments")
        recorder = _Recorder(gm)
        recorder.run(*args)
        if not len(recorder.program):
            raise NotRecordable("no kernels of ours")
        self.program, self.items = recorder.program, recorder.items
        self._check_inputs(recorder)
        self._lay_out(recorder)
        self._drop_values(recorder)
        #: Each node's value, its tensors as on the meta device.
        self.values = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), recorder.values)
        trim_heap()  # all intermediate values were kept at once
        #: What the modules hold, to see whether it is still that.
        self.owners: list[dict[str, Any]] = [
            d for m in gm.modules() for d in (m._modules, m._buffers, m._parameters) if d
        ]
        self.owned = [value for owner in self.owners for value in owner.values()]
        self.arenas: list[_Arena] = []

    @staticmethod
    def _check_inputs(recorder: _Recorder) -> None:
        inputs = [v.buffer for i in recorder.items if i.node and i.node.op == "placeholder" for _, v in i.outside]
        wanted = [n for n in recorder.values if n.op == "placeholder" and isinstance(recorder.values[n], Tensor)]
        if len(inputs) != len(wanted):
            raise NotRecordable("inputs that share memory")

    def _lay_out(self, recorder: _Recorder) -> None:
        """Slots: 0 is the arena, then one for each result and for each tensor from outside."""
        output = next(n for n in self.gm.graph.nodes if n.op == "output")
        self.results: list[_View] = []
        for t in tree_leaves(recorder.values[output]):
            buffer = recorder.find(t.data_ptr()) if isinstance(t, Tensor) and t.numel() else None
            if buffer is None or not buffer.ours or any(v.buffer is buffer for v in self.results):
                continue
            if t.nbytes != buffer.end - buffer.begin:
                raise NotRecordable("a result that is part of something larger")
            self.results.append(_View.of(t, buffer))
        returned = [v.buffer for v in self.results]
        inside = [b for b in recorder.buffers if b.ours and not any(b is r for r in returned)]
        widen(self.program, recorder.pointers, [*returned, *self._seen_by_python(recorder)])
        self.arena_bytes = place(merged(inside))
        for b in inside:
            b.slot, b.offset = 0, b.root().offset
        self.num_slots = 1
        for b in [*returned, *(b for b in recorder.buffers if not b.ours)]:
            b.slot, self.num_slots = self.num_slots, self.num_slots + 1
        for p in recorder.pointers:
            self.program.bind(p.step, p.which, p.buffer.slot, p.buffer.offset + p.offset)

    def _seen_by_python(self, recorder: _Recorder) -> list[Buffer]:
        """Buffers with values that functions and modules between the kernels are given."""
        called = [i.node for i in self.items if i.node is not None]
        return recorder.buffers_of([recorder.values[n] for node in called for n in node.all_input_nodes])

    def _drop_values(self, recorder: _Recorder) -> None:
        """Which values of ours Python sees, and when each value is needed last."""
        called = [i.node for i in self.items if i.node is not None]
        self.output = next(n for n in self.gm.graph.nodes if n.op == "output")
        seen = {n for user in [*called, self.output] for n in user.all_input_nodes}
        self.views = {
            n: _View.of(t, buffer)
            for n in seen
            if n not in called and isinstance(t := recorder.values[n], Tensor)
            and (buffer := recorder.find(t.data_ptr())) is not None
        }  # fmt: skip
        kept = {*self.output.all_input_nodes, *self.views}
        held = {n: {id(b) for b in recorder.buffers_of(recorder.values.get(n))} for n in called}
        for item in reversed(self.items):
            read = self._read_by(item, recorder, held)
            item.drop = [n for n in dict.fromkeys(read) if n not in kept]
            kept.update(item.drop)

    @staticmethod
    def _read_by(item: _Item, recorder: _Recorder, held: dict[fx.Node, set[int]]) -> list[fx.Node]:
        """Nodes whose values an item reads: its inputs; of kernels, all nodes that keep the memory of an operand alive."""
        if item.node is not None:
            return item.node.all_input_nodes
        buffers = {id(p.buffer) for p in recorder.pointers if item.first <= p.step < item.last and not p.buffer.ours}
        return [n for n, memory in held.items() if memory & buffers]

    def valid(self, gm: nn.Module) -> bool:
        """Whether the network is still the one that was recorded."""
        if gm is not self.gm or sum(map(len, self.owners)) != len(self.owned):
            return False
        held = itertools.chain.from_iterable(owner.values() for owner in self.owners)
        return all(map(operator.is_, held, self.owned))

    def run(self, args: tuple[Any, ...]) -> Any:
        """What the network returns for inputs like the recorded ones.

        Raises:
            NotRecordable: a function in it returned something of another shape than then.
        """
        try:
            arena = self.arenas.pop()
        except IndexError:
            arena = _Arena(self)
        try:
            return self._run(arena, args)
        finally:
            if len(self.arenas) < MAX_ARENAS:
                self.arenas.append(arena)

    def _run(self, arena: _Arena, args: tuple[Any, ...]) -> Any:
        slots = [arena.address] + [0] * (self.num_slots - 1)
        env: dict[fx.Node, Any] = dict(arena.views)
        for view in self.results:
            memory = torch.empty_strided(view.size, view.stride, dtype=view.dtype)
            slots[view.buffer.slot] = memory.data_ptr()
            for node in arena.results:
                if self.views[node].buffer is view.buffer:
                    env[node] = memory.as_strided(self.views[node].size, self.views[node].stride)
        given = iter(args)
        for item in self.items:
            node = item.node
            if node is None:
                self.program.run(item.first, item.last, slots)
            else:
                env[node] = value = self._call(node, env, given)
                leaves = tree_leaves(value) if item.outside else []
                for i, view in item.outside:
                    if i >= len(leaves) or not view.fits(leaves[i]):
                        raise NotRecordable("another shape than recorded")
                    slots[view.buffer.slot] = leaves[i].data_ptr()
            for n in item.drop:
                del env[n]
        return _filled(self.output.args[0], env)

    def _call(self, node: fx.Node, env: dict[fx.Node, Any], given: Iterator[Any]) -> Any:
        if node.op == "placeholder":
            return next(given, node.args[0] if node.args else None)
        args = map_arg(node.args, lambda n: env[n])
        kwargs = map_arg(node.kwargs, lambda n: env[n]) if node.kwargs else {}
        if node.op == "call_module":
            return self.gm.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        owner, _, name = str(node.target).rpartition(".")
        return getattr(self.gm.get_submodule(owner), name)


class _Arena:
    """Memory for one caller, and the tensors in it that Python sees."""

    def __init__(self, recording: Recording) -> None:
        memory = torch.empty(recording.arena_bytes + ALIGN, dtype=torch.uint8)
        self.address = memory.data_ptr()
        self.views = {n: v.on(memory, v.buffer.offset) for n, v in recording.views.items() if v.buffer.slot == 0}
        returned = [v.buffer for v in recording.results]
        self.results = [n for n, v in recording.views.items() if any(v.buffer is b for b in returned)]
        self.memory = memory
