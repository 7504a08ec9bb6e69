"""``cnncomp.cuda_graph``: a network's launches as one, so that small batches do not wait for Python and the driver.

torch's own CUDA graphs around a whole module. A graph replays kernels at the addresses that they were captured with: inputs are
copied to where they lay then, outputs are copied from there, and a network whose weights lie elsewhere now is captured again.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, cuda, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from cnncomp.convert import as_inputs
from cnncomp.errors import ArgumentError

#: Calls on another stream before a graph is captured: libraries choose their algorithms and allocate in the first ones.
WARM_UP = 3
#: One lock for all, so that networks within each other don't wait for one another; what is allocated meanwhile is a graph's.
_CAPTURING = threading.RLock()

Key = tuple[Any, ...]


class _NoGraph(Exception):
    """Why a call can't be captured."""


@dataclass
class _Captured:
    """A graph, the leaves of its inputs and its outputs in its own memory, and the weights that it reads.

    ``owners``: the parameters and buffers of each module, as a module holds them. ``done``: recorded behind each call, whose
    memory the next one may take only then, whatever stream it is on.
    """

    graph: cuda.CUDAGraph
    device: torch.device
    leaves: list[Any]
    outputs: Any
    owners: list[dict[str, Any]]
    weights: list[Tensor]
    done: cuda.Event = field(default_factory=lambda: cuda.Event())
    lock: threading.Lock = field(default_factory=threading.Lock)

    def valid(self) -> bool:
        """Whether the network's weights still lie where they did."""
        now = itertools.chain.from_iterable(owner.values() for owner in self.owners)
        return [t.data_ptr() for t in self.weights] == [t.data_ptr() for t in now if t is not None]

    def replay(self, leaves: list[Any]) -> Any:
        with self.lock, torch.inference_mode(False), torch.no_grad(), cuda.device(self.device):
            stream = cuda.current_stream()
            stream.wait_event(self.done)
            for own, given in zip(self.leaves, leaves, strict=True):
                if isinstance(own, Tensor):
                    own.copy_(given)
            self.graph.replay()
            outputs = tree_map_only(Tensor, torch.clone, self.outputs)
            self.done.record(stream)
        return outputs


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def _key(leaves: list[Any], spec: TreeSpec) -> Key:
    """What a graph is captured for: shapes, strides and dtypes of the tensors, all other arguments, and autocast.

    Raises:
        _NoGraph: tensors on no GPU or on several devices, arguments that can't be compared.
    """
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if not tensors or not all(map(_on_gpu, tensors)) or len({t.device for t in tensors}) > 1:
        raise _NoGraph(
            f"inputs on {', '.join(sorted({str(t.device) for t in tensors})) or 'no device'}, not on one GPU"
        )
    key: list[Any] = [str(spec), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")]
    for x in leaves:
        if isinstance(x, Tensor):
            key.append((x.device, x.dtype, x.shape, x.stride()))
        elif x is None or isinstance(x, (bool, int, float, str)):
            key.append((type(x), x))
        else:
            raise _NoGraph(f"an argument of type {type(x).__name__}")
    return tuple(key)


def _capture(network: nn.Module, leaves: list[Any], spec: TreeSpec) -> _Captured:
    """Run the network a few times on copies of its inputs, then capture it."""
    device = next(x.device for x in leaves if isinstance(x, Tensor))
    on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

    def copied() -> list[Any]:
        return [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]

    def run(leaves: list[Any]) -> Any:
        args, kwargs = tree_unflatten(leaves, spec)
        with torch.autocast("cuda", dtype, on, cache_enabled=False):  # what is cached would be the graph's
            return network(*args, **kwargs)

    with torch.inference_mode(False), torch.no_grad(), cuda.device(device):
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(WARM_UP):
                run(copied())  # the network may write to its inputs
            own = copied()
        cuda.current_stream().wait_stream(side)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=side, capture_error_mode="thread_local"):  # other threads go on with what they do
            outputs = run(own)
        owners = [owner for m in network.modules() for owner in (m._parameters, m._buffers)]
        held = itertools.chain.from_iterable(owner.values() for owner in owners)
        weights = [t.detach() for t in held if t is not None]  # so that their memory is not given to others
    return _Captured(graph, device, own, outputs, owners, weights)


