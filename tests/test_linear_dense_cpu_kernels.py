"""The fp32 linear kernel for few rows against a float64 product, for every instruction set of this machine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cnncomp import _cpu
from cnncomp.errors import ArgumentError
from cnncomp.nn import Clamp, DenseLinear
from cnncomp.nn.dense import MAX_ROWS, ROWS_KERNEL
from tests.fp32_kernels import Guarded, address, assert_within, one_thread_for_references
from tests.instruction_sets import float_isa as isa

__all__ = ["isa", "one_thread_for_references"]  # fixtures


def run(m: int, c: int, k: int, *, extras: bool = True, threads: int = 1, guarded: Guarded | None = None) -> Tensor:
    torch.manual_seed(0)
    x, w = torch.randn(m, c), torch.randn(k, c)
    b, z = (torch.randn(k), torch.randn(m, k)) if extras else (None, None)
    lo, hi = (-1.0, 2.0) if extras else (-math.inf, math.inf)
    place = guarded if guarded is not None else lambda a: a
    arrays = [None if t is None else place(t.numpy()) for t in (x, w, b, z)]
    out = place(np.full((m, k), np.nan, np.float32))
    _cpu.linear_dense(
        address(arrays[0]), m, c, address(arrays[1]), k, address(arrays[2]), address(arrays[3]), lo, hi, address(out), threads
    )  # fmt: skip
    y, size = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    for t in (b, z):
        if t is not None:
            y, size = y + t, size + t.abs()
    got = torch.from_numpy(out.copy())
    assert_within(got, y.clamp(lo, hi), size, (m, c, k))
    return got


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("c", [1, 3, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 1280])
def test_sizes(isa: str, m: int, c: int) -> None:
    for k in (1, 7, 33):
        run(m, c, k, extras=k != 7)


@pytest.mark.parametrize("at_end", [False, True])
def test_touches_nothing_but_its_operands(isa: str, at_end: bool) -> None:
    for c in (5, 40, 64):
        run(3, c, 5, guarded=Guarded(at_end))


def test_same_bits_on_any_number_of_threads(isa: str) -> None:
    assert torch.equal(run(3, 50, 99), run(3, 50, 99, threads=3))


def test_layer_takes_few_rows_and_leaves_many_to_torch() -> None:
    layer = DenseLinear(torch.randn(6, 40), torch.randn(6), Clamp(0.0, 1.0), ROWS_KERNEL)
    for rows in (1, MAX_ROWS, MAX_ROWS + 1):
        x, residual = torch.randn(rows, 40), torch.randn(rows, 6)
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected.clamp(0, 1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(x, residual), (expected + residual).clamp(0, 1), rtol=1e-5, atol=1e-5)
    again = DenseLinear.build(layer.config(), layer.tensors())
    assert again.kernel == ROWS_KERNEL and torch.equal(again(x), layer(x))
    old = {"activation": layer.config()["activation"]}  # of a file from before there was a choice
    assert DenseLinear.build(old, layer.tensors()).kernel == "dense.linear"
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    with pytest.raises(ArgumentError, match="dense.rows"):
        DenseLinear(layer.weight, kernel="dense.nchw")
    with pytest.raises(ArgumentError, match="40 channels"):
        torch.ops.cnncomp.linear_dense(torch.randn(2, 9), layer.weight, None, None, 0.0, 1.0)
