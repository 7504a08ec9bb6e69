"""Choosing on a GPU: half precision is what int8 kernels have to beat where the user allows it, and Triton's kernels are timed
beside the others. The device is played by the CPU, and times are given."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import cnncomp
from cnncomp.convert import Conversion, ConvertedModel
from cnncomp.dispatch import Plan, choose, modelled
from cnncomp.dispatch import network as planning
from cnncomp.dispatch.network import NetworkPlanner
from cnncomp.dispatch.plan import LayerPlan
from cnncomp.errors import ArgumentError, DtypeError
from cnncomp.graph import trace
from cnncomp.nn import Clamp, ConvertedLayer, DenseConv2d, DenseLinear
from cnncomp.nn.base import Geometry
from cnncomp.nn.dense import HALF_KERNELS
from cnncomp.ops import conv2d_int8, cuda

X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
GPU = torch.device("cuda")
DENSE = {"dense.nchw": 1.0, "dense.channels_last": 1.0, "dense.linear": 1.0}
HALF = {"dense.fp16": 0.1, "dense.bf16": 0.2}


class Net(nn.Module):
    """Convolutions with a pool, a residual and a linear layer between and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.a(x).relu())
        return self.fc((self.c(self.b(x).relu()) + x).relu().flatten(1))


@pytest.fixture(autouse=True)
def _a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors stay on the CPU; of a GPU there is what dispatch asks for."""
    torch.manual_seed(0)
    monkeypatch.setattr(planning, "device_key", str)
    monkeypatch.setattr(modelled, "arch_of", lambda device: "sm_80")
    noise = choose._noise
    monkeypatch.setattr(choose, "_noise", lambda shape, device: noise(shape, torch.device("cpu")))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the seconds of each kernel, after it has run once; of conversions and networks too, 0.001 where none are given."""

    def give(seconds: Mapping[str, float]) -> None:
        def interleaved(fns: Mapping[str, Callable[[], object]], **rest: Any) -> dict[str, float]:
            assert rest["cuda"]
            for fn in fns.values():
                fn()
            return {name: seconds.get(name, 0.001) for name in fns}

        for module in (choose, planning):
            monkeypatch.setattr(module, "interleaved", interleaved)

    return give


def planner(net: nn.Module, float_dtype: torch.dtype = torch.float32) -> NetworkPlanner:
    return NetworkPlanner(trace(net, (X,)), (X,), GPU, float_dtype)


def quantized(net: nn.Module) -> nn.Module:
    return cnncomp.quantize(net, [X], progress=False).eval()


def kernels(plan: Plan) -> list[str]:
    return [layer.kernel for layer in plan.layers.values()]


def rounded(net: nn.Module, dtype: torch.dtype) -> Tensor:
    """What torch makes of the network in half precision."""
    out: Tensor = net.to(dtype)(X.to(dtype))
    return out.float()


@pytest.mark.parametrize("kernel", HALF_KERNELS)
@pytest.mark.parametrize("bound", [math.inf, 0.5, tuple(torch.linspace(0.1, 0.8, 6).tolist())])
def test_conv(kernel: str, bound: Any) -> None:
    dtype = HALF_KERNELS[kernel]
    conv, residual = nn.Conv2d(8, 6, 3, stride=2, padding=1), torch.randn(2, 6, 4, 4)
    layer = DenseConv2d(Geometry.of(conv), conv.weight, conv.bias, Clamp(0.0, bound), kernel)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    expected = conv.to(dtype)(X.to(dtype)).float() + residual
    expected = expected.clamp(0).minimum(torch.as_tensor(bound).view(-1, 1, 1))
    for x in (X, X.to(dtype)):
        out = layer(x, residual)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    layer.float_dtype = dtype
    assert layer(X, residual).dtype == dtype and layer(X, residual[:1]).dtype == dtype
    assert torch.equal(layer(X, residual), out.to(dtype))  # bounds are float32
    torch.compiler.reset()  # layers of other tests count as the same code
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(X, residual), layer(X, residual))