class CudaGraphs(nn.Module):
    """What :func:`cuda_graph` returns. ``module`` is the network; the state dict is the network's own."""

    def __init__(self, module: nn.Module, max_graphs: int) -> None:
        super().__init__()
        self.module, self.max_graphs = module, max_graphs
        self.train(module.training)
        self._forget()

    def _forget(self) -> None:
        self._graphs: dict[Key, _Captured | None] = {}  # None: could not be captured
        self._lock, self._warned = threading.Lock(), False

    @property
    def num_graphs(self) -> int:
        """Graphs that are captured."""
        return sum(found is not None for found in self._graphs.values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network returns, in tensors of the caller's own."""
        if torch.compiler.is_compiling() or (cuda.is_initialized() and cuda.is_current_stream_capturing()):
            return self.module(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        try:
            captured = self._find(leaves, spec)
        except _NoGraph as reason:
            self._warn(str(reason))
            return self.module(*args, **kwargs)
        return captured.replay(leaves)

    def _find(self, leaves: list[Any], spec: TreeSpec) -> _Captured:
        if torch.is_grad_enabled() and any(
            t.requires_grad for t in [*self.module.parameters(), *(x for x in leaves if isinstance(x, Tensor))]
        ):
            raise _NoGraph("a gradient is wanted: call it in torch.inference_mode()")
        key = (*_key(leaves, spec), self.module.training)
        if (found := self._graphs.get(key)) is not None and found.valid():
            return found
        with _CAPTURING:
            if (found := self._graphs.get(key)) is not None and found.valid():
                return found  # another thread was faster
            if found is None and key in self._graphs:
                raise _NoGraph("captured before without success")
            if found is None and len(self._graphs) >= self.max_graphs:
                raise _NoGraph(f"max_graphs={self.max_graphs} kinds of inputs have come before")
            self._graphs[key] = None
            try:
                self._graphs[key] = found = _capture(self.module, leaves, spec)
            except RuntimeError as error:  # the network waits for the device, or calls what can't be captured
                raise _NoGraph(f"it can't be captured: {error}") from error
            return found

    def _warn(self, reason: str) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            warnings.warn(f"cuda_graph: runs without a graph: {reason}", UserWarning, stacklevel=5)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CudaGraphs:
        self._forget()
        super()._apply(fn, recurse)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files start without graphs."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_graphs", "_lock", "_warned")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()


def cuda_graph(model: nn.Module, example_inputs: Any = None, *, max_graphs: int = 8) -> CudaGraphs:
    """Run a network through CUDA graphs: one launch for all its layers, where a small batch would wait for each one's.

    The first call with inputs of new shapes, strides or dtypes captures a graph, for the first ``max_graphs`` of them; each
    holds its inputs, outputs and activations. All else runs as the network does by itself, with one warning: on a CPU, more
    shapes, a wanted gradient, a network that waits for the device. Threads may call it at once, on any streams.

    Args:
        model: any module whose work depends on its arguments' shapes alone, converted, compiled (``torch.compile`` without
            graphs of its own) or neither. Python in it runs when a graph is captured, and not again.
        example_inputs: captured at once: a tensor, a tuple of positional arguments, or a mapping of arguments by name.
        max_graphs: graphs that are kept.

    Returns:
        A module with the network as ``module`` and with the network's own state dict. :func:`cnncomp.save` takes ``module``.

    Raises:
        ArgumentError: no module, no tensor among the inputs, ``max_graphs`` below 1.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
    if max_graphs < 1:
        raise ArgumentError("max_graphs", max_graphs, "at least 1")
    graphed = CudaGraphs(model, max_graphs)
    if example_inputs is not None:
        with torch.inference_mode():
            graphed(*as_inputs(example_inputs, model))
    return graphed
