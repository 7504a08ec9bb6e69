"""cuda_graph without a device: torch.cuda's graphs, streams and events are played by a fake that records operators on the CPU
and replays them on the tensors that they were recorded with."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cnncomp
from cnncomp import cuda_graph
from cnncomp.errors import ArgumentError

module = importlib.import_module("cnncomp.cuda_graph")  # a function of the package has its name


class Graph(TorchDispatchMode):
    """What a device would be told, and what it does again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "aten::_local_scalar_dense":
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Event:
    def record(self, stream: Any) -> None:
        stream.log.append("record")


class Stream:
    log: list[str] = []  # of all streams

    def wait_stream(self, other: Stream) -> None:
        self.log.append("wait for a stream")

    def wait_event(self, event: Event) -> None:
        self.log.append("wait for an event")


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The fake device, where CPU tensors count as on a GPU; the graphs that were captured on it."""
    made: list[Graph] = []
    capturing = threading.local()

    @contextmanager
    def capture(graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        capturing.now = True
        try:
            with graph:
                yield
            made.append(graph)
        finally:
            capturing.now = False

    fake = SimpleNamespace(
        Stream=Stream, Event=Event, CUDAGraph=Graph, graph=capture, current_stream=Stream, stream=lambda s: nullcontext(),
        device=lambda d: nullcontext(), is_initialized=lambda: True,
        is_current_stream_capturing=lambda: getattr(capturing, "now", False),
    )  # fmt: skip
    monkeypatch.setattr(module, "cuda", fake)
    monkeypatch.setattr(module, "_on_gpu", lambda t: t.device.type == "cpu")
    return made


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.calls = nn.Conv2d(2, 3, 3), nn.Linear(3, 4), 0

    def forward(self, x: Tensor, scale: float = 1.0, add: Tensor | None = None) -> dict[str, Any]:
        self.calls += 1
        y = self.conv(x).relu().mean((2, 3))
        return {"logits": self.fc(y if add is None else y + add) * scale, "features": y, "n": len(x)}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


X = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def same(got: dict[str, Any], expected: dict[str, Any]) -> bool:
    return got["n"] == expected["n"] and all(torch.equal(got[k], expected[k]) for k in ("logits", "features"))


def test_calls_replay_on_new_inputs_and_outputs_are_the_callers(net: Net, graphs: list[Graph]) -> None:
    fast = cuda_graph(net, X)
    assert fast.num_graphs == len(graphs) == 1 and net.calls == module.WARM_UP + 1
    first, second = fast(X), fast(X + 1)
    assert net.calls == module.WARM_UP + 1 and graphs[0].replays == 3
    assert same(first, net(X)) and same(second, net(X + 1))
    with torch.inference_mode():
        third = fast(X + 2)
        assert same(third, net(X + 2))
    assert same(first, net(X)) and not third["logits"].is_inference()


def test_a_graph_for_each_kind_of_arguments_up_to_a_number(net: Net, graphs: list[Graph]) -> None:
    fast = cuda_graph(net, max_graphs=4)
    last = X.contiguous(memory_format=torch.channels_last)
    kinds: list[Callable[[nn.Module], Any]] = [
        lambda f: f(X), lambda f: f(X[:1]), lambda f: f(last, 2.0), lambda f: f(X, add=torch.ones(2, 3)),
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert all(same(call(fast), call(net)) for call in kinds)
    assert fast.num_graphs == len(graphs) == 4
    with pytest.warns(UserWarning, match="max_graphs=4") as found:
        assert same(fast(X, 3.0), net(X, 3.0)) and same(fast(X, 5.0), net(X, 5.0))
    assert len(found) == 1 and len(graphs) == 4 and found[0].filename == __file__


def test_what_has_no_graph_runs_with_one_warning(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, x = cuda_graph(net), X.clone().requires_grad_()
    with pytest.warns(UserWarning, match="a gradient is wanted") as found:
        for _ in range(2):
            fast(x)["logits"].sum().backward()
    assert len(found) == 1 and x.grad is not None and fast.num_graphs == 0
    with pytest.warns(UserWarning, match="an argument of type Tensors"):
        assert cuda_graph(TakesAnything())(X, Tensors()) is X
    monkeypatch.setattr(module, "_on_gpu", lambda t: False)
    with pytest.warns(UserWarning, match="inputs on cpu, not on one GPU"):
        assert same(cuda_graph(net, X)(X), net(X))


class Tensors:
    """Of a user's."""


class TakesAnything(nn.Module):
    def forward(self, x: Tensor, other: object) -> Tensor:
        return x


class Waits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.sum())


