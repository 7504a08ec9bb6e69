"""Tests of the Triton kernels in Triton's interpreter, on CPU tensors.

Not collected by name: ``test_triton_kernels.py`` runs this file in a process of its own, since TRITON_INTERPRET is read when a
kernel is defined.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncomp.kernels.conv2d_int8 import conv2d_int8
from cnncomp.kernels.conv2d_sparse import conv2d_sparse, pack_1xv
from cnncomp.kernels.gemm_int8 import linear_int8
from cnncomp.kernels.launch import Tile
from cnncomp.ops import cuda, reference
from cnncomp.ops.conv2d_sparse import _conv_cuda, _linear_cuda
from cnncomp.sparsity import unpack_blocks

TILE = Tile(16, 16, 32, 4, 2)  # small: the interpreter's time goes with the tile, the code is the same
INT_RANGE = {torch.uint8: (0, 256), torch.int8: (-128, 128)}
DTYPES = [torch.uint8, torch.int8]
OUT_DTYPES = [torch.uint8, torch.int8, torch.float32]
RESIDUALS = [None, torch.uint8, torch.int8, torch.float32]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return (torch.randn(shape) * 20).to(dtype)
    return torch.randint(*INT_RANGE[dtype], shape, dtype=dtype)


def random_constants(k: int, products: int, out_dtype: torch.dtype, activation: str = "") -> tuple[torch.Tensor, float]:
    """(3, k) constants that spread the outputs over the 8-bit range and past its ends, and lo; with an activation, its
    inputs over where it is curved and past that."""
    lo, top = {torch.uint8: (0.0, 255.0), torch.int8: (-128.0, 127.0)}.get(out_dtype, (-1e4, 1e4))
    scale = (torch.rand(k) + 0.5) * 100 / (7000 * products**0.5)
    hi = torch.where(torch.rand(k) < 0.3, torch.rand(k) * top, torch.tensor(top))
    bias = torch.randn(k) * 30 + 30
    return torch.stack([scale / 16, bias / 16, hi] if activation else [scale, bias, hi]), lo


def expected_of(run: Callable[[torch.dtype], torch.Tensor], out_dtype: torch.dtype) -> torch.Tensor:
    """What a reference gives in ``out_dtype``, as the interpreter makes it: to bfloat16 it cuts digits off, where what Triton
    compiles rounds (test_triton_kernels.py)."""
    if out_dtype != torch.bfloat16:
        return run(out_dtype)
    return (run(torch.float32).view(torch.int32) & -65536).view(torch.float32).bfloat16()


def assert_same(got: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    if not torch.equal(got, expected):
        at = (got != expected).nonzero()
        i = tuple(at[0].tolist())
        raise AssertionError(f"{what}: {len(at)} of {got.numel()} differ, first {i}: {got[i]}, expected {expected[i]}")


def check_conv(
    n, c, h, w, k, r, s, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1,
    dtype=torch.uint8, out_dtype=torch.int8, residual=None, tile=TILE, activation="",
) -> None:  # fmt: skip
    what = dict(locals())
    torch.manual_seed(n + c + h + k)
    x = random_tensor((n, c, h, w), dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-127, 128, (k, c // groups, r, s), dtype=torch.int8)
    constants, lo = random_constants(k, r * s * c // groups, out_dtype, activation)
    geometry = (stride, padding, dilation, groups)
    shape = torch.nn.functional.conv2d(x.float(), weight.float(), None, *geometry).shape
    res = None if residual is None else random_tensor(tuple(shape), residual)
    expected = expected_of(
        lambda out: reference.conv2d_int8(x, weight, constants, res, 0.37, lo, *geometry, out, activation, 2.5),
        out_dtype,
    )
    packed = weight.permute(0, 2, 3, 1).contiguous()
    got = conv2d_int8(x, packed, constants, res, 0.37, lo, *geometry, out_dtype, activation, 2.5, tile=tile)
    assert got.is_contiguous(memory_format=torch.channels_last), what
    assert_same(got, expected, what)


def check_linear(m, c, k, dtype=torch.uint8, out_dtype=torch.int8, residual=None, tile=TILE, activation="") -> None:
    what = dict(locals())
    torch.manual_seed(m + c + k)
    x = random_tensor((m, c), dtype)
    weight = torch.randint(-127, 128, (k, c), dtype=torch.int8)
    constants, lo = random_constants(k, c, out_dtype, activation)
    res = None if residual is None else random_tensor((m, k), residual)
    args, more = (x, weight, constants, res, -0.61, lo), (activation, 2.5)
    expected = expected_of(lambda out: reference.linear_int8(*args, out, *more), out_dtype)
    assert_same(linear_int8(*args, out_dtype, *more, tile=tile), expected, what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, c, k", [(1, 1, 1), (16, 32, 16), (15, 31, 17), (17, 33, 15), (33, 64, 32), (2, 100, 3)])
def test_linear_at_tile_edges(m, c, k, dtype):
    check_linear(m, c, k, dtype)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_linear_outputs_and_residuals(out_dtype, residual):
    check_linear(19, 40, 21, torch.int8, out_dtype, residual)


CONVS = {
    "pointwise": dict(n=2, c=32, h=4, w=4, k=16, r=1, s=1),
    "3x3": dict(n=1, c=32, h=5, w=4, k=17, r=3, s=3, padding=(1, 1)),
    "two blocks of channels": dict(n=1, c=40, h=4, w=4, k=8, r=3, s=3, padding=(1, 1)),
    "stem": dict(n=1, c=3, h=11, w=12, k=18, r=7, s=7, stride=(2, 2), padding=(3, 3)),
    "odd channels": dict(n=1, c=33, h=4, w=4, k=5, r=2, s=3, padding=(1, 2)),
    "uneven strides": dict(n=2, c=8, h=9, w=8, k=9, r=3, s=2, stride=(3, 2), padding=(0, 1)),
    "dilation": dict(n=1, c=32, h=8, w=9, k=4, r=3, s=3, padding=(2, 4), dilation=(2, 3)),
    "padding alone": dict(n=1, c=4, h=1, w=1, k=4, r=3, s=3, padding=(1, 1)),
    "groups": dict(n=1, c=12, h=5, w=5, k=9, r=3, s=3, padding=(1, 1), groups=3),
    "wide groups": dict(n=1, c=64, h=3, w=4, k=34, r=3, s=3, padding=(1, 1), groups=2),
    "depthwise": dict(n=2, c=19, h=6, w=5, k=19, r=3, s=3, stride=(2, 1), padding=(1, 1), groups=19),
    "depth multiplier": dict(n=1, c=3, h=6, w=5, k=6, r=3, s=3, padding=(1, 1), dilation=(1, 2), groups=3),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONVS)
def test_conv(name, dtype):
    check_conv(**CONVS[name], dtype=dtype)


@pytest.mark.parametrize("name", ["3x3", "stem", "depthwise"])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_conv_outputs_and_residuals(name, out_dtype, residual):
    check_conv(**CONVS[name], out_dtype=out_dtype, residual=residual)


@pytest.mark.parametrize("activation", ["", "silu", "hardswish"])
@pytest.mark.parametrize("out_dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_activations_and_halves(activation, out_dtype):
    check_linear(19, 40, 21, torch.int8, out_dtype, torch.float16, activation=activation)
    check_conv(**CONVS["3x3"], out_dtype=out_dtype, residual=torch.bfloat16, activation=activation)
    check_conv(**CONVS["depthwise"], out_dtype=out_dtype, activation=activation)


def test_default_tiles():
    check_conv(n=1, c=64, h=3, w=3, k=40, r=1, s=1, tile=None)
    check_conv(n=1, c=3, h=2, w=2, k=3, r=1, s=1, groups=3, tile=None)
    check_linear(5, 70, 33, tile=None)


def test_extremes_do_not_saturate():
    x = torch.full((4, 512), 255, dtype=torch.uint8)
    weight = torch.full((3, 512), -127, dtype=torch.int8)
    constants = torch.tensor([[1.0], [0.0], [float("inf")]]).expand(3, 3).contiguous()
    args = (x, weight, constants, None, 0.0, -float("inf"), torch.float32)
    assert_same(linear_int8(*args, tile=TILE), torch.full((4, 3), -255.0 * 127 * 512), "extremes")


def test_ties_round_to_even_and_nan_passes():
    constants = torch.tensor([[0.5], [0.0], [127.0]])
    weight = torch.ones(1, 1, dtype=torch.int8)
    x = torch.arange(-5, 6, dtype=torch.int8).reshape(-1, 1)
    got = linear_int8(x, weight, constants, None, 0.0, -128.0, torch.int8, tile=TILE)
    assert got.flatten().tolist() == [-2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2]
    nan = torch.full((11, 1), float("nan"))
    assert linear_int8(x, weight, constants, nan, 1.0, -128.0, torch.float32, tile=TILE).isnan().all()


def test_empty_batch():
    constants, lo = random_constants(4, 8, torch.int8)
    weight = torch.zeros(4, 1, 1, 8, dtype=torch.int8)
    x = torch.zeros(0, 8, 3, 3, dtype=torch.uint8)
    out = conv2d_int8(x, weight, constants, None, 0.0, lo, (1, 1), (0, 0), (1, 1), 1, torch.int8)
    assert out.shape == (0, 4, 3, 3)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_conv_random(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups, r, s = draw(1, 3), draw(1, 3), draw(1, 3)
    dilation = (draw(1, 2), draw(1, 2))
    check_conv(
        draw(1, 2), groups * draw(1, 40), draw(dilation[0] * (r - 1) + 1, 7), draw(dilation[1] * (s - 1) + 1, 7),
        groups * draw(1, 20), r, s, (draw(1, 3), draw(1, 3)), (draw(0, 2), draw(0, 2)), dilation, groups,
        data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(OUT_DTYPES)), data.draw(st.sampled_from(RESIDUALS)),
    )  # fmt: skip


SPARSE = {
    "3x3": dict(n=2, c=20, h=5, w=6, k=32, r=3, s=3, padding=(1, 1)),
    "ragged": dict(n=1, c=7, h=9, w=8, k=21, r=3, s=2, stride=(2, 3), padding=(0, 1), dilation=(2, 1)),
    "groups": dict(n=1, c=8, h=5, w=5, k=40, r=3, s=3, padding=(1, 1), groups=2),
}


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse(name, dtype, tolerance, density):
    sizes = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1) | SPARSE[name]
    torch.manual_seed(0)
    groups, k, r, s, c = (sizes[a] for a in ("groups", "k", "r", "s", "c"))
    geometry = tuple(sizes[a] for a in ("stride", "padding", "dilation", "groups"))
    weight = torch.randn(k, c // groups, r, s)
    blocks = -(-k // groups // 16)
    keep = torch.rand(groups, blocks, 1, c // groups, r, s) < density
    weight *= keep.expand(-1, -1, 16, -1, -1, -1).flatten(1, 2)[:, : k // groups].flatten(0, 1)
    weight, x = weight.to(dtype), torch.randn(sizes["n"], c, sizes["h"], sizes["w"]).to(dtype)
    packed = pack_1xv(weight, 16, groups)
    assert packed.values.numel() <= keep.sum() * 16
    assert torch.equal(unpack_blocks(packed, weight.shape, groups), weight)
    bias = torch.randn(k).to(dtype)
    plain = torch.nn.functional.conv2d(x.float(), weight.float(), bias.float(), *geometry)
    residual = torch.randn_like(plain).to(dtype)
    expected = (plain + residual.float()).clamp(-1.0, 4.0)
    got = conv2d_sparse(x, packed, k, (r, s), bias, residual, -1.0, 4.0, *geometry)
    assert got.dtype == dtype and got.shape == expected.shape
    error = (got.float() - expected).abs().max().item()
    assert error <= tolerance * max(plain.abs().max().item(), 1.0), f"{name}: {error}"


def test_sparse_operators_as_the_gpu_runs_them():
    """The CUDA implementations of the sparse operators, called directly, on unstructured masks."""
    torch.manual_seed(0)
    weight = torch.randn(20, 6, 3, 3) * (torch.rand(20, 6, 3, 3) < 0.2)
    packed, bias, x = cuda.pack_sparse(weight, 2), torch.randn(20), torch.randn(2, 12, 7, 6)
    assert torch.equal(cuda.unpack_sparse(packed, weight.shape, 2), weight)
    where = ((2, 1), (1, 1), (1, 1), 2)
    plain = torch.nn.functional.conv2d(x, weight, bias, *where)
    got = _conv_cuda(x, *packed, bias, None, 0.0, 6.0, 20, (3, 3), *where)
    torch.testing.assert_close(got, plain.clamp(0.0, 6.0), rtol=1e-5, atol=1e-5)
    weight, x, residual = torch.randn(20, 33) * (torch.rand(20, 33) < 0.2), torch.randn(5, 33), torch.randn(5, 20)
    packed = cuda.pack_sparse(weight.reshape(20, 33, 1, 1))
    got = _linear_cuda(x, *packed, bias, residual, -1.0, 1.0, 20)
    expected = (torch.nn.functional.linear(x, weight, bias) + residual).clamp(-1.0, 1.0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_sparse_refuses_odd_runs():
    with pytest.raises(ValueError, match="v: got 24"):
        pack_1xv(torch.zeros(24, 1, 1, 1), 24)
