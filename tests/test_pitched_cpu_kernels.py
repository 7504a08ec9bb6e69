"""The fp32 CPU kernels on images with room between their channels: the same bits as without, whatever lies in the gaps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cnncomp
from cnncomp._arena import Buffer, Pointer, widen
from cnncomp._cpu import Program
from cnncomp.nn import Activation, DenseConv2d, MeanPool2d, QuantMaxPool2d, ScaleChannels, SparseConv2d
from cnncomp.nn.base import Clamp, Geometry
from tests.fp32_kernels import Guarded
from tests.helpers import mask_weights
from tests.instruction_sets import FLOAT_ISAS, instruction_set


@contextlib.contextmanager
def running(isa: str, threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with instruction_set(isa):
            yield
    finally:
        torch.set_num_threads(before)


def note(call: Callable[[], Tensor]) -> tuple[Program, Tensor]:
    """A program of the one kernel that a call runs, and what it gave."""
    program = Program()
    program.record(True)
    try:
        with torch.inference_mode():
            out = call()
    finally:
        program.record(False)
    assert len(program) == 1
    return program, out


def spread(t: Tensor, pitch: int, guarded: Guarded, gap: float) -> np.ndarray:
    """(N, C, pitch) with the pixels of ``t`` (N, C, H, W) first, in guarded memory."""
    n, c, h, w = t.shape
    memory = np.full((n, c, pitch), gap, np.float32)
    memory[..., : h * w] = t.reshape(n, c, h * w).numpy()
    return guarded(memory)


def check(call: Callable[[], Tensor], inputs: list[Tensor], extra: tuple[int, int] | None, at_end: bool) -> None:
    """Run a kernel with ``extra`` floats behind each channel of its input, and of its residual and output; None: as many as
    let channels begin at multiples of a vector."""
    program, expected = note(call)
    guarded, slots = Guarded(at_end), list[np.ndarray]()
    which = {address: i for i, address in enumerate(program.addresses(0)) if address}
    last = len(program.addresses(0)) - 1
    for i, t in [*((which[t.data_ptr()], t) for t in inputs), (last, torch.full_like(expected, 7.0))]:
        pixels = t.shape[2] * t.shape[3]
        more = -pixels % 16 if extra is None else extra[0 if i == 0 else 1]
        pitch = pixels + more if program.takes_pitch(0, i) else pixels
        program.bind(0, i, len(slots), 0)
        if program.takes_pitch(0, i):
            program.set_pitch(0, i, pitch)
        slots.append(spread(t, pitch, guarded, float("nan")))
    program.run(0, 1, [a.ctypes.data for a in slots])
    n, k, p, q = expected.shape
    got = torch.from_numpy(slots[-1][..., : p * q].copy()).reshape(n, k, p, q)
    assert torch.equal(got, expected)


SIZES = st.sampled_from([1, 3, 4, 7, 10, 14, 15, 28])
EXTRA = st.tuples(st.integers(0, 40), st.integers(0, 40))


@dataclass(frozen=True)
class Case:
    isa: str
    kind: str = "sparse"
    threads: int = 1
    n: int = 1
    c: int = 64
    k: int = 300
    h: int = 14
    w: int = 14
    size: int = 1
    stride: int = 1
    residual: bool = True
    extra: tuple[int, int] | None = None
    at_end: bool = True


SIZES = st.sampled_from([1, 3, 4, 7, 10, 14, 15, 28])
CASES = st.builds(
    Case,
    isa=st.sampled_from(FLOAT_ISAS),
    kind=st.sampled_from(["sparse", "dense.direct", "dense.depthwise", "mean", "max", "silu", "scale"]),
    threads=st.sampled_from([1, 2]),
    n=st.integers(1, 3),
    c=st.integers(2, 40),
    k=st.sampled_from([1, 9, 40, 300]),
    h=SIZES,
    w=SIZES,
    size=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    residual=st.booleans(),
    extra=st.none() | st.tuples(st.integers(0, 40), st.integers(0, 40)),
    at_end=st.booleans(),
)


def layer_of(a: Case) -> nn.Module:
    if a.kind in ("mean", "max"):
        return MeanPool2d() if a.kind == "mean" else QuantMaxPool2d(3, a.stride, 1)
    if a.kind in ("silu", "scale"):
        return Activation("silu") if a.kind == "silu" else ScaleChannels()
    groups = a.c if a.kind == "dense.depthwise" else 1
    conv = nn.Conv2d(a.c, a.c if groups > 1 else a.k, a.size, a.stride, a.size // 2, groups=groups).requires_grad_(
        False
    )
    if a.kind == "sparse":
        return SparseConv2d.from_float(mask_weights(conv, 0.7), Clamp(0.0))
    return DenseConv2d(Geometry.of(conv), conv.weight, conv.bias, Clamp(-1.0, 1.0), a.kind)


@settings(deadline=None, max_examples=150)
@given(CASES)
@example(Case(FLOAT_ISAS[-1]))  # one tile, read where it lies
@example(Case(FLOAT_ISAS[-1], k=40, h=7, w=7))
@example(Case(FLOAT_ISAS[-1], k=40, n=3))
@example(Case(FLOAT_ISAS[-1], k=40, n=3, h=7, w=7))
@example(Case(FLOAT_ISAS[-1], k=40, n=3, h=13, w=11))  # the last tile ends behind the last gap
@example(Case(FLOAT_ISAS[-1], k=40, n=2, h=10, w=28))
def test_gaps_change_no_bit(case: Case) -> None:
    torch.manual_seed(0)
    layer = layer_of(case)
    x = torch.randn(case.n, case.c, case.h, case.w)
    inputs = [x]
    if case.residual and isinstance(layer, (SparseConv2d, DenseConv2d)):
        inputs.append(torch.randn(layer.geometry.output_shape(x.shape)))
    if case.kind == "scale":
        inputs.append(torch.randn(case.n, case.c, 1, 1))
    with running(case.isa, case.threads):
        check(lambda: layer(*inputs), inputs, case.extra, case.at_end)


def test_wrong_pitches() -> None:
    conv = SparseConv2d.from_float(nn.Conv2d(3, 5, 1))
    x, residual = torch.randn(1, 3, 4, 5), torch.randn(1, 5, 4, 5)
    program, _ = note(lambda: conv(x, residual))
    operands = program.addresses(0)
    for i, address in enumerate(operands):
        program.bind(0, i, i, 0)
        assert program.takes_pitch(0, i) == (address in (x.data_ptr(), residual.data_ptr()) or i == len(operands) - 1)
    program.set_pitch(0, 0, 19)
    with pytest.raises(ValueError, match="a pitch of 19 for channels of 20 floats"):
        program.run(0, 1, operands)
    program.set_pitch(0, 0, 0)
    program.set_pitch(0, len(operands) - 2, 24)
    with pytest.raises(ValueError, match="different pitches"):
        program.run(0, 1, operands)
    for wrong in (lambda: program.set_pitch(0, 1, 4), lambda: program.set_pitch(0, 0, -1)):
        with pytest.raises(ValueError, match="pitch"):
            wrong()


class Small(nn.Module):
    """14 x 14 and 7 x 7 images between layers that may have gaps in them, and some for others, which may not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 40, 1), nn.Conv2d(40, 24, 3, padding=1)
        self.c, self.pool = nn.Conv2d(24, 40, 1), nn.MaxPool2d(3, 2, 1)
        self.d, self.e, self.f = nn.Conv2d(40, 20, 1), nn.Conv2d(10, 8, 1), nn.Conv2d(40, 8, 1)
        self.mean, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(40, 5)
        self.g, self.norm, self.h = nn.Conv2d(40, 16, 1), nn.BatchNorm2d(56), nn.Conv2d(56, 40, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.relu(self.a(self.stem(x)))
        x = torch.relu(self.c(torch.relu(self.b(x))) + x)
        seen = torch.tanh(self.f(x))
        x = torch.relu(
            self.norm(torch.cat([x, torch.sigmoid(self.g(x))], 1))
        )  # cat leaves no gaps: norm's can't lie over it
        x = self.pool(self.h(x))
        other = self.d(x).reshape(-1, 10, 14, 7)  # of half as many channels
        return self.fc(self.mean(x).flatten(1)), self.e(other), seen


@pytest.mark.parametrize("batch", [1, 2])
def test_recorded_networks_leave_room_behind_channels(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wide: list[tuple[int, ...]] = []

    def watched(program: Program, pointers: list[Pointer], seen: list[Buffer]) -> None:
        widen(program, pointers, seen)
        buffers = {id(p.buffer): p.buffer for p in pointers}.values()
        wide.extend(b.image for b in buffers if b.pitch and b.image)

    monkeypatch.setattr("cnncomp.executor.widen", watched)
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 28, 28)
    model = cnncomp.convert(mask_weights(Small(), 0.8).eval(), x, measure=False, cache=False)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn_like(x)
            for got, expected in zip(model(x), model.network(x), strict=True):
                assert torch.equal(got, expected)
    if batch > 1:
        assert not wide
        return
    # Not the last layers' outputs, which are the user's, nor what tanh and reshape see.
    assert set(wide) == {(1, 24, 14, 14), (1, 16, 14, 14), (1, 56, 14, 14), (1, 40, 14, 14), (1, 40, 7, 7)}
