"""Recorded networks give the bits that the layers give one by one, whatever happens around them."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cnncomp
from cnncomp._arena import Buffer, place
from cnncomp._cpu import Program
from cnncomp.errors import InferenceOnlyError
from cnncomp.nn import DenseConv2d, SparseConv2d
from cnncomp.recordings import MAX_RECORDINGS, Recordings, kernels_of
from tests.helpers import mask_weights
from tests.saved_networks import NETWORKS, converted

Converted = cnncomp.ConvertedModel


def sparse(net: nn.Module, *inputs: Tensor) -> Converted:
    return cnncomp.convert(mask_weights(net, 0.8).eval(), inputs, measure=False, cache=False)


def recorded(model: Converted, *inputs: Tensor) -> Converted:
    """The model after two calls."""
    with torch.no_grad():
        model(*inputs)
        model(*inputs)
    return model


def conv(c: int = 3, k: int = 8) -> nn.Conv2d:
    return nn.Conv2d(c, k, 3, padding=1)


class Residuals(nn.Module):
    """A convolution with a residual that is read again, or not, and one whose residual is its own input."""

    def __init__(self, later: bool) -> None:
        super().__init__()
        self.later = later
        self.a, self.b, self.c, self.d = conv(), conv(8), conv(8), conv(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.c(self.b(x)) + x
        y = torch.sigmoid(self.d(y) + y)
        return y + x if self.later else y


@pytest.mark.parametrize("later", [False, True])
def test_outputs_over_residuals_that_nobody_reads_again(later: bool) -> None:
    model, x = (
        sparse(Residuals(later), X),
        torch.randn(2, 3, 40, 41),
    )  # larger than what is read before the first output
    recorded(model, x)
    for _ in range(3):
        x = torch.randn_like(x)
        assert torch.equal(model(x), model.network(x))
    (recording,) = (r for r in model._recordings._by_key.values() if r)
    images = recording.arena_bytes / (8 * 2 * 40 * 41 * 4)
    assert round(images) == (3 if later else 2)  # between b and c there are b's output, and x with c's or without


class TwoBranches(nn.Module):
    """A block of a residual network whose shortcut has a convolution of its own, read once more later or not."""

    def __init__(self, later: bool) -> None:
        super().__init__()
        self.later = later
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, 2, 1), nn.Conv2d(24, 64, 1)
        self.shortcut, self.pool, self.d = nn.Conv2d(16, 64, 1, 2), nn.MaxPool2d(3, 1, 1), nn.Conv2d(64, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.a(x)))
        y, z = self.c(torch.relu(self.b(x))), self.shortcut(x)
        out = self.d(torch.relu(y + z))
        return out * torch.sigmoid(z).mean() if self.later else out


@pytest.mark.parametrize(("later", "joined"), [(False, True), (True, False)])
def test_two_int8_convolutions_are_added_in_one_step(
    later: bool, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []

    class Watched(Program):
        def leave(self, step: int) -> None:
            left.append(step)
            super().leave(step)

    monkeypatch.setattr("cnncomp.executor.Program", Watched)
    torch.manual_seed(0)
    net = TwoBranches(later).eval()
    with torch.no_grad():
        for layer in (net.b, net.c, net.shortcut):
            k, c, *_ = layer.weight.shape
            layer.weight.mul_((torch.rand(k, c // 4, 1, 1) >= 0.8).repeat_interleave(4, 1))
    cnncomp.quantize(net, [torch.randn(4, 3, 22, 26)], progress=False)
    x = torch.randn(3, 3, 22, 26)
    model = recorded(cnncomp.convert(net, x, measure=False, cache=False), x)
    for _ in range(3):
        x = torch.randn_like(x)
        assert torch.equal(model(x), model.network(x))
    assert bool(left) == joined  # a batch may be recorded more than once


@pytest.mark.parametrize("name", ["conv2d_sparse", "dense.direct"])
def test_kernels_write_over_their_residuals(name: str) -> None:
    torch.manual_seed(0)
    for size in (7, 14, 28, 33, 56):
        float_layer = mask_weights(nn.Conv2d(70, 33, 3, padding=1), 0.9 if name == "conv2d_sparse" else 0.0)
        sparse_layer = SparseConv2d.from_float(float_layer)
        dense = (sparse_layer.geometry, float_layer.weight, float_layer.bias)
        layer = sparse_layer if name == "conv2d_sparse" else DenseConv2d(*dense, kernel=name)
        assert layer.kernel == name and layer.writes_over_residual
        x, residual = torch.randn(2, 70, size, size), torch.randn(2, 33, size, size)
        program = Program()
        program.record(True)
        try:
            expected = layer(x, residual)
        finally:
            program.record(False)
        places = program.addresses(0)
        assert places[-2:] == [residual.data_ptr(), expected.data_ptr()] and places[0] == x.data_ptr()
        for which in (len(places) - 2, len(places) - 1):
            program.bind(0, which, 0, 0)
        memory = residual.clone()
        program.run(0, 1, [memory.data_ptr()])
        assert torch.equal(memory, expected)


@pytest.mark.parametrize("case", [c for c in NETWORKS if c != "dense"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_same_bits(case: str, batch: int) -> None:
    model, example = converted(case)
    for _ in range(5):
        x = torch.randn(batch, *example.shape[1:])
        assert torch.equal(model(x), model.network(x))
    assert any(len(r.program) > 0 for r in model._recordings._by_key.values() if r)


def test_results_are_the_callers() -> None:
    """Nothing that was returned changes with the next call, and what a caller does to it changes no later result."""
    model = recorded(sparse(nn.Sequential(conv(), nn.ReLU(), conv(8)), X), X)
    a, b = model(X), model(-X)
    assert torch.equal(a, model.network(X)) and not torch.equal(a, b)
    a.zero_()
    assert torch.equal(model(X), model.network(X)) and torch.equal(b, model.network(-X))


X = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(3))


def test_threads_of_the_caller_do_not_meet() -> None:
    model = recorded(converted("residual")[0], converted("residual")[1])
    inputs = [torch.randn_like(converted("residual")[1]) for _ in range(6)]
    expected, wrong = [model.network(x) for x in inputs], []

    def call(x: Tensor, y: Tensor) -> None:
        for _ in range(30):
            if not torch.equal(model(x), y):
                wrong.append(x)

    threads = [threading.Thread(target=call, args=pair) for pair in zip(inputs, expected, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_another_number_of_threads_is_another_recording() -> None:
    model, before = recorded(sparse(nn.Sequential(conv(), conv(8)), X), X), torch.get_num_threads()
    expected = model(X)
    try:
        torch.set_num_threads(before + 1)
        assert torch.equal(recorded(model, X)(X), expected) and len(model._recordings) == 2
    finally:
        torch.set_num_threads(before)


def test_hooks_are_called_and_do_not_stop_later_recording() -> None:
    model, seen = recorded(sparse(nn.Sequential(conv(), conv(8)), X), X), []
    layer = next(m for m in model.modules() if isinstance(m, SparseConv2d))
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out))
    model(X)
    handle.remove()
    assert len(seen) == 1 and len(model._recordings) == 1
    assert torch.equal(model(X), model.network(X)) and len(seen) == 1


def test_weights_that_are_replaced_or_changed_count() -> None:
    model = recorded(sparse(nn.Sequential(conv(), conv(8)), X), X)
    layer = next(m for m in model.modules() if isinstance(m, SparseConv2d))
    layer.values.mul_(2.0)
    assert torch.equal(model(X), model.network(X))
    layer.values = layer.values * 0.5
    assert torch.equal(model(X), model.network(X))
    int8, x = converted("int8")
    model = recorded(copy.deepcopy(int8), x)
    model.load_state_dict({k: v * 0.5 if "scale" in k else v for k, v in int8.state_dict().items()})
    assert torch.equal(model(x), model.network(x)) and not torch.equal(model(x), int8(x))


def test_a_state_dict_carries_the_steps_of_inputs_and_outputs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(conv(), nn.ReLU(), conv(8)).eval()
    fast = []
    for factor in (1.0, 20.0):
        own = copy.deepcopy(net)
        cnncomp.quantize(own, [factor * X], progress=False)
        fast.append(recorded(cnncomp.convert(own, X, measure=False), X))
    assert not torch.equal(fast[0](X), fast[1](X))
    fast[1].load_state_dict(fast[0].state_dict())
    assert torch.equal(fast[0](X), fast[1](X)) and torch.equal(fast[1](X), fast[1].network(X))


def test_copies_and_pickles_start_anew() -> None:
    model = recorded(converted("int8")[0], converted("int8")[1])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(other._recordings) == 0
        recorded(other, converted("int8")[1])
        assert torch.equal(other(converted("int8")[1]), model(converted("int8")[1])) and len(other._recordings) == 1


def test_gradients_raise_as_before() -> None:
    model = recorded(sparse(nn.Sequential(conv(), conv(8)), X), X)
    with pytest.raises(InferenceOnlyError):
        model(X.clone().requires_grad_()).sum().backward()


def test_a_gradient_for_a_layer_that_stayed_does_not_vanish() -> None:
    net = nn.Sequential(nn.PReLU(3), nn.ConvTranspose2d(3, 4, 3))
    net[0].weight.requires_grad_()
    model = recorded(cnncomp.convert(net, X, measure=False, cache=False), X)  # nothing of ours in it
    sparse_one = recorded(sparse(nn.Sequential(conv(), nn.PReLU(8)), X), X)
    stayed = next(m for m in sparse_one.modules() if isinstance(m, nn.PReLU)).weight.requires_grad_()
    sparse_one(X).sum().backward()
    assert stayed.grad is not None and len(sparse_one._recordings) == 1 and len(model._recordings) == 0


class Branches(nn.Module):
    """Functions of torch, views, and values that are used late, between kernels of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(8), conv(16)
        self.shift = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor, scale: float = 2.0) -> tuple[Tensor, dict[str, Tensor]]:
        a = self.a(x)
        b = self.b(torch.sigmoid(a) * scale + self.shift)
        c = self.c(torch.cat([a, b], 1))
        return c + a, {"flat": b.flatten(1), "a": a, "mean": c.mean((2, 3))}


