"""Pruned and quantised layers: packing, operators, layers, dispatch, and the way from prune to a saved file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cnncomp
from cnncomp import _cpu
from cnncomp.dispatch.candidates import options_for
from cnncomp.errors import ArgumentError, DtypeError
from cnncomp.nn import (
    Clamp,
    ConvertedLayer,
    DenseConv2d,
    DenseLinear,
    Geometry,
    QuantConv2d,
    QuantLinear,
    QuantSpec,
    ScatteredQuantConv2d,
    SparseQuantConv2d,
    SparseQuantLinear,
)
from cnncomp.ops import packing, reference
from tests.helpers import random_8bit
from tests.instruction_sets import ISAS, instruction_set

OPS = torch.ops.cnncomp


def quads_weight(shape: tuple[int, ...], zeros: float = 0.7) -> Tensor:
    """An int8 weight (K, C, ...) of which runs of four input channels are zero, and some of the others."""
    runs = torch.rand(shape[0], -(-shape[1] // 4), *shape[2:]) >= zeros
    kept = runs.repeat_interleave(4, 1)[:, : shape[1]] & (torch.rand(shape) >= 0.1)
    return torch.randint(-127, 128, shape, dtype=torch.int8) * kept


@given(
    groups=st.integers(1, 3), k=st.integers(1, 9), c=st.integers(1, 21), r=st.integers(1, 3), s=st.integers(1, 3),
    zeros=st.sampled_from([0.0, 0.3, 0.8, 1.0]), block=st.sampled_from([None, 1, 2, 7, 5000]), seed=st.integers(0, 99),
)  # fmt: skip
def test_packing_round_trip(
    groups: int, k: int, c: int, r: int, s: int, zeros: float, block: int | None, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randint(-128, 128, (groups * k, c, r, s), dtype=torch.int8) * (
        torch.rand(groups * k, c, r, s) >= zeros
    )
    packed = packing.pack_sparse_int8(weight, groups, block)
    assert torch.equal(packing.unpack_sparse_int8(packed, groups * c, groups * k, (r, s), groups), weight)
    assert packed.values.any(1).all()  # nothing kept for nothing
    for bounded in (False, True):
        scattered = packing.pack_scattered_int8(weight, groups, block, bounded)
        assert torch.equal(packing.unpack_scattered_int8(scattered, groups * c, groups * k, (r, s), groups), weight)
        assert scattered.values.shape == scattered.positions.shape and scattered.values.any(1).all()
    pairs = scattered.values.reshape(-1, 2).int()
    assert (255 * pairs.clamp(min=0).sum(1) <= 32767).all() and (255 * pairs.clamp(max=0).sum(1) >= -32768).all()
    padded = torch.cat([weight, torch.zeros(groups * k, -c % 4, r, s, dtype=torch.int8)], 1)
    filled = padded.unflatten(1, (-1, 4)).bool().any(2)
    assert len(packed.values) == int(filled.sum())
    assert packing.quad_sparsity(weight) == pytest.approx(1 - float(filled.double().mean()))


@pytest.mark.parametrize("name", ISAS)
def test_pairs_are_bounded_where_products_saturate(name: str) -> None:
    weight = torch.randint(-127, 128, (8, 40, 3, 3), dtype=torch.int8)
    with instruction_set(name):
        packed, saturates = packing.pack_scattered_int8(weight), _cpu.int8_saturates()
    assert saturates == (name in ("avx2", "avx512"))
    assert torch.equal(packed.values, packing.pack_scattered_int8(weight, bounded=saturates).values)
    assert len(packed.values) >= 720 and (len(packed.values) > 720) == saturates


def test_a_weight_at_an_odd_address_is_packed() -> None:
    flat = torch.randint(1, 127, (1 + 8 * 4,), dtype=torch.int8)
    weight = flat[1:].view(8, 4, 1, 1)
    assert torch.equal(packing.pack_sparse_int8(weight).values, weight.flatten(1))


def test_too_large_a_block_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"block: got 8000, .*R\*S = 9"):
        packing.pack_sparse_int8(torch.zeros(1, 1, 3, 3, dtype=torch.int8), block=8000)


def conv_layer(
    geometry: Geometry, dtype: torch.dtype, out: torch.dtype | None, cls: type[QuantConv2d] = SparseQuantConv2d
) -> QuantConv2d:
    g = geometry
    weight = quads_weight((g.out_channels, g.in_channels // g.groups, *g.kernel_size))
    output = None if out is None else QuantSpec(0.05, out)
    scale, bias = torch.rand(g.out_channels) * 1e-3 + 1e-4, torch.randn(g.out_channels)
    return cls(g, weight, scale, bias, QuantSpec(0.02, dtype), Clamp(0.0, 6.0), output, 0.07)


def conv_args(layer: QuantConv2d, x: Tensor, residual: Tensor | None) -> tuple[object, ...]:
    g = layer.geometry
    assert isinstance(layer, SparseQuantConv2d)
    return (
        x, layer.weight, layer.index, layer.row_ptr, layer.block, layer.constants, residual, layer.residual_scale, layer.lo,
        g.kernel_size, g.stride, g.padding, g.dilation, g.groups, layer.out_dtype,
    )  # fmt: skip


GEOMETRY = Geometry(10, 12, (3, 3), (1, 2), (1, 0), groups=2)


@pytest.mark.parametrize("cls", [SparseQuantConv2d, ScatteredQuantConv2d])
def test_opcheck_conv(cls: type[QuantConv2d]) -> None:
    layer = conv_layer(GEOMETRY, torch.int8, torch.uint8, cls)
    x, residual = random_8bit((2, 10, 8, 9), torch.int8), random_8bit((2, 12, 8, 4), torch.uint8)
    torch.library.opcheck(OPS.conv2d_sparse_int8.default, conv_args(layer, x, residual))


def test_opcheck_linear() -> None:
    layer = SparseQuantLinear(quads_weight((9, 21)), torch.rand(9) + 0.1, None, QuantSpec(0.1, torch.uint8))
    args = (layer.weight, layer.index, layer.row_ptr, layer.block, layer.constants, None, 1.0, layer.lo, torch.float32)
    torch.library.opcheck(OPS.linear_sparse_int8.default, (random_8bit((2, 3, 21), torch.uint8), *args))


@pytest.mark.parametrize("cls", [SparseQuantConv2d, ScatteredQuantConv2d])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("out", [None, torch.uint8, torch.int8])
def test_conv_layer_has_the_bits_of_the_dense_one(
    cls: type[QuantConv2d], dtype: torch.dtype, out: torch.dtype | None
) -> None:
    for g in (GEOMETRY, Geometry(33, 20, (1, 1), (2, 2)), Geometry(6, 5, (1, 3), conv1d=True)):
        sparse = conv_layer(g, dtype, out, cls)
        dense = QuantConv2d.build(sparse.config(), sparse.tensors())
        shape = (3, g.in_channels, 9) if g.conv1d else (3, g.in_channels, 9, 7)
        x8, x = random_8bit(shape, dtype), torch.rand(shape) * 5
        for given_x in (x8, x):
            y = dense(given_x)
            residual = random_8bit(tuple(y.shape), torch.uint8)
            assert torch.equal(sparse(given_x), y)
            assert torch.equal(sparse(given_x, residual), dense(given_x, residual))
            assert torch.equal(sparse(given_x, residual[:1]), dense(given_x, residual[:1]))
        assert torch.equal(sparse.weight_int8(), dense.weight_int8())
        assert torch.equal(sparse.to_dense().weight, dense.to_dense().weight)
        rebuilt = cls.build(sparse.config(), sparse.tensors())
        assert torch.equal(rebuilt(x8), sparse(x8)) and rebuilt.kernel == sparse.kernel


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_linear_layer_is_bit_equal_to_the_reference(dtype: torch.dtype) -> None:
    weight, scale, bias = quads_weight((37, 130)), torch.rand(37) * 1e-3 + 1e-4, torch.randn(37)
    layer = SparseQuantLinear(weight, scale, bias, QuantSpec(0.03, dtype), Clamp(0.0), QuantSpec(0.04, torch.uint8))
    for shape in ((130,), (1, 130), (2, 9, 130), (0, 130)):
        x = random_8bit(shape, dtype)
        residual = torch.randn(*shape[:-1], 37)
        args = (layer.constants, residual, layer.residual_scale, layer.lo, torch.uint8)
        assert torch.equal(layer(x, residual), reference.linear_int8(x, weight, *args))
    assert torch.equal(layer.weight_int8(), weight)
    rebuilt = SparseQuantLinear.build(layer.config(), layer.tensors())
    assert torch.equal(rebuilt(x), layer(x))


def test_state_dict_goes_to_a_layer_with_the_same_zeros() -> None:
    layer = conv_layer(GEOMETRY, torch.uint8, torch.uint8)
    tensors = {**layer.tensors(), "weight_scale": torch.ones(12)}
    other = SparseQuantConv2d.build(layer.config(), tensors)
    x = random_8bit((1, 10, 8, 9), torch.uint8)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_errors_name_what_is_wrong() -> None:
    layer = conv_layer(GEOMETRY, torch.uint8, None)
    x = random_8bit((1, 10, 8, 9), torch.uint8)
    args = conv_args(layer, x, None)
    with pytest.raises(DtypeError, match=r"x: got torch.float32"):
        OPS.conv2d_sparse_int8(x.float(), *args[1:])
    with pytest.raises(ArgumentError, match="that the weight was packed for"):
        OPS.conv2d_sparse_int8(random_8bit((1, 600, 8, 9), torch.uint8), *args[1:])
    with pytest.raises(ArgumentError, match="no mean shift"):
        OPS.conv2d_sparse_int8(*args[:5], torch.zeros(4, 12), *args[6:])
    with pytest.raises(ArgumentError, match="weight_shift"):
        scale = torch.ones(4)
        SparseQuantLinear(quads_weight((4, 8)), scale, None, QuantSpec(1.0, torch.uint8), weight_shift=scale)


def test_candidates_say_why_not() -> None:
    def why(layer: ConvertedLayer) -> tuple[set[str], str]:
        options, reasons = options_for(layer, "cpu")
        return {o.candidate.kernel for o in options if not o.candidate.dense}, reasons

    weight = quads_weight((8, 16, 3, 3)).float()
    layer = DenseConv2d(Geometry(16, 8, (3, 3)), weight)
    assert why(layer)[0] == {"conv2d_sparse"}
    layer.info.input = QuantSpec(0.1, torch.uint8)
    assert why(layer)[0] == {"conv2d_int8", "conv2d_sparse_int8", "conv2d_scattered_int8"}
    layer.info.weight_shift = torch.zeros(8)
    assert why(layer)[0] == {"conv2d_int8"} and "mean-shift weights have no zeros" in why(layer)[1]
    linear = DenseLinear(torch.ones(8, 16))
    linear.info.input = QuantSpec(0.1, torch.uint8)
    assert why(linear)[0] == {"linear_int8"} and "0% of the quads of input channels are zero" in why(linear)[1]
    depthwise = DenseConv2d(Geometry(8, 8, (3, 3), groups=8), torch.zeros(8, 1, 3, 3))
    depthwise.info.input = QuantSpec(0.1, torch.uint8)
    assert why(depthwise)[0] == {"conv2d_int8"} and "depthwise" in why(depthwise)[1]


class Net(nn.Module):
    """A residual block between layers of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.a, self.b = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 32, 3, 1, 1)
        self.pool = nn.MaxPool2d(2)
        self.c = nn.Conv2d(32, 64, 3, 2, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.b(self.a(x).relu()) + x).relu()
        x = self.c(self.pool(x)).relu()
        return self.head(x.mean((2, 3)))


