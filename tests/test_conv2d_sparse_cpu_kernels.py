"""The sparse fp32 CPU kernels against a float64 convolution, for every instruction set of this machine.

Tolerance: each output within 1e-5 of the sum of the magnitudes that went into it, |w| * |x| + |bias| + |residual|.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cnncomp import _cpu
from tests.fp32_kernels import LANES, Guarded, address, assert_within, one_thread_for_references
from tests.instruction_sets import FLOAT_ISAS, instruction_set
from tests.instruction_sets import float_isa as isa

__all__ = ["isa", "one_thread_for_references"]  # fixtures

INF = math.inf
MAX_TILE = 14  # vectors
MAX_TILE_PIXELS = 112  # of a convolution


@dataclass
class Packed:
    values: np.ndarray
    index: np.ndarray
    row_ptr: np.ndarray
    block: int


def pack(weight: Tensor, groups: int, block: int) -> Packed:
    """Loops that spell out the packed layout; weight (K, C/G, R, S)."""
    w = weight.numpy()
    k, cg, r, s = w.shape
    values, index, row_ptr = [], [], [0]
    for group in np.split(w, groups):
        for c in range(0, cg, block):
            for row in group[:, c : c + block].reshape(k // groups, -1):
                at = np.flatnonzero(row)
                values.append(row[at])
                index.append(at)
                row_ptr.append(row_ptr[-1] + len(at))
    return Packed(
        np.concatenate(values).astype(np.float32),
        np.concatenate(index).astype(np.uint16),
        np.array(row_ptr, np.int32),
        block,
    )


def sparse_randn(shape: tuple[int, ...], sparsity: float) -> Tensor:
    return torch.where(torch.rand(shape) < sparsity, torch.zeros(()), torch.randn(shape))


@dataclass
class Conv:
    n: int = 1
    c: int = 8
    h: int = 9
    w: int = 9
    k: int = 5
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    block: int = 3
    sparsity: float = 0.7
    bias: bool = True
    residual: bool = False
    lo: float = -INF
    hi: float = INF

    def out_shape(self) -> tuple[int, int, int, int]:
        def size(i: int, x: int) -> int:
            return (x + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1

        return self.n, self.k, size(0, self.h), size(1, self.w)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        torch.manual_seed(0)
        x = torch.randn(self.n, self.c, self.h, self.w)
        w = sparse_randn((self.k, self.c // self.groups, *self.kernel), self.sparsity)
        return (
            x,
            w,
            torch.randn(self.k) if self.bias else None,
            torch.randn(self.out_shape()) if self.residual else None,
        )

    def reference(self, x: Tensor, w: Tensor, b: Tensor | None, z: Tensor | None) -> tuple[Tensor, Tensor]:
        """The result in float64, and the sum of magnitudes that its error is measured by."""
        args = (self.stride, self.padding, self.dilation, self.groups)
        y = F.conv2d(x.double(), w.double(), None if b is None else b.double(), *args)
        size = F.conv2d(x.double().abs(), w.double().abs(), None if b is None else b.double().abs(), *args)
        if z is not None:
            y, size = y + z, size + z.abs()
        return y.clamp(self.lo, self.hi), size

    def run(
        self,
        x: Tensor | np.ndarray,
        packed: Packed,
        b: Tensor | np.ndarray | None,
        z: Tensor | np.ndarray | None,
        out: Tensor | np.ndarray,
        num_threads: int = 1,
    ) -> None:
        _cpu.conv2d_sparse(
            address(x), self.n, self.c, self.h, self.w,
            address(packed.values), address(packed.index), address(packed.row_ptr), packed.block,
            self.k, *self.kernel, *self.stride, *self.padding, *self.dilation, self.groups,
            address(b), address(z), self.lo, self.hi, address(out), num_threads,
        )  # fmt: skip


def check_conv(conv: Conv, num_threads: int = 1) -> Tensor:
    x, w, b, z = conv.tensors()
    out = torch.full(conv.out_shape(), math.nan)
    conv.run(x, pack(w, conv.groups, conv.block), b, z, out, num_threads)
    assert_within(out, *conv.reference(x, w, b, z), conv)
    return out


def tile_edges() -> list[int]:
    edges = {1, 2, 3} | {i * MAX_TILE_PIXELS + d for i in (1, 2) for d in (-1, 0, 1)}
    for lanes in LANES:
        edges |= {lanes - 1, lanes, lanes + 1, 3 * lanes + 1}
        edges |= {MAX_TILE * lanes + d for d in (-1, 0, 1)} | {2 * MAX_TILE * lanes + 1}
    return sorted(edges)


@pytest.mark.parametrize("pixels", tile_edges())
def test_pointwise_at_tile_edges(isa: str, pixels: int) -> None:
    for n, h, w in ((1, 1, pixels), (1, pixels, 1), (pixels, 1, 1), (3, 1, pixels)):
        check_conv(Conv(n, 7, h, w, 4, kernel=(1, 1), padding=(0, 0), residual=True))


@pytest.mark.parametrize("vectors", range(1, 2 * MAX_TILE + 2))
def test_every_tile_size(isa: str, vectors: int) -> None:
    for lanes in LANES:
        check_conv(Conv(c=5, k=3, h=1, w=vectors * lanes, kernel=(1, 3), padding=(0, 1), sparsity=0.3))


GRID = {
    "rows of a multiple of 8": Conv(h=8, w=8, n=2),
    "rows rounded up to 8": Conv(h=7, w=7, n=2),
    "rows rounded up to 16": Conv(h=14, w=14, n=2),
    "short rows": Conv(h=9, w=9, n=2),
    "long rows": Conv(h=5, w=30, n=2),
    "longer than a tile": Conv(h=4, w=250),
    "images share a tile": Conv(h=4, w=4, n=9),
    "one pixel": Conv(h=1, w=1, n=3),
    "one pixel, 1x1": Conv(h=1, w=1, n=1, kernel=(1, 1), padding=(0, 0)),
    "stride 2": Conv(h=33, w=34, stride=(2, 2), n=2),
    "stride 2, small": Conv(h=14, w=14, stride=(2, 2), n=2),
    "stride 2, 1x1": Conv(h=13, w=12, kernel=(1, 1), padding=(0, 0), stride=(2, 2), n=2),
    "stride 2, 1x1, padded": Conv(h=13, w=12, kernel=(1, 1), padding=(1, 2), stride=(2, 2), n=2),
    "stride 2, long rows": Conv(h=6, w=131, stride=(2, 2), n=2),
    "stride 3": Conv(h=40, w=41, stride=(3, 3)),
    "stride beyond the kernel": Conv(h=40, w=41, stride=(5, 4), kernel=(2, 2)),
    "strides differ": Conv(h=20, w=40, stride=(1, 2), padding=(0, 1)),
    "dilation 2": Conv(h=30, w=40, dilation=(2, 2), padding=(2, 2)),
    "dilation 12, far rows": Conv(h=40, w=40, dilation=(12, 12), padding=(12, 12)),
    "dilation and stride": Conv(h=40, w=43, dilation=(3, 2), stride=(2, 3), padding=(3, 4)),
    "kernel 1x7": Conv(h=17, w=17, kernel=(1, 7), padding=(0, 3)),
    "kernel 7x1": Conv(h=17, w=17, kernel=(7, 1), padding=(3, 0)),
    "tiles between two rows": Conv(c=3, h=12, w=224, kernel=(7, 7), padding=(3, 3), stride=(2, 2), block=30),
    "kernel 7x7, stride 2": Conv(c=3, h=40, w=40, kernel=(7, 7), padding=(3, 3), stride=(2, 2)),
    "even kernel": Conv(h=10, w=33, kernel=(2, 4), padding=(1, 1)),
    "kernel as large as the image": Conv(h=6, w=5, kernel=(6, 5), padding=(0, 0), n=3),
    "padding beyond the kernel": Conv(h=5, w=40, padding=(4, 5)),
    "padding beyond the image": Conv(h=1, w=2, padding=(9, 40)),
    "no padding": Conv(h=20, w=50, padding=(0, 0)),
    "kernel 5x5": Conv(h=30, w=33, kernel=(5, 5), padding=(2, 2)),
    "groups": Conv(c=12, k=9, groups=3, h=20, w=20),
    "many outputs per input": Conv(k=300, h=8, w=28, kernel=(1, 1), padding=(0, 0), sparsity=0.9),
    "depthwise": Conv(c=10, k=10, groups=10, h=20, w=20, block=1),
    "depthwise, multiplier 2": Conv(c=5, k=10, groups=5, h=20, w=20, block=4),
    "block 1": Conv(block=1),
    "block of all channels": Conv(block=8),
    "block beyond the channels": Conv(block=50),
    "positions of 16 bits": Conv(c=2100, block=2100, kernel=(5, 5), padding=(2, 2), h=5, w=5, k=2, sparsity=0.95),
    "one channel": Conv(c=1, k=1),
    "beyond the second-level cache": Conv(c=70, k=3, h=64, w=130, n=2, block=30, kernel=(1, 1), padding=(0, 0)),
}


@pytest.mark.parametrize("name", GRID)
@pytest.mark.parametrize("residual", [False, True])
def test_shapes(isa: str, name: str, residual: bool) -> None:
    check_conv(Conv(**{**vars(GRID[name]), "residual": residual}))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_sparsity(isa: str, sparsity: float) -> None:
    out = check_conv(Conv(c=40, k=20, h=12, w=30, block=16, sparsity=sparsity))
    if sparsity == 1.0:
        bias = Conv(c=40, k=20, h=12, w=30, block=16, sparsity=sparsity).tensors()[2]
        assert bias is not None
        assert torch.equal(out, bias.reshape(1, -1, 1, 1).expand_as(out))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("lo, hi", [(-INF, INF), (0.0, INF), (0.0, 6.0), (-0.5, 0.25)])
@pytest.mark.parametrize("width", [16, 19])
def test_epilogue(isa: str, bias: bool, residual: bool, lo: float, hi: float, width: int) -> None:
    for kernel, padding in (((1, 1), (0, 0)), ((3, 3), (1, 1))):
        check_conv(Conv(h=20, w=width, kernel=kernel, padding=padding, bias=bias, residual=residual, lo=lo, hi=hi))


def test_nan_passes_the_clamp(isa: str) -> None:
    conv = Conv(c=1, k=1, h=3, w=37, kernel=(1, 1), padding=(0, 0), bias=False, block=1, lo=0.0, hi=6.0)
    x = torch.ones(1, 1, 3, 37)
    x[..., 1, 5] = math.nan
    out = torch.empty(conv.out_shape())
    conv.run(x, pack(torch.ones(1, 1, 1, 1), 1, 1), None, None, out)
    assert torch.equal(out.isnan(), x.isnan())


def test_empty_batch(isa: str) -> None:
    check_conv(Conv(n=0))


@pytest.mark.parametrize(
    "conv",
    [
        Conv(c=16, k=70, h=30, w=30, n=2, sparsity=0.8, residual=True),
        Conv(c=16, k=70, h=7, w=7, sparsity=0.8),
        Conv(c=12, k=12, groups=3, h=4, w=4, n=5, sparsity=0.5),
        Conv(c=40, k=3, h=12, w=12, kernel=(1, 1), padding=(0, 0), block=16),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_threads(isa: str, conv: Conv) -> None:
    one = check_conv(conv)
    for num_threads in (2, 3, 8, 100):
        assert torch.equal(check_conv(conv, num_threads), one), num_threads


@pytest.mark.parametrize("width", range(120, 168, 8))
def test_tiles_that_end_between_rows_write_nothing_there(isa: str, width: int) -> None:
    """The columns between two rows may be more than a vector; the outputs lie over the residuals, which are read later."""
    conv = Conv(c=2, k=3, h=9, w=width, kernel=(1, 5), padding=(0, 8), dilation=(1, 4), residual=True, sparsity=0.3)
    x, w, b, z = conv.tensors()
    assert z is not None
    out = z.clone()
    conv.run(x, pack(w, 1, conv.block), b, out, out)
    assert_within(out, *conv.reference(x, w, b, z), conv)


def test_unequal_rows_over_threads(isa: str) -> None:
    """All non-zeros in the last output channels: ranges of channels may be empty."""
    conv = Conv(c=16, k=12, h=6, w=6, block=16, kernel=(1, 1), padding=(0, 0))
    x, w, b, _ = conv.tensors()
    w[:11] = 0
    outs = []
    for num_threads in (1, 5, 12):
        out = torch.full(conv.out_shape(), math.nan)
        conv.run(x, pack(w, 1, 16), b, None, out, num_threads)
        assert_within(out, *conv.reference(x, w, b, None), conv)
        outs.append(out)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@st.composite
def convs(draw: st.DrawFn) -> Conv:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel, dilation = pair(1, 5), pair(1, 3)
    padding = pair(0, 4)
    smallest = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    return Conv(
        n=draw(st.integers(1, 3)),
        c=groups * draw(st.integers(1, 20)),
        h=smallest[0] + draw(st.integers(0, 20)),
        w=smallest[1] + draw(st.integers(0, 70)),
        k=groups * draw(st.integers(1, 10)),
        kernel=kernel,
        stride=pair(1, 3),
        padding=padding,
        dilation=dilation,
        groups=groups,
        block=draw(st.integers(1, 24)),
        sparsity=draw(st.sampled_from([0.0, 0.5, 0.9])),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        lo=draw(st.sampled_from([-INF, 0.0])),
        hi=draw(st.sampled_from([INF, 6.0])),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(conv=convs(), num_threads=st.integers(1, 4))
def test_random_shapes(conv: Conv, num_threads: int) -> None:
    for name in FLOAT_ISAS:
        with instruction_set(name):
            check_conv(conv, num_threads)


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize(
    "conv",
    [
        Conv(c=5, h=1, w=37, kernel=(1, 1), padding=(0, 0), residual=True),
        Conv(c=5, h=28, w=8, kernel=(1, 1), padding=(0, 0), residual=True),
        Conv(c=5, h=11, w=13, kernel=(1, 1), padding=(0, 0), stride=(2, 2), residual=True),
        Conv(c=5, h=11, w=31, kernel=(1, 1), padding=(0, 0), stride=(2, 2), residual=True),
        Conv(c=5, h=11, w=12, padding=(0, 0), residual=True),
        Conv(c=5, h=9, w=37, residual=True),
        Conv(c=5, h=14, w=14, stride=(2, 2), residual=True),
        Conv(c=5, h=16, w=37, stride=(2, 2), padding=(0, 0), residual=True),
        Conv(c=5, h=16, w=40, stride=(3, 3), padding=(0, 0), residual=True),
        Conv(c=6, k=6, groups=6, h=7, w=7, residual=True),
    ],
    ids=str,
)
def test_stays_inside_its_memory(isa: str, conv: Conv, at_end: bool) -> None:
    x, w, b, z = conv.tensors()
    assert b is not None and z is not None
    guarded = Guarded(at_end)
    packed = pack(w, conv.groups, conv.block)
    packed = Packed(guarded(packed.values), guarded(packed.index), guarded(packed.row_ptr), packed.block)
    out = guarded(np.full(conv.out_shape(), np.nan, np.float32))
    conv.run(guarded(x.numpy()), packed, guarded(b.numpy()), guarded(z.numpy()), out)
    assert_within(torch.from_numpy(out.copy()), *conv.reference(x, w, b, z), conv)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(groups=3), "groups"),
        (dict(stride=(0, 1)), "stride"),
        (dict(block=8000), "block"),
        (dict(block=0), "block"),
        (dict(h=1, padding=(0, 0)), "larger than the padded image"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    good = Conv()
    x, w, b, _ = good.tensors()
    packed = pack(w, 1, 3)
    bad = Conv(**{**vars(good), **change})
    packed.block = bad.block
    with pytest.raises(ValueError, match=message):
        bad.run(x, packed, b, None, torch.empty(good.out_shape()))


def check_linear(
    m: int, c: int, k: int, block: int, sparsity: float, *, bias: bool = True, residual: bool = False,
    lo: float = -INF, hi: float = INF, num_threads: int = 1, guarded: Guarded | None = None,
) -> Tensor:  # fmt: skip
    torch.manual_seed(0)
    x, w = torch.randn(m, c), sparse_randn((k, c), sparsity)
    b, z = torch.randn(k) if bias else None, torch.randn(m, k) if residual else None
    packed = pack(w.reshape(k, c, 1, 1), 1, block)
    place = guarded if guarded is not None else lambda a: a
    arrays = [None if t is None else place(t.numpy()) for t in (x, b, z)]
    weights = [place(a) for a in (packed.values, packed.index, packed.row_ptr)]
    out = place(np.full((m, k), np.nan, np.float32))
    _cpu.linear_sparse(
        address(arrays[0]), m, c, *map(address, weights), block, k,
        address(arrays[1]), address(arrays[2]), lo, hi, address(out), num_threads,
    )  # fmt: skip
    y = F.linear(x.double(), w.double(), None if b is None else b.double())
    size = F.linear(x.double().abs(), w.double().abs(), None if b is None else b.double().abs())
    if z is not None:
        y, size = y + z, size + z.abs()
    got = torch.from_numpy(out.copy())
    assert_within(got, y.clamp(lo, hi), size, (m, c, k, block, sparsity))
    return got


@pytest.mark.parametrize("m", tile_edges())
def test_linear_at_tile_edges(isa: str, m: int) -> None:
    check_linear(m, 33, 19, 16, 0.6, residual=True, lo=0.0, hi=6.0)


@pytest.mark.parametrize("m", [0, 1, 4, 50])
@pytest.mark.parametrize("c, k, block", [(1, 1, 1), (2, 17, 100), (100, 1, 7), (300, 40, 128)])
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
def test_linear_shapes(isa: str, m: int, c: int, k: int, block: int, sparsity: float) -> None:
    for bias in (False, True):
        one = check_linear(m, c, k, block, sparsity, bias=bias)
        assert torch.equal(check_linear(m, c, k, block, sparsity, bias=bias, num_threads=3), one)


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("m", [1, 5, 17, 225])
def test_linear_stays_inside_its_memory(isa: str, m: int, at_end: bool) -> None:
    check_linear(m, 37, 21, 16, 0.5, residual=True, guarded=Guarded(at_end))