@pytest.mark.parametrize("kernel", HALF_KERNELS)
def test_linear(kernel: str) -> None:
    dtype = HALF_KERNELS[kernel]
    linear, x = nn.Linear(8, 6), torch.randn(3, 8)
    layer = DenseLinear(linear.weight, linear.bias, Clamp(0.0), kernel)
    assert torch.equal(layer(x), linear.to(dtype)(x.to(dtype)).relu().float())
    with pytest.raises(DtypeError):
        layer(x.double())
    with pytest.raises(DtypeError):
        layer.with_kernel("dense.linear")(x.to(dtype))


@pytest.mark.parametrize("kernel", HALF_KERNELS)
def test_a_network_in_half_precision(kernel: str, timed: Callable[..., None]) -> None:
    """Half precision is handed on through the pool and to the residual; the outputs are floats."""
    dtype, net = HALF_KERNELS[kernel], Net().eval()
    timed(DENSE | HALF)
    found = planner(net, dtype)
    plan = found.measure(lambda name: None)
    assert kernels(plan) == [kernel] * 4 and plan.float_dtype == str(dtype).removeprefix("torch.")
    given = {
        name: m.float_dtype for name, m in found.module.named_children() if isinstance(m, (DenseConv2d, DenseLinear))
    }
    assert given == {"a": dtype, "b": dtype, "c": dtype, "fc": torch.float32}
    out = found.module(X)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, rounded(net, dtype), rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_half_precision_is_not_taken_unasked_but_named(timed: Callable[..., None]) -> None:
    timed(DENSE | HALF | {"conv2d_int8": 0.5, "linear_int8": 0.5, "converted": 0.6, "dense": 1.0})
    plan = planner(quantized(Net())).measure(lambda name: None)
    assert kernels(plan) == ["conv2d_int8"] * 3 + ["linear_int8"]
    assert plan.layers["a"].reason == "2.00× faster than dense, 0.20× fp16, 0.40× bf16"
    assert plan.layers["a"].ms["dense.fp16"] == 100
    assert plan.network_ms == {"dense": 1000, "converted": 600, "dense.fp16": 100, "dense.bf16": 200}


def test_int8_has_to_beat_the_half_precision_that_is_allowed(timed: Callable[..., None]) -> None:
    net = quantized(Net())
    timed(DENSE | HALF | {"conv2d_int8": 0.15, "linear_int8": 0.05})
    plan = planner(net, torch.float16).measure(lambda name: None)
    assert kernels(plan) == ["dense.fp16"] * 3 + ["linear_int8"]
    assert plan.layers["a"].reason == "conv2d_int8 is 0.67× dense here"
    plan = planner(net, torch.bfloat16).measure(lambda name: None)
    assert kernels(plan) == ["conv2d_int8"] * 3 + ["linear_int8"]
    assert plan.layers["a"].reason == "1.33× faster than dense, 0.67× fp16"


@pytest.mark.parametrize(
    ("int8", "given"), [("b", {"a": torch.float16}), ("c", {"a": torch.float32, "b": torch.float16})]
)
def test_int8_layers_quantise_half_precision(
    int8: str, given: dict[str, torch.dtype], timed: Callable[..., None]
) -> None:
    """Not what they add: int8 kernels with sparse weights take no residual in half precision."""
    net = quantized(Net())
    found = planner(net, torch.float16)
    seconds = DENSE | HALF | {"conv2d_int8": 0.15, "linear_int8": 0.15}
    timed({"converted": 0.0})
    plan = found.settle_by({n: seconds | ({"conv2d_int8": 0.01} if n == int8 else {}) for n in found.names})
    assert {n for n, layer in plan.layers.items() if layer.kernel == "conv2d_int8"} == {int8}
    assert {name: found.module.get_submodule(name).float_dtype for name in given} == given
    torch.testing.assert_close(found.module(X), net(X), rtol=0, atol=0.05)