def test_functions_between_kernels() -> None:
    model = recorded(sparse(Branches(), X), X)
    for x in (X, torch.randn_like(X)):
        (c, rest), (c2, rest2) = model(x), model.network(x)
        assert torch.equal(c, c2) and all(torch.equal(rest[k], rest2[k]) for k in rest2)
    assert torch.equal(recorded(model, X, 3.0)(X, 3.0)[0], model.network(X, 3.0)[0])


class Ragged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = conv(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.fc(y.permute(0, 2, 3, 1)[y[:, 0] > 0])


def test_shapes_that_depend_on_the_data() -> None:
    model = recorded(sparse(Ragged(), X), X)
    for x in (X, -X, X + 1):
        assert torch.equal(model(x), model.network(x))


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.keeps = conv(), nn.Identity()

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.a(x).chunk(2, 1))


@pytest.mark.parametrize("net", [lambda: nn.Sequential(conv(), Leaf()), Halves])
def test_networks_that_cannot_be_recorded_run_as_before(net: Callable[[], nn.Module]) -> None:
    model = recorded(sparse(net(), X), X)
    got, expected = model(-X), model.network(-X)
    pairs = zip(got, expected, strict=True) if isinstance(got, list) else [(got, expected)]
    assert len(model._recordings) == 0 and all(torch.equal(a, b) for a, b in pairs)


