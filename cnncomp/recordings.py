"""Which calls of a network run from a recording: those like one that was seen before, where nobody looks on.

The first call with inputs of a kind runs through torch, the second is recorded (:mod:`cnncomp.executor`), later ones run it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from cnncomp.executor import NotRecordable, Recording
from cnncomp.pieces import Pieces, recorded

#: Recordings that a model keeps, one for each kind of input.
MAX_RECORDINGS = 8

Key = tuple[Any, ...]


def _watched(network: Recording | Pieces | nn.Module) -> bool:
    """Whether hooks or gradients want to see the layers run one by one."""
    modules, parameters = (
        (network.modules, network.parameters)
        if isinstance(network, (Recording, Pieces))
        else (network.modules(), network.parameters())
    )
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    return hooked or (torch.is_grad_enabled() and any(p.requires_grad for p in parameters))


class Recordings:
    """The recordings of a model. Copies start empty."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_key: dict[Key, Recording | Pieces | None | Literal[False]] = {}  # None: seen once; False: can't be

    def __deepcopy__(self, memo: dict[int, Any]) -> Recordings:
        return Recordings()

    def __reduce__(self) -> tuple[type[Recordings], tuple[()]]:
        return Recordings, ()

    def __len__(self) -> int:
        return sum(isinstance(r, (Recording, Pieces)) for r in self._by_key.values())

    def __call__(self, network: nn.Module, args: tuple[Any, ...]) -> Any:
        """``network(*args)``, from a recording where there is one for such inputs."""
        key = _key(network, args)
        if key is None:
            return network(*args)
        with self._lock:
            new = key not in self._by_key
            recording = self._by_key.setdefault(key, None)  # recorded when it comes again
            while len(self._by_key) > MAX_RECORDINGS:
                del self._by_key[next(iter(self._by_key))]
        if new or recording is False or _watched(recording or network):
            return network(*args)
        try:
            if recording is None or not recording.valid(network):
                recording = self._record(key, network, args)
            with torch.no_grad():
                return recording.run(args)
        except NotRecordable:
            with self._lock:
                self._by_key[key] = False
        return network(*args)

    def _record(self, key: Key, network: nn.Module, args: tuple[Any, ...]) -> Recording | Pieces:
        assert isinstance(network, fx.GraphModule)
        with self._lock, torch.no_grad():
            self._by_key[key] = recording = recorded(network, args)
        return recording


def _key(network: nn.Module, args: tuple[Any, ...]) -> Key | None:
    """What a recording depends on; None where the call has to go through torch: on a GPU, while a compiler or a profiler
    of operators looks on, or where a gradient is wanted."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(network, fx.GraphModule):
        return None
    if _get_current_dispatch_mode() is not None or torch.is_autocast_enabled("cpu"):
        return None
    key: list[Any] = [torch.get_num_threads()]
    for x in args:
        if type(x) is Tensor:
            if x.device.type != "cpu" or not x.numel() or (x.requires_grad and torch.is_grad_enabled()):
                return None
            key.append((x.dtype, tuple(x.shape), x.stride()))
        elif x is None or type(x) in (bool, int, float, str):
            key.append((type(x), x))
        else:
            return None
    return tuple(key)


def kernels_of(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object] | None:
    """The kernels that ``layer`` runs on ``inputs``, without Python around them; None if there is more to it."""
    graph = fx.Graph()
    graph.output(graph.call_module("layer", tuple(graph.placeholder(f"x{i}") for i in range(len(inputs)))))
    root = nn.Module()
    root.layer = layer
    key = _key(gm := fx.GraphModule(root, graph), inputs)
    if key is None:
        return None
    try:
        with torch.no_grad():
            recording = Recording(gm, inputs)
            if any(item.node is not None and item.node.op != "placeholder" for item in recording.items):
                return None
            return lambda: recording.run(inputs)
    except NotRecordable:
        return None