def test_a_network_that_waits_for_the_device_is_tried_once(graphs: list[Graph]) -> None:
    net = Waits()
    with pytest.warns(UserWarning, match="can't be captured: operation not permitted"):
        fast = cuda_graph(net, X)
    assert torch.equal(fast(X), net(X)) and not graphs and fast.num_graphs == 0


class WritesToItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1) * 2


def test_failed_captures_count(graphs: list[Graph]) -> None:
    fast = cuda_graph(Waits(), max_graphs=2)
    with pytest.warns(UserWarning, match="can't be captured") as found:
        for n in range(1, 5):
            assert torch.equal(fast(X[:, :, :n]), Waits()(X[:, :, :n]))
    assert len(found) == 1 and len(fast._graphs) == 2


def test_inputs_stay_the_callers() -> None:
    fast, x = cuda_graph(WritesToItsInput()), X.clone()
    for _ in range(2):
        assert torch.equal(fast(x), (X + 1) * 2) and torch.equal(x, X)


def test_weights_that_change_in_place_count_and_those_that_move_are_captured_again(
    net: Net, graphs: list[Graph]
) -> None:
    fast = cuda_graph(net, X)
    with torch.no_grad():
        net.fc.weight.mul_(2)
    assert same(fast(X), net(X)) and len(graphs) == 1
    net.fc.weight = nn.Parameter(net.fc.weight + 1, requires_grad=False)
    assert same(fast(X), net(X)) and len(graphs) == 2
    net.fc.weight.data = net.fc.weight + 1
    assert same(fast(X), net(X)) and len(graphs) == 3
    fast.double().float()
    assert fast.num_graphs == 0 and same(fast(X), net(X)) and len(graphs) == 4


def test_state_dict_copies_and_files(net: Net, tmp_path: Path) -> None:
    fast = cuda_graph(net, X)
    assert list(fast.state_dict()) == list(net.state_dict())
    assert fast.load_state_dict(net.state_dict()).missing_keys == []
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other.num_graphs == 0 and fast.num_graphs == 1 and other.module is not net
        assert same(other(X), net(X)) and other.num_graphs == 1


def test_a_converted_network(tmp_path: Path) -> None:
    net = cnncomp.quantize(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), [X], progress=False)
    converted = cnncomp.convert(net.eval(), X, measure=False)
    fast = cuda_graph(converted, X)
    assert torch.equal(fast(X + 1), converted(X + 1)) and fast.num_graphs == 1
    converted.network.get_submodule("0").load_state_dict(converted.network.get_submodule("0").state_dict())
    assert torch.equal(fast(X), converted(X))  # whose constants are new
    cnncomp.save(fast.module, tmp_path / "net.cnncomp")


def test_the_check_on_a_gpu(graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import gpu_exact  # skips where there is no CUDA module

    assert gpu_exact.check_graph(torch.device("cpu")) == 0 and len(graphs) == 1
    monkeypatch.setattr(Graph, "replay", lambda graph: None)  # all outputs are those of the captured call
    assert gpu_exact.check_graph(torch.device("cpu")) > 100
    monkeypatch.setattr(module, "_on_gpu", lambda t: False)
    with pytest.warns(UserWarning, match="without a graph"):
        assert gpu_exact.check_graph(torch.device("cpu")) == 1


def test_threads_take_turns_on_a_graph(net: Net) -> None:
    fast = cuda_graph(net, X)
    inputs = [X + i for i in range(8)]
    expected, wrong = [net(x) for x in inputs], []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(20) if not same(fast(inputs[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and fast.num_graphs == 1


def test_a_call_waits_for_the_last_ones_end(net: Net) -> None:
    """They may be on different streams, and share the graph's memory."""
    fast = cuda_graph(net, X)
    Stream.log.clear()
    fast(X)
    assert Stream.log == ["wait for an event", "record"]


def test_graphs_within_each_other(net: Net) -> None:
    """The inner one runs as it is while the outer is captured; in threads, neither waits for the other for ever."""
    inner = cuda_graph(net)
    outer = cuda_graph(nn.Sequential(inner))
    calls = [threading.Thread(target=f, args=(X[:n],), daemon=True) for n in (1, 2) for f in (inner, outer)]
    for thread in calls:
        thread.start()
    for thread in calls:
        thread.join(20)
    assert not any(thread.is_alive() for thread in calls)
    assert same(outer(X), net(X)) and outer.num_graphs == inner.num_graphs == 2


@pytest.mark.parametrize(
    ("args", "match"),
    [((lambda x: x,), "model"), ((Waits(), "x"), "example_inputs"), ((Waits(), None, 0), "max_graphs")],
)
def test_refused(args: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        cuda_graph(*args[:2], **({"max_graphs": args[2]} if len(args) > 2 else {}))
