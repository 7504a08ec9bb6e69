"""Networks whose int8 layers hand over 8 bit through what lies between them: SiLU and hardswish, concatenation, max-pool in
ceil mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnncomp
from cnncomp.dispatch.candidates import options_for
from cnncomp.executor import Recording
from cnncomp.graph import fuse as fusing
from cnncomp.graph import trace
from cnncomp.graph.chain import output_specs
from cnncomp.nn import Activation, ConcatChannels, ConvertedLayer, DenseConv2d, DenseLinear, QuantConv2d, QuantLinear
from tests.helpers import mask_weights, randomize_norms, reference_conv


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class ConvNorm(nn.Sequential):
    def __init__(
        self, c: int, k: int, size: int, act: type[nn.Module] | None, stride: int = 1, groups: int = 1
    ) -> None:
        norm = nn.BatchNorm2d(k)
        conv = nn.Conv2d(c, k, size, stride, size // 2, groups=groups, bias=False)
        super().__init__(conv, norm, *([] if act is None else [act()]))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.pool, self.down, self.up = nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c // 4, 1), nn.Conv2d(c // 4, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.up(F.relu(self.down(self.pool(x)))))


class Block(nn.Module):
    """An inverted residual of MobileNetV3 (Howard et al., 2019)."""

    def __init__(self, c: int, k: int, size: int, act: type[nn.Module], stride: int, gated: bool) -> None:
        super().__init__()
        hidden = 4 * c
        self.expand = ConvNorm(c, hidden, 1, act)
        self.depthwise = ConvNorm(hidden, hidden, size, act, stride, hidden)
        self.gate = Gate(hidden) if gated else nn.Identity()
        self.project = ConvNorm(hidden, k, 1, None)
        self.same = stride == 1 and c == k

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.gate(self.depthwise(self.expand(x))))
        return x + y if self.same else y


class SmallMobileNetV3(nn.Module):
    def __init__(self, act: type[nn.Module] = nn.Hardswish) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 16, 3, act, 2)
        self.blocks = nn.Sequential(
            Block(16, 24, 3, act, 2, False),
            Block(24, 24, 5, act, 1, True),
            Block(24, 40, 5, act, 2, True),
            Block(40, 40, 3, act, 1, False),
        )
        self.last, self.pool = ConvNorm(40, 96, 1, act), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(nn.Linear(96, 64), act(), nn.Dropout(0.2), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.last(self.blocks(self.stem(x)))).flatten(1))


class Fire(nn.Module):
    """Of SqueezeNet (Iandola et al., 2016)."""

    def __init__(self, c: int, k: int) -> None:
        super().__init__()
        self.squeeze, self.one = nn.Conv2d(c, k // 4, 1), nn.Conv2d(k // 4, k // 2, 1)
        self.three = nn.Conv2d(k // 4, k // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


class Inception(nn.Module):
    """Of GoogLeNet (Szegedy et al., 2015)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.one, self.pool = nn.Conv2d(c, 16, 1), nn.MaxPool2d(3, 1, 1, ceil_mode=True)
        self.three = nn.Sequential(nn.Conv2d(c, 8, 1), nn.ReLU(), nn.Conv2d(8, 24, 3, padding=1))
        self.pooled = nn.Conv2d(c, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.one(x), self.three(x), self.pooled(self.pool(x))]
        return torch.cat([F.relu(t) for t in parts], 1)


def squeezenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(24, 32), Fire(32, 48),
        nn.MaxPool2d(3, 2, ceil_mode=True), Fire(48, 64), nn.Conv2d(64, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def googlenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), Inception(24), Inception(48),
        nn.MaxPool2d(3, 2, ceil_mode=True), Inception(48), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


X = torch.randn(2, 3, 37, 41, generator=torch.Generator().manual_seed(1))


def quantized(model: nn.Module, **options: object) -> nn.Module:
    randomize_norms(model).eval()
    return cnncomp.quantize(model, [torch.randn(4, 3, 37, 41) for _ in range(2)], progress=False, **options)  # type: ignore[arg-type]


def convert(model: nn.Module) -> cnncomp.ConvertedModel:
    return cnncomp.convert(model, X, measure=False, progress=False)


def layers_of(model: nn.Module) -> dict[str, ConvertedLayer]:
    return {m.info.name: m for m in model.modules() if isinstance(m, ConvertedLayer)}


def check_layers(fast: nn.Module) -> Counter[torch.dtype]:
    """Each convolution's output is the reference's; how many gave each dtype."""
    checked: Counter[torch.dtype] = Counter()

    def check(layer: QuantConv2d, args: tuple[Tensor, ...], out: Tensor) -> None:
        assert torch.equal(out, reference_conv(layer, *args)), layer.info.name
        checked[out.dtype] += 1

    handles = [m.register_forward_hook(check) for m in fast.modules() if isinstance(m, QuantConv2d)]
    fast.network(X)  # type: ignore[operator]
    for handle in handles:
        handle.remove()
    return checked