class Leaf(nn.Conv2d):
    """A subclass of torch's layer, which stays, and keeps what it sees."""

    def __init__(self) -> None:
        super().__init__(8, 4, 1)
        self.seen: list[Tensor] = []

    def forward(self, input: Tensor) -> Tensor:
        self.seen.append(input)
        return super().forward(input)


def test_recordings_are_few() -> None:
    model = sparse(nn.Sequential(conv(), conv(8)), X)
    for size in range(3, 30):
        x = torch.randn(1, 3, size, size)
        assert torch.equal(recorded(model, x)(x), model.network(x))
    assert len(model._recordings) == MAX_RECORDINGS


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 20), st.integers(0, 10)), max_size=25))
def testplaces_in_the_arena(shapes: list[tuple[int, int, int]]) -> None:
    buffers = [Buffer(0, size, born, born + life, True) for size, born, life in shapes]
    total = place(buffers)
    for i, a in enumerate(buffers):
        assert a.offset % 64 == 0 and a.offset + a.end <= total
        for b in buffers[:i]:
            apart = a.offset + a.end <= b.offset or b.offset + b.end <= a.offset
            assert apart or a.born > b.dies or b.born > a.dies
    busiest = max((sum(b.end for b in buffers if b.born <= t <= b.dies) for t in range(31)), default=0)
    assert total >= busiest


def test_a_chain_lives_in_twoplaces() -> None:
    """Eight equal images in a row take the memory of two."""
    model = recorded(sparse(nn.Sequential(*(conv(3, 3) for _ in range(9))), X), X)
    (recording,) = (r for r in model._recordings._by_key.values() if r)
    image = -(-X.nbytes // 64) * 64
    assert 2 * X.nbytes <= recording.arena_bytes <= 2 * image and len(recording.items) == 2


def test_kernels_of_one_layer() -> None:
    model = sparse(nn.Sequential(conv()), X)
    layer = next(m for m in model.modules() if isinstance(m, SparseConv2d))
    call = kernels_of(layer, (X,))
    assert call is not None and torch.equal(call(), layer(X))  # type: ignore[arg-type]
    last = X.contiguous(memory_format=torch.channels_last)
    assert kernels_of(layer, (last,)) is None  # its layout has to be changed first
    assert kernels_of(nn.ReLU(), (X,)) is None


def test_a_network_that_is_no_graph() -> None:
    assert torch.equal(Recordings()(nn.ReLU(), (X,)), X.relu())


class ReadLate(nn.Module):
    """A value of torch's that a kernel reads after other functions of torch's, and after its last reader among them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16), conv(16, 16)

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        x = torch.tanh(self.a(x))
        y = torch.tan(torch.cos(torch.exp(x)))
        return {"b": self.b(x.permute(0, 1, 2, 3)), "others": [y]}


def test_values_of_torch_live_until_kernels_have_read_them() -> None:
    x = torch.randn(1, 3, 56, 56)
    model = recorded(sparse(ReadLate(), x), x)
    for _ in range(3):
        x = torch.randn_like(x)
        got, expected = model(x), model.network(x)
        assert torch.equal(got["b"], expected["b"]) and torch.equal(got["others"][0], expected["others"][0])
        assert type(got) is dict and type(got["others"]) is list