def test_changes_of_precision_cost(timed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer that is faster in half precision, among others that are not, pays for both conversions."""
    for conversion, kernel in ((0.3, "dense.fp16"), (0.5, "dense.channels_last")):
        net = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))).eval()
        chooser = planner(net, torch.float16).choosers[0]
        monkeypatch.setattr(chooser, "_conversion", lambda n, src, dst, s, t=conversion: 0.0 if src == dst else t)
        for number, options in enumerate(chooser.options.values()):
            for option in options:
                half = {"dense.fp16": 0.2 if number == 1 else 3.0, "dense.bf16": 0.0, "dense.nchw": 2.0}
                option.seconds = half.get(option.candidate.kernel, 1.0)
        found = [option.candidate.kernel for option in chooser.cheapest().values()]
        assert found == ["dense.channels_last", kernel, "dense.channels_last"]


def test_without_measurement() -> None:
    net = Net().eval()
    assert kernels(planner(net, torch.bfloat16).rule_of_thumb()) == ["dense.bf16"] * 4
    assert set(kernels(planner(net).rule_of_thumb())) == {"dense.nchw", "dense.linear"}
    assert kernels(planner(quantized(net), torch.float16).rule_of_thumb())[:3] == ["conv2d_int8"] * 3


def test_plans_say_what_was_allowed() -> None:
    net = Net().eval()
    plan = planner(net, torch.float16).rule_of_thumb()
    again = Plan.from_json(plan.to_json())
    assert again == plan and planner(net, torch.float16).replay(again) == plan
    assert planner(net).key != planner(net, torch.float16).key
    with pytest.raises(ArgumentError, match="float_dtype: got float64"):
        Plan.from_json(plan.to_json().replace('"float16"', '"float64"'))


def test_saved_and_loaded(tmp_path: Path) -> None:
    """On the machine that loads it, the same kernels: half precision runs on a CPU, too."""
    found = planner(Net().eval())
    plan = found.replay(Plan("cpu", found.key, {name: LayerPlan("dense.fp16") for name in found.names}))
    model = ConvertedModel(found.module, Conversion(plan, {}, [([2, 8, 8, 8], "float32")])).eval()
    cnncomp.save(model, tmp_path / "net.cnncomp")
    loaded = cnncomp.load(tmp_path / "net.cnncomp", replan=False)
    layers = {name: m.float_dtype for name, m in loaded.network.named_children() if isinstance(m, DenseConv2d)}
    assert layers == dict.fromkeys("abc", torch.float16) and torch.equal(loaded(X), model(X))
    assert loaded.network.a.weight.dtype == torch.float16
    planned = cnncomp.load(tmp_path / "net.cnncomp", replan=True)
    torch.testing.assert_close(planned(X), model(X), rtol=0, atol=0.01)


def test_converted_again_in_float32() -> None:
    """The weights stay rounded; an int8 layer's are the same integers."""
    net = quantized(Net())
    found = planner(net)
    found.replay(Plan("", "", {name: LayerPlan("dense.bf16") for name in found.names}))
    again = cnncomp.convert(found.module, X, measure=False)
    kinds = {name: layer.kernel for name, layer in again.plan.layers.items()}
    assert kinds == {"a": "conv2d_int8", "b": "conv2d_int8", "c": "conv2d_int8", "fc": "linear_int8"}
    once = cnncomp.convert(net, X, measure=False)
    for name in "abc":
        weights = [m.network.get_submodule(name).weight for m in (once, again)]
        assert torch.equal(*weights)
    floats = planner(Net())
    floats.replay(Plan("", "", {name: LayerPlan("dense.bf16") for name in floats.names}))
    model = cnncomp.convert(floats.module, X, measure=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model(X), floats.module(X), rtol=0, atol=0.05)


def test_profile_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = importlib.import_module("cnncomp.profile")  # a function of the package has its name

    def interleaved(fns: Mapping[str, Callable[[], object]], **rest: Any) -> dict[str, float]:
        for fn in fns.values():
            fn()
        return {name: (DENSE | HALF | {"layer": 0.05}).get(name, 9.0) for name in fns}

    monkeypatch.setattr(profile, "interleaved", interleaved)
    found = planner(quantized(Net()))
    found.rule_of_thumb()
    times = {name: profile._time(m, (X,), True) for name, m in found.module.named_children() if name == "a"}
    assert times == {"a": (0.05, 1.0, 0.1)}
    found.replay(Plan("", found.key, {name: LayerPlan("dense.fp16") for name in found.names}))
    assert profile._time(found.module.a, (X,), True) == (0.05, 1.0, 0.1)
    row = profile.LayerProfile("a", "", "", "", "", 50.0, 20.0, 2.0, 0.1, "")
    assert "× half" in str(profile.ProfileReport("cuda", [row], 1.0, 0.1))
    row.ratio_half = math.nan
    assert "× half" not in str(profile.ProfileReport("cpu", [row], 1.0, 0.1))


@pytest.mark.parametrize("twin", ["", ".triton"])
def test_a_compiler_takes_a_network_for_a_gpu_as_one_graph(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors are the GPU's, without memory: nothing runs, but shapes, dtypes and devices have to agree."""
    monkeypatch.setattr(cuda, "has_both", lambda device: True)
    found = planner(quantized(Net()))
    names = {name: f"{'linear' if name == 'fc' else 'conv2d'}_int8{twin}" for name in found.names}
    found.replay(Plan("", "", {name: LayerPlan(kernel) for name, kernel in names.items()}))
    graphs = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    def fake(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=GPU)

    torch.compiler.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in found.module.modules():
            for name, t in [*module._parameters.items(), *module._buffers.items()]:
                owner = module._parameters if name in module._parameters else module._buffers
                owner[name] = (
                    nn.Parameter(fake(t), False) if isinstance(t, nn.Parameter) else t if t is None else fake(t)
                )
        out = torch.compile(found.module, backend=backend, fullgraph=True)(fake(X))
    assert out.device.type == "cuda" and out.shape == (2, 5) and out.dtype == torch.float32
    called = [n.target for n in graphs[0].graph.nodes if n.op == "call_function"]
    assert len(graphs) == 1
    for kernel, count in ((names["a"], 3), (names["fc"], 1)):
        assert called.count(getattr(torch.ops.cnncomp, kernel.replace(".", "_"))) == count


def test_other_dtypes() -> None:
    with pytest.raises(ArgumentError, match="float_dtype"):
        cnncomp.convert(Net(), X, float_dtype=torch.float64)


def test_tritons_kernels_are_timed_where_there_are_others_too(
    timed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    net = quantized(Net())
    twins = {"conv2d_int8.triton": 0.04, "linear_int8.triton": 0.07}
    timed(DENSE | HALF | {"conv2d_int8": 0.05, "linear_int8": 0.05} | twins)
    plan = planner(net).measure(lambda name: None)
    assert not twins.keys() & plan.layers["a"].ms.keys()  # there are none
    monkeypatch.setattr(cuda, "has_both", lambda device: True)
    found = planner(net)
    plan = found.measure(lambda name: None)
    assert kernels(plan) == ["conv2d_int8.triton"] * 3 + ["linear_int8"]
    assert plan.layers["a"].reason.startswith("25.00× faster than dense")
    assert set(kernels(planner(net).rule_of_thumb())) == {"conv2d_int8", "linear_int8"}
    other = planner(net)
    other.replay(
        Plan("", "", {name: LayerPlan("linear_int8.triton" if name == "fc" else "conv2d_int8") for name in found.names})
    )
    assert torch.equal(found.module(X), other.module(X))
    plan = found.replay(Plan("", "", plan.layers))
    cnncomp.save(ConvertedModel(found.module, Conversion(plan, {}, [([2, 8, 8, 8], "float32")])), tmp_path / "net")
    loaded = cnncomp.load(tmp_path / "net")  # planned again on a CPU, by the rule of thumb as this one
    assert torch.equal(loaded(X), found.module(X))
    assert {m.kernel for m in loaded.network.modules() if isinstance(m, ConvertedLayer)} == {
        "conv2d_int8",
        "linear_int8",
    }


def test_tritons_sparse_kernels_are_timed_where_there_are_others_too(
    timed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wide(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(8, 96, 1), nn.ReLU(), nn.Conv2d(96, 64, 3), nn.Flatten(), nn.Linear(64 * 36, 64))
            with torch.no_grad():
                self[2].weight[:, 16:] = 0
                self[4].weight[:, 100:] = 0

    net = quantized(Wide())
    sparse = {f"{op}_{name}_int8" for op in ("conv2d", "linear") for name in ("blocks", "vectors")}
    twins, dense = {f"{kernel}.triton" for kernel in sparse}, {"conv2d_int8", "linear_int8"}
    fast = {"conv2d_blocks_int8.triton": 0.01, "linear_vectors_int8.triton": 0.01}
    timed(DENSE | HALF | dict.fromkeys(sparse | twins | dense | {f"{kernel}.triton" for kernel in dense}, 0.05) | fast)
    plan = planner(net).measure(lambda name: None)
    found = {kernel for layer in plan.layers.values() for kernel in layer.ms}
    assert sparse <= found and not twins & found  # they would be the same kernels
    monkeypatch.setattr(cuda, "has_both", lambda device: True)
    both = planner(net)
    plan = both.measure(lambda name: None)
    assert twins <= {kernel for layer in plan.layers.values() for kernel in layer.ms}
    assert kernels(plan)[1:] == list(fast)
    expected = planner(net)
    plain = zip(plan.layers, ("conv2d_int8", "conv2d_int8", "linear_int8"), strict=True)
    expected.replay(Plan("", "", {name: LayerPlan(kernel) for name, kernel in plain}))
    assert torch.equal(both.module(X), expected.module(X))
    monkeypatch.setattr(modelled, "gain", lambda *args: 2.0)  # of CUDA C++: it says nothing of Triton's
    assert set(kernels(planner(net).rule_of_thumb())).isdisjoint(twins)


def test_which_devices_have_both(monkeypatch: pytest.MonkeyPatch) -> None:
    for built, triton, capability, both in (
        (True, True, (8, 0), True), (False, True, (9, 0), False), (True, False, (9, 0), False), (True, True, (7, 5), False),
    ):  # fmt: skip
        monkeypatch.setattr(cuda, "_cuda", SimpleNamespace(supports=lambda index: True) if built else None)
        monkeypatch.setattr(cuda, "available", lambda triton=triton: triton)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert cuda.has_both.__wrapped__(torch.device("cuda", 0)) == both
    assert not cuda.has_both(torch.device("cpu"))


def test_the_twins_launch_tritons_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    for module, name in (("conv2d_int8", "conv2d_int8"), ("gemm_int8", "linear_int8")):
        fake = SimpleNamespace(**{name: lambda *args, name=name: launched.append((name, len(args)))})
        monkeypatch.setitem(sys.modules, f"cnncomp.kernels.{module}", fake)
    monkeypatch.setattr(cuda, "backend", lambda device: "cuda")
    x, constants, rest = torch.zeros(1, 4, 3, 3, dtype=torch.uint8), torch.zeros(3, 2), (None, 1.0, 0.0)
    weight, where = torch.zeros(2, 1, 1, 4, dtype=torch.int8), ((1, 1), (1, 1), (0, 0), (1, 1), 1, torch.uint8)
    conv2d_int8._conv_cuda(x, weight, constants, *rest, *where, triton=True)
    conv2d_int8._linear_cuda(x[0, :, 0, 0], weight[:, 0, 0], constants, *rest, torch.uint8, triton=True)
    assert launched == [("conv2d_int8", 13), ("linear_int8", 9)]