@pytest.mark.parametrize("act", [nn.Hardswish, nn.SiLU])
def test_a_network_of_hardswish_or_silu(act: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    if act is nn.SiLU:  # as for a GPU
        assert fusing._worth_fusing("silu", torch.device("cuda"))
        monkeypatch.setattr(fusing, "_worth_fusing", lambda name, device: bool(name))
    model = quantized(SmallMobileNetV3(act))
    fast, name = convert(model), act.__name__.lower()
    layers = layers_of(fast)
    ending = {
        n for n, layer in layers.items() if isinstance(layer, (QuantConv2d, QuantLinear)) and layer.nonlinearity == name
    }
    blocks = {f"blocks.{i}.{part}.0" for i in range(4) for part in ("expand", "depthwise")}
    assert ending == {"stem.0", "last.0", "head.0", *blocks}
    left = [m.kind for m in fast.modules() if isinstance(m, Activation)]
    assert left == ["hardsigmoid"] * 2, "of the gates alone"
    out = {n: getattr(layer, "out_dtype", None) for n, layer in layers.items()}
    floats = {
        "blocks.1.depthwise.0",
        "blocks.2.depthwise.0",
        "last.0",
        "head.3",
    }  # read by a gate, by a mean, or given back
    gates = {f"blocks.{i}.gate.up" for i in (1, 2)}
    assert {n for n, dtype in out.items() if dtype == torch.float32} == floats | gates
    assert out["blocks.0.expand.0"] == torch.int8, "its output has both signs"
    assert all(f"{name}" in str(layers[n]) for n in ending)
    assert check_layers(fast)[torch.int8] >= 10
    with torch.no_grad():
        expected = model(X)
    assert F.cosine_similarity(fast(X), expected).min() > 0.998
    for _ in range(3):  # recorded the second time
        assert torch.equal(fast(X), fast.network(X))


def test_the_step_behind_a_nonlinearity_is_the_one_calibrated_there() -> None:
    model = quantized(SmallMobileNetV3())
    layers = layers_of(convert(model))
    for i in (0, 3):
        first, second = layers[f"blocks.{i}.expand.0"], layers[f"blocks.{i}.depthwise.0"]
        assert isinstance(first, QuantConv2d) and isinstance(second, QuantConv2d)
        quantizer = model.get_submodule(f"blocks.{i}.depthwise.0").input_quantizer
        assert first.output == second.input and second.input.scale == quantizer.scale.item()


def test_silu_on_a_cpu_stays_a_kernel_for_floats() -> None:
    fast = convert(quantized(SmallMobileNetV3(nn.SiLU)))
    assert not any(getattr(m, "nonlinearity", "") for m in fast.modules())
    assert sum(isinstance(m, Activation) and m.kind == "silu" for m in fast.modules()) == 11


def test_float_layers_leave_activations_alone() -> None:
    fast = convert(SmallMobileNetV3().eval())
    assert not any(getattr(m, "nonlinearity", "") for m in fast.modules())
    assert sum(isinstance(m, Activation) for m in fast.modules()) == 13


@pytest.mark.parametrize(
    "kernel", ["dense.nchw", "dense.channels_last", "dense.fused", "dense.depthwise", "dense.direct"]
)
def test_float_kernels_of_a_quantised_layer(kernel: str) -> None:
    """Which dispatch takes where int8 is no faster: the same function, also in a recorded network, and in files."""
    model = quantized(SmallMobileNetV3())
    traced = trace(model, (X,))
    with torch.no_grad():
        expected = traced.module(X)
    changed = 0
    for name, layer in traced.module.named_modules():
        if not isinstance(layer, (DenseConv2d, DenseLinear)):
            continue
        for option in options_for(layer, "cpu")[0]:
            if option.candidate.kernel == kernel:
                traced.module.set_submodule(name, option.layer)
                changed += 1
    assert changed >= (4 if kernel == "dense.depthwise" else 10)
    with torch.no_grad():
        torch.testing.assert_close(traced.module(X), expected, rtol=1e-4, atol=1e-4)
    recorded = Recording(traced.graphs[""], (X,))
    torch.testing.assert_close(recorded.run((X,)), expected, rtol=1e-4, atol=1e-4)
    layer = traced.module.get_submodule("blocks.0.depthwise.0" if kernel == "dense.depthwise" else "blocks.0.expand.0")
    assert isinstance(layer, DenseConv2d) and layer.nonlinearity == "hardswish" and layer.kernel == kernel
    again = DenseConv2d.build(layer.config(), layer.tensors())
    x = torch.randn(1, layer.geometry.in_channels, 7, 7)
    assert torch.equal(again(x), layer(x)) and again.config() == layer.config()
    residual = torch.randn(1, layer.geometry.out_channels, 1, 1)
    whole = residual.expand_as(layer(x)).contiguous()
    torch.testing.assert_close(layer(x, residual), layer(x, whole))
    torch.testing.assert_close(
        layer(x, whole), F.hardswish(DenseConv2d(layer.geometry, layer.weight, layer.bias)(x) + whole)
    )


def test_saved_and_planned_again(tmp_path) -> None:
    fast = convert(quantized(SmallMobileNetV3()))
    cnncomp.save(fast, tmp_path / "net.cnnc")
    loaded = cnncomp.load(tmp_path / "net.cnnc")
    again = convert(fast)
    assert torch.equal(loaded(X), fast(X)) and torch.equal(again(X), fast(X))


def test_sparse_int8_layers_end_in_it_too() -> None:
    model = quantized(mask_weights(SmallMobileNetV3(), 0.9))
    fast = convert(model)
    sparse = [
        m for m in fast.modules() if isinstance(m, QuantConv2d) and ("sparse" in m.kernel or "scattered" in m.kernel)
    ]
    assert len(sparse) >= 6 and sum(m.nonlinearity == "hardswish" for m in sparse) >= 4
    check_layers(fast)
    with torch.no_grad():
        expected = model(X)
    assert F.cosine_similarity(fast(X), expected).min() > 0.998
    assert torch.equal(fast(X), fast(X))


@pytest.mark.parametrize("build", [squeezenet, googlenet])
@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_networks_with_concatenations(build: Callable[[], nn.Module], method: str) -> None:
    model = quantized(build(), method=method)
    fast = convert(model)
    checked = check_layers(fast)
    joined = [n for n in fast.network.graph.nodes if n.op == "call_module"]  # type: ignore[union-attr]
    outputs: list[Tensor] = []
    for node in joined:
        module = fast.network.get_submodule(str(node.target))  # type: ignore[operator]
        if isinstance(module, ConcatChannels):
            module.register_forward_hook(lambda m, args, out: outputs.append(out))
    fast.network(X)  # type: ignore[operator]
    # The last one of each network is read by a mean, or by a layer.
    floats = 1 if build is googlenet else 0
    assert [t.dtype for t in outputs] == [torch.uint8] * (len(outputs) - floats) + [torch.float32] * floats
    assert len(outputs) == 3 and checked[torch.float32] == (4 if build is googlenet else 1) - (build is googlenet)
    with torch.no_grad():
        expected = model(X)
    assert F.cosine_similarity(fast(X), expected).min() > 0.998
    for _ in range(2):
        assert torch.equal(fast(X), fast.network(X))  # type: ignore[operator]


class Joined(nn.Module):
    """Concatenations that can't all be in 8 bit."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(3))
        self.d, self.e = nn.Conv2d(16, 8, 1), nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        if self.kind == "twice":
            return self.d(torch.cat([a, a], 1)) + b
        both = torch.cat([a, b], 1)
        if self.kind == "float beside":  # an input that no layer gives
            return self.d(both) + self.e(torch.cat([both, torch.tanh(self.c(x))], 1))
        if self.kind == "nested":
            return self.e(torch.cat([both, self.c(x)], 1))
        return self.d(both) + both.mean((1, 2, 3), keepdim=True)  # read by floats


@pytest.mark.parametrize("kind", ["float beside", "nested", "twice", "read by floats"])
def test_concatenations_are_in_8_bit_as_a_whole_or_not(kind: str) -> None:
    model = quantized(Joined(kind))
    fast = convert(model)
    layers = layers_of(fast)
    out = {n: layer.output for n, layer in layers.items() if isinstance(layer, QuantConv2d)}
    if kind == "nested":
        assert out["a"] == out["b"] == out["c"] == layers["e"].input
    elif kind == "twice":
        assert out["a"] == layers["d"].input and out["b"] is None
    else:
        assert out["a"] is out["b"] is None
    check_layers(fast)
    with torch.no_grad():
        expected = model(X)
    assert F.cosine_similarity(fast(X).flatten(1), expected.flatten(1)).min() > 0.998


def test_a_layer_behind_a_max_pool_shares_the_step_of_those_before_it() -> None:
    net = quantized(googlenet())
    scales = {name: m.input_quantizer.scale.item() for name, m in net.named_modules() if hasattr(m, "input_quantizer")}
    for i in (3, 4, 6):
        assert scales[f"{i}.one"] == scales[f"{i}.three.0"] == scales[f"{i}.pooled"]
    plain = cnncomp.quantize(googlenet().eval(), [X], exclude=["*.one", "*.three.0"], progress=False)
    assert plain.get_submodule("3.pooled").input_quantizer.scale.item() > 0, "nobody reads before the pool"


def test_the_concatenated_layers_agree_before_a_layer_is_chosen() -> None:
    """One of them in float: then all give floats."""
    traced = trace(quantized(squeezenet()), (X,))
    gm = traced.graphs[""]
    nodes = {str(n.target): n for n in gm.graph.nodes if n.op == "call_module"}

    def specs(float_layer: str) -> set[str]:
        def input_spec(node):
            module = gm.get_submodule(str(node.target))
            return None if node is nodes.get(float_layer) else getattr(getattr(module, "info", None), "input", None)

        return {str(n.target) for n in output_specs(gm, input_spec)}

    every, fewer = specs(""), specs("3.three")
    assert {"3.one", "3.three", "4.one", "4.three"} <= every
    assert not {"3.one", "3.three"} & fewer and {"4.one", "4.three"} <= fewer
