"""Converted networks on other inputs than the example: sizes at which an add broadcasts, other dtypes, autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnncomp
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
    SparseConv2d,
    SparseLinear,
    quantize_weight,
)
from cnncomp.nn.dense import CONV_KERNELS
from tests.helpers import mask_weights, reference_conv


class Adds(nn.Module):
    """Adds two tensors whose shapes agree at batch 1 (``mean``) or for images of one pixel (``pool``, ``gate``)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        if self.how == "mean":
            y = self.b(y) + y.mean(0, keepdim=True)
        elif self.how == "pool":
            y = self.b(y) + F.adaptive_avg_pool2d(y, 1)
        else:  # the sum is larger than the convolution's output
            y = self.b(F.adaptive_avg_pool2d(y, 1)) + y
        return self.c(y.relu())


@pytest.mark.parametrize("how", ["mean", "pool", "gate"])
@pytest.mark.parametrize("kind", ["dense.nchw", "dense.channels_last", "dense.fused", "sparse", "int8"])
def test_an_add_that_broadcasts_on_other_sizes(how: str, kind: str) -> None:
    model = Adds(how).eval()
    if kind == "sparse":
        mask_weights(model, 0.7)
    elif kind == "int8":
        cnncomp.quantize(model, [torch.randn(2, 3, 6, 6), torch.randn(2, 3, 1, 1)], progress=False)
    example = torch.randn(1, 3, 5, 5) if how == "mean" else torch.randn(1, 3, 1, 1)
    plan = cnncomp.convert(model, example, measure=False).plan
    if kind.startswith("dense"):
        for layer in plan.layers.values():
            layer.kernel = kind
    fast = cnncomp.convert(model, example, plan=plan)
    assert not any("add" in str(n.target) for n in fast.network.graph.nodes), "the add is fused"
    for shape in ((1, 3, 5, 5), (3, 3, 5, 5), (3, 3, 1, 1), (2, 3, 6, 4), (1, 3, 1, 1)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = model(x)
        tolerance = 0.1 if kind == "int8" else 1e-4
        assert (fast(x) - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


def test_compiled_and_exported_with_an_add_that_broadcasts() -> None:
    model = cnncomp.quantize(Adds("mean").eval(), [torch.randn(2, 3, 6, 6)], progress=False)
    fast = cnncomp.convert(model, torch.randn(1, 3, 5, 5), measure=False)
    x = torch.randn(2, 3, 5, 5)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(fast, (x,), dynamic_shapes={"args": ({0: batch},)}).module()
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager", dynamic=True)
        for other in (x, torch.randn(5, 3, 5, 5)):
            torch.testing.assert_close(exported(other), fast(other), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(compiled(other), fast(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual_dtype", [torch.uint8, torch.int8, torch.float32])
@pytest.mark.parametrize("output", [None, QuantSpec(0.05, torch.uint8), QuantSpec(0.05, torch.int8)])
@pytest.mark.parametrize("conv1d", [False, True])
def test_int8_broadcasting_is_exact(residual_dtype: torch.dtype, output: QuantSpec | None, conv1d: bool) -> None:
    """The bits of a residual that was expanded before."""
    g = Geometry(8, 12, (1, 3), padding=(0, 1), groups=2, conv1d=conv1d)
    weight, scale = quantize_weight(torch.randn(12, 4, 1, 3))
    layer = QuantConv2d(g, weight, scale, torch.randn(12), QuantSpec(0.03, torch.int8), Clamp(0.0, 6.0), output, 0.07)
    x = torch.randn(3, 8, 9) if conv1d else torch.randn(3, 8, 4, 9)
    for shape in ((1, 12, 9), (3, 1, 9), (12, 1)) if conv1d else ((1, 12, 4, 9), (3, 12, 1, 1), (12, 1, 9)):
        residual = (
            torch.randn(shape) if residual_dtype.is_floating_point else torch.randint(0, 100, shape).to(residual_dtype)
        )
        expanded = residual.expand(layer(x).shape)
        assert torch.equal(layer(x, residual), layer(x, expanded))
    if not conv1d:
        assert torch.equal(layer(x, residual), reference_conv(layer, x, residual.expand(layer(x).shape)))


@pytest.mark.parametrize("kind", ["dense", "sparse", "int8"])
def test_linear_with_a_residual_that_broadcasts(kind: str) -> None:
    weight, bias, act = torch.randn(5, 7) * (torch.rand(5, 7) > 0.5), torch.randn(5), Clamp(-1.0, 2.0)
    q, scale = quantize_weight(weight)
    layers = {
        "dense": lambda: DenseLinear(weight, bias, act),
        "sparse": lambda: SparseLinear(weight, bias, act),
        "int8": lambda: QuantLinear(q, scale, bias, QuantSpec(0.03, torch.int8), act),
    }
    layer, x = layers[kind](), torch.randn(4, 3, 7)
    for shape in ((3, 5), (4, 1, 5), (5,), (2, 4, 3, 5)):
        residual = torch.randn(shape)
        expanded = residual.expand(torch.broadcast_shapes(shape, (4, 3, 5)))
        got, same = layer(x, residual), layer(x.expand(*expanded.shape[:-1], 7), expanded)
        torch.testing.assert_close(got, same, rtol=1e-5, atol=1e-5)
        assert kind != "int8" or torch.equal(got, same)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(
    "sizes", [((3, 2), (1, 1), (0, 0), (1, 1)), ((3, 3), (2, 3), (1, 2), (2, 1)), ((1, 5), (1, 2), (0, 4), (1, 3))]
)
def test_output_shape_is_torchs(sizes: tuple[tuple[int, int], ...], conv1d: bool) -> None:
    for size in ((7, 11), (9, 18)):
        if conv1d:
            conv = nn.Conv1d(2, 3, *(s[1] for s in sizes))
            x = torch.randn(2, 2, size[1])
        else:
            conv = nn.Conv2d(2, 3, *sizes)
            x = torch.randn(2, 2, *size)
        assert Geometry.of(conv).output_shape(x.shape) == conv(x).shape


def _layers() -> list[ConvertedLayer]:
    conv, linear = nn.Conv2d(3, 4, 3), nn.Linear(3, 4)
    spec = QuantSpec(0.03, torch.int8)
    geometry = Geometry.of(conv)
    return [
        *(DenseConv2d(geometry, conv.weight, conv.bias, kernel=kernel) for kernel in CONV_KERNELS),
        SparseConv2d.from_float(conv), QuantConv2d.from_float(conv, spec),
        DenseLinear(linear.weight), SparseLinear.from_float(linear), QuantLinear.from_float(linear, spec),
    ]  # fmt: skip


@pytest.mark.parametrize("layer", _layers(), ids=lambda m: m.kernel)
def test_wrong_inputs_of_a_layer_are_named(layer: ConvertedLayer) -> None:
    linear = "linear" in layer.kernel
    for dtype in (torch.float64, torch.int64, torch.complex64):
        with pytest.raises(DtypeError, match="x: got torch"):
            layer(torch.ones((2, 3) if linear else (2, 3, 5, 5), dtype=dtype))
    for shape in ((2, 4), (3, 2)) if linear else ((2, 4, 5, 5), (3, 5, 5), (2, 3)):
        with pytest.raises(ArgumentError, match="x: got shape"):
            layer(torch.randn(shape))


@pytest.mark.parametrize("cls", [SparseConv2d, QuantConv2d, SparseLinear, QuantLinear])
def test_from_float_takes_only_what_it_computes(cls: type) -> None:
    class Doubles(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    own = (nn.Linear(3, 4),) if "Conv" in cls.__name__ else (nn.Conv2d(3, 4, 1), nn.Bilinear(3, 3, 4))
    for layer in (nn.ConvTranspose2d(3, 4, 1), nn.Conv3d(3, 4, 1), nn.ReLU(), Doubles(3, 4, 1), 3, *own):
        args = (QuantSpec(1.0, torch.uint8),) if "Quant" in cls.__name__ else ()
        with pytest.raises(ArgumentError, match="got .*expected a torch.nn"):
            cls.from_float(layer, *args)


def _convs_and_norm() -> nn.Sequential:
    """Dense, sparse and kept layers in turn."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Sigmoid(), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 4, 2),
        nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(100, 5),
    )  # fmt: skip
    mask_weights(model[2], 0.9)
    return model.eval()


@pytest.mark.parametrize("quantized", [False, True])
def test_autocast_leaves_our_layers_in_their_precision(quantized: bool) -> None:
    model, x = _convs_and_norm(), torch.randn(2, 3, 8, 8)
    if quantized:
        cnncomp.quantize(model, [x], exclude="0", progress=False)
    fast = cnncomp.convert(model, x, measure=False)
    assert {type(m) for m in fast.modules()} & {SparseConv2d, QuantConv2d}
    for _ in range(3):  # also once the calls are recorded
        expected = fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x).float(), expected, rtol=0.05, atol=0.05)
    seen: list[torch.dtype] = []
    for m in fast.modules():
        if isinstance(m, ConvertedLayer):
            m.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        got = fast(x)
    assert seen and torch.bfloat16 not in seen
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)  # the transposed convolution is torch's
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        fast = cnncomp.convert(model, x, measure=False)  # converting inside it is the same
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), got, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("quantized", [False, True])
def test_casting_a_converted_model_changes_nothing(cast: str, quantized: bool) -> None:
    model, x = _convs_and_norm(), torch.randn(2, 3, 8, 8)
    if quantized:
        cnncomp.quantize(model, [x], exclude="0", progress=False)
    fast = cnncomp.convert(model, x, measure=False)
    expected = fast(x)
    assert torch.equal(getattr(fast, cast)()(x), expected)
    assert torch.equal(nn.Sequential(fast).to(getattr(torch, cast, torch.float16))(x), expected)
    with pytest.raises(DtypeError, match="float32"):
        fast(getattr(x, cast)())