def kinds_of(model: nn.Module) -> dict[str, type[ConvertedLayer]]:
    return {layer.info.name: type(layer) for layer in model.modules() if isinstance(layer, ConvertedLayer)}


@pytest.mark.parametrize(("pattern", "cls"), [("1x4", SparseQuantConv2d), ("unstructured", ScatteredQuantConv2d)])
def test_from_prune_to_a_saved_file(pattern: str, cls: type[QuantConv2d], tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = torch.rand(4, 3, 32, 32)
    model = cnncomp.prune(Net().eval(), 0.75, pattern=pattern, scope="layer", progress=False)
    model = cnncomp.quantize(model, data, progress=False)
    fast = cnncomp.convert(model, data, measure=False, progress=False)
    kinds = kinds_of(fast)
    assert {name for name, kind in kinds.items() if kind is cls} == {"a", "b", "c"}
    assert kinds["stem"] is QuantConv2d and kinds["head"] is QuantLinear

    plan = cnncomp.Plan.from_json(fast.plan.to_json())
    for layer in plan.layers.values():
        layer.kernel = layer.kernel.replace("_sparse", "").replace("_scattered", "")
    dense = cnncomp.convert(model, data, plan=plan, progress=False)
    assert not any(isinstance(m, SparseQuantConv2d) for m in dense.modules())
    expected = dense(data)
    with torch.inference_mode():
        assert all(torch.equal(fast(data), expected) for _ in range(4))  # from the second call on, recorded
    assert len(fast._recordings) == 1
    assert cls.kernel in str(cnncomp.profile(fast, data, progress=False))

    for name, model_saved in (("sparse", fast), ("dense", dense)):
        cnncomp.save(model_saved, tmp_path / name)
    loaded = cnncomp.load(tmp_path / "sparse")
    assert kinds_of(loaded) == kinds
    assert torch.equal(loaded(data), expected)
    sizes = {name: (tmp_path / name).stat().st_size for name in ("sparse", "dense")}
    assert abs(sizes["sparse"] - sizes["dense"]) < 0.05 * sizes["dense"]  # both hold the unpacked weight and its bitmap
