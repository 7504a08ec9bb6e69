"""Tracing, fusion, choice and conversion, end to end on real networks. Nothing here depends on a measured choice."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnncomp
from cnncomp.dispatch import LayerPlan, Plan
from cnncomp.dispatch.candidates import options_for
from cnncomp.errors import ArgumentError, DeviceError
from cnncomp.nn import Clamp, ConvertedLayer, DenseConv2d, DenseLinear, QuantConv2d, QuantLinear, SparseConv2d
from cnncomp.nn.dense import CONV_KERNELS, DEPTHWISE_KERNEL, OWN_KERNELS
from tests.helpers import mask_weights, randomize_norms, reference_conv

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _layers(model: nn.Module) -> dict[str, ConvertedLayer]:
    return {m.info.name: m for m in model.modules() if isinstance(m, ConvertedLayer)}


def _convert(model: nn.Module, x: object = X, **kwargs: object) -> cnncomp.ConvertedModel:
    return cnncomp.convert(model, x, measure=False, **kwargs)


def _close(fast: nn.Module, model: nn.Module, x: Tensor = X, tol: float = 1e-4) -> None:
    with torch.no_grad():
        expected = model.eval()(x)
    assert (fast(x) - expected).abs().max() <= tol * max(1.0, float(expected.abs().max()))


NETWORKS = {
    "mobilenet_v2": lambda: cnncomp.models.mobilenet_v2(num_classes=10, width_mult=0.25),
    "resnet18": lambda: cnncomp.models.resnet18(num_classes=10),
    "concat": cnncomp.models.ConcatNet,
    "article": cnncomp.models.ArticleNet,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_dense_conversion_keeps_the_function(name: str) -> None:
    model = randomize_norms(NETWORKS[name]()).eval()
    before = copy.deepcopy(model.state_dict())
    fast = _convert(model)
    _close(fast, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.ReLU, nn.ReLU6)) for m in fast.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_prune_then_fold_then_convert(name: str) -> None:
    model = cnncomp.prune(randomize_norms(NETWORKS[name]()), sparsity=0.9).eval()
    fast = _convert(model)
    assert any(isinstance(m, SparseConv2d) for m in fast.modules())
    _close(fast, model)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_int8_network_predicts_like_its_simulation(name: str, sparsity: float) -> None:
    model = randomize_norms(NETWORKS[name]())
    if sparsity:
        cnncomp.prune(model, sparsity=sparsity)
    cnncomp.quantize(model.eval(), [torch.randn(4, 3, 32, 32) for _ in range(3)], progress=False)
    fast = _convert(model)
    kinds = Counter(type(m).__name__ for m in fast.modules() if isinstance(m, ConvertedLayer))
    assert not kinds["DenseConv2d"] and sum(isinstance(m, QuantConv2d) for m in fast.modules()) >= 2
    with torch.no_grad():
        expected = model(X)
    assert F.cosine_similarity(fast(X), expected).min() > 0.995


def test_every_int8_layer_of_a_network_is_bit_equal_to_the_reference() -> None:
    model = randomize_norms(cnncomp.models.resnet18(num_classes=10)).eval()
    cnncomp.quantize(model, [torch.randn(4, 3, 32, 32)], progress=False)
    fast = _convert(model)
    checked = Counter()

    def check(layer: QuantConv2d, args: tuple[Tensor, ...], out: Tensor) -> None:
        residual = args[1] if len(args) > 1 else None
        assert torch.equal(out, reference_conv(layer, args[0], residual))
        checked[(args[0].dtype, None if residual is None else residual.dtype, out.dtype)] += 1

    for m in fast.modules():
        if isinstance(m, QuantConv2d):
            m.register_forward_hook(check)
    fast(X)
    assert sum(checked.values()) == 20
    assert checked[(torch.uint8, torch.uint8, torch.uint8)] >= 4, "identity shortcuts stay in 8 bit"


def test_residual_and_activation_are_fused_and_8bit_is_handed_over() -> None:
    model = cnncomp.models.mobilenet_v2(num_classes=10, width_mult=0.25).eval()
    cnncomp.quantize(model, [torch.randn(2, 3, 32, 32)], progress=False)
    fast = _convert(model)
    graph = fast.network.graph
    assert not any(n.op == "call_function" and "add" in str(n.target) for n in graph.nodes)
    layers = _layers(fast)
    assert layers["features.0.0"].activation == Clamp(0.0, 6.0)
    assert all(
        m.out_dtype != torch.float32 for name, m in layers.items() if name not in ("features.18.0", "classifier.1")
    )
    assert layers["features.1.conv.1"].out_dtype == torch.int8, "a linear bottleneck has both signs"


def test_max_pool_and_concatenation_keep_8bit() -> None:
    article = cnncomp.models.ArticleNet().eval()
    cnncomp.quantize(article, [torch.randn(2, 3, 32, 32)], progress=False)
    fast = _convert(article)
    assert _layers(fast)["features.0"].out_dtype == torch.uint8
    concat = cnncomp.models.ConcatNet().eval()
    cnncomp.quantize(concat, [torch.randn(2, 3, 32, 32)], progress=False)
    layers = _layers(_convert(concat))
    assert layers["narrow"].output == layers["wide"].output == layers["merge"].input
    assert layers["stem"].out_dtype == torch.uint8, "both readers agree on the scale"


class Branchy(nn.Module):
    """Control flow on data: can't be traced as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.block(x) if x.mean() > -100 else x


class MyConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Odd(nn.Module):
    """Everything that has to stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.own = MyConv(3, 4, 3, padding=1)
        self.hooked = nn.Conv2d(4, 4, 3, padding=1)
        self.hooked.register_forward_hook(lambda m, a, out: out + 1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.tied_a = nn.Conv2d(4, 4, 3, padding=1)
        self.tied_b = nn.Conv2d(4, 4, 3, padding=1)
        self.tied_b.weight = self.tied_a.weight
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.even = nn.Conv2d(4, 4, 2, padding="same")
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.plain = nn.Conv2d(4, 4, 3, padding="same")
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.hooked(self.own(x))))
        x = self.reflect(self.tied_b(self.tied_a(x)))
        x = F.conv2d(self.up(self.even(x)), self.kernel)
        return F.relu(self.plain(x), inplace=True).view(x.shape[0], -1)


def test_what_cannot_be_traced_stays_and_is_named() -> None:
    model = Branchy().eval()
    fast = _convert(model)
    _close(fast, model)
    assert "(model)" in fast.conversion.kept
    assert {"conv", "block.0"} <= set(_layers(fast))


def test_odd_layers_stay_and_are_named() -> None:
    model = Odd().eval()
    fast = _convert(model)
    _close(fast, model)
    kept = fast.conversion.kept
    assert set(_layers(fast)) == {"plain"}
    for name, word in {
        "own": "subclass", "hooked": "hooks", "twice": "more than once", "tied_a": "shares", "tied_b": "shares",
        "reflect": "reflect", "even": "same", "up": "ConvTranspose2d",
    }.items():  # fmt: skip
        assert word in kept[name], (name, kept[name])
    assert any("function" in reason for reason in kept.values())


def test_user_hook_is_called_once_per_forward_and_container_hooks_stay() -> None:
    calls = []
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Conv2d(4, 4, 1)).eval()
    model[0].register_forward_hook(lambda m, a, out: calls.append(out.shape))
    fast = _convert(model)
    calls.clear()
    fast(X)
    assert len(calls) == 1 and set(_layers(fast)) == {"1"} and "hooks" in fast.conversion.kept["0"]


@pytest.mark.parametrize("quantized", [False, True])
def test_conv1d_runs_as_a_conv_of_height_one(quantized: bool) -> None:
    model = nn.Sequential(
        nn.Conv1d(5, 8, 3, stride=2, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 5, dilation=2, groups=2)
    )
    model = randomize_norms(model).eval()
    x = torch.randn(3, 5, 40)
    if quantized:
        cnncomp.quantize(model, [x], progress=False)
    fast = _convert(model, x)
    _close(fast, model, x, 0.05 if quantized else 1e-5)
    assert all(m.geometry.conv1d for m in _layers(fast).values())


@pytest.mark.parametrize("kind", ["sparse", "int8"])
def test_other_batch_and_image_sizes_work(kind: str) -> None:
    model = randomize_norms(cnncomp.models.resnet18(num_classes=10)).eval()
    if kind == "int8":
        cnncomp.quantize(model, [X], progress=False)
    else:
        mask_weights(model, 0.9)
    fast = _convert(model)
    for shape in ((1, 3, 32, 32), (5, 3, 32, 32), (2, 3, 47, 33), (0, 3, 32, 32)):
        x = torch.randn(shape)
        if kind == "int8" or not shape[0]:
            assert fast(x).shape == (shape[0], 10)
        else:
            _close(fast, model, x)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast(x), fast(x.contiguous()), rtol=1e-5, atol=1e-5)


def test_thread_count_does_not_change_a_bit() -> None:
    model = randomize_norms(cnncomp.models.mobilenet_v2(num_classes=10, width_mult=0.25)).eval()
    mask_weights(model, 0.7)
    before = torch.get_num_threads()
    sparse = _convert(model)
    cnncomp.quantize(model, [X], progress=False)
    int8 = _convert(model)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                [m(X) for m in sparse.modules() if isinstance(m, SparseConv2d) and m.geometry.in_channels == 3]
            )
            results[-1].append(int8(X))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_converted_model_is_an_ordinary_module() -> None:
    model = randomize_norms(cnncomp.models.resnet18(num_classes=10)).eval()
    cnncomp.quantize(model, [X], progress=False)
    fast = _convert(model)
    expected = fast(X)
    assert torch.equal(copy.deepcopy(fast)(X), expected)
    other = _convert(model)
    with torch.no_grad():
        next(m for m in other.modules() if isinstance(m, QuantConv2d)).weight.zero_()
    assert not torch.equal(other(X), expected)
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(X), expected)
    assert torch.equal(fast.half().float()(X), expected), "packed constants keep their dtype"
    assert not any(p.requires_grad for p in fast.parameters())


@pytest.mark.parametrize("kind", ["int8", "sparse"])
def test_compile_and_export_with_a_dynamic_batch(kind: str) -> None:
    model = randomize_norms(cnncomp.models.ConcatNet()).eval()
    if kind == "int8":
        cnncomp.quantize(model, [X], progress=False)
    else:
        mask_weights(model, 0.8)
    fast = _convert(model)
    with torch.no_grad():
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager", dynamic=True)
        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(fast, (X,), dynamic_shapes={"args": ({0: batch},)}).module()
        for x in (X, torch.randn(5, 3, 32, 32)):
            torch.testing.assert_close(compiled(x), fast(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(exported(x), fast(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [*CONV_KERNELS, *sorted(OWN_KERNELS)])
def test_dense_kernels_agree_and_compile(kernel: str) -> None:
    """Every dense kernel, with and without residual and activation, in both layouts; compiled and exported as well."""
    c, groups = (8, 8) if kernel == DEPTHWISE_KERNEL else (3, 1)
    g = cnncomp.nn.Geometry(c, 8, (3, 3), (2, 1), (1, 1), groups=groups)
    weight, bias, x = torch.randn(8, c // groups, 3, 3), torch.randn(8), torch.randn(2, c, 9, 8)
    plain = F.conv2d(x, weight, bias, g.stride, g.padding, groups=groups)
    residual = torch.randn_like(plain)
    batch = torch.export.Dim("batch", min=1, max=64)
    for clamp in (Clamp(), Clamp(0.0), Clamp(0.0, 6.0), Clamp(-1.0, 1.0)):
        layer = DenseConv2d(g, weight, bias, clamp, kernel)
        for args in ((x,), (x, residual), (x.contiguous(memory_format=torch.channels_last), residual)):
            expected = sum((plain, *args[1:])).clamp(clamp.lo, clamp.hi)
            torch.testing.assert_close(layer(*args), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        dynamic = {"x": {0: batch}, "residual": {0: batch}}
        exported = torch.export.export(layer, (x, residual), dynamic_shapes=dynamic).module()
        for fn in (compiled, exported):
            torch.testing.assert_close(fn(x, residual), expected, rtol=1e-4, atol=1e-5)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_inductor_compiles_a_converted_net() -> None:
    model = cnncomp.models.ArticleNet().eval()
    cnncomp.quantize(model, [X], progress=False)
    fast = _convert(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fast, fullgraph=True)(X), fast(X), rtol=1e-5, atol=1e-5)


def test_measured_conversion_caches_exports_and_replays_its_plan(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CNNCOMP_CACHE_DIR", str(tmp_path))
    model = mask_weights(cnncomp.models.ArticleNet(), 0.9).eval()
    fast = cnncomp.convert(model, X, progress=False)
    plan = fast.plan
    assert plan.measured and set(plan.layers) == {"features.0", "features.3", "classifier"}
    assert all(math.isfinite(ms) and ms >= 0 for layer in plan.layers.values() for ms in layer.ms.values())
    files = list((tmp_path / "plans").iterdir())
    assert [f.name for f in files] == [f"{plan.key}.json"]
    assert Plan.from_json(plan.to_json()) == plan
    monkeypatch.setattr("cnncomp.dispatch.choose.interleaved", None)  # measuring again would fail
    again = cnncomp.convert(model, X, progress=False)
    assert again.plan == plan and repr(again) == repr(fast)
    for kernel, cls in {"dense.channels_last": DenseConv2d, "conv2d_sparse": SparseConv2d}.items():
        plan.layers["features.3"] = LayerPlan(kernel)
        replayed = cnncomp.convert(model, X, plan=plan)
        assert type(_layers(replayed)["features.3"]) is cls
        _close(replayed, model)
    plan.layers["features.3"] = LayerPlan("conv2d_int8")
    with pytest.raises(ArgumentError, match="conv2d_int8.*features.3"):
        cnncomp.convert(model, X, plan=plan)
    files[0].write_text(files[0].read_text()[:50])  # a damaged cache file is measured again, not an error
    monkeypatch.undo()
    monkeypatch.setenv("CNNCOMP_CACHE_DIR", str(tmp_path))
    cnncomp.convert(model, X, progress=False)


def test_a_slower_network_comes_back_dense_with_the_reason(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CNNCOMP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("cnncomp.dispatch.network.interleaved", lambda fns, **_: {"dense": 1.0, "converted": 2.0})
    monkeypatch.setattr(
        "cnncomp.dispatch.choose.interleaved", lambda fns, **_: {k: 2.0 if "dense" in k else 1.0 for k in fns}
    )
    model = mask_weights(cnncomp.models.ArticleNet(), 0.9).eval()
    fast = cnncomp.convert(model, X, progress=False)
    assert all(isinstance(m, (DenseConv2d, DenseLinear)) for m in _layers(fast).values())
    assert "slower" in fast.plan.reason
    _close(fast, model)


def test_a_converted_model_can_be_planned_again() -> None:
    model = randomize_norms(cnncomp.models.resnet18(num_classes=10)).eval()
    cnncomp.quantize(model, [X], progress=False)
    fast = _convert(model)
    again = _convert(fast)
    assert torch.equal(again(X), fast(X))


def test_layers_can_be_used_alone() -> None:
    conv = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(SparseConv2d.from_float(conv)(x), conv(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match="input"):
        QuantConv2d.from_float(conv)
    spec = cnncomp.nn.QuantSpec(float(x.abs().max()) / 127, torch.int8)
    quant = QuantConv2d.from_float(conv, spec)
    assert (quant(x) - conv(x)).abs().max() < 0.05
    assert torch.equal(quant(x), reference_conv(quant, x))
    linear = nn.Linear(20, 7)
    y = torch.randn(3, 20)
    q = QuantLinear.from_float(linear, cnncomp.nn.QuantSpec(0.03, torch.int8))
    assert (q(y) - linear(y)).abs().max() < 0.1


def test_layer_without_a_kernel_stays_dense_and_says_so() -> None:
    """A quantised layer whose reduction is too long for int32, as it may come from elsewhere."""
    layer = DenseLinear(torch.randn(2, 66_312))
    layer.info = cnncomp.nn.LayerInfo("long", input=cnncomp.nn.QuantSpec(1.0, torch.uint8))
    options, reason = options_for(layer, "cpu")
    assert [o.candidate.kernel for o in options] == ["dense.linear", "dense.rows"] and "66311" in reason


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="model: got int"):
        cnncomp.convert(3, X)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="example_inputs"):
        cnncomp.convert(nn.Conv2d(3, 3, 1), "x")
    with pytest.raises(
        ArgumentError, match=r"example_inputs: got tensors of the shapes \[\(1, 4, 8, 8\)\], on which it fails"
    ):
        cnncomp.convert(nn.Conv2d(3, 3, 1), torch.randn(1, 4, 8, 8))
    with pytest.raises(DeviceError, match="device"):
        cnncomp.convert(nn.Conv2d(3, 3, 1), X, device="meta")
    with pytest.raises(ArgumentError, match="plan"):
        Plan.from_json("{}")


def test_profile_reports_every_layer(tmp_path) -> None:
    model = mask_weights(cnncomp.models.ConcatNet(), 0.9).eval()
    report = cnncomp.profile(_convert(model), X, progress=False)
    assert [row.name for row in report.layers] == ["stem", "narrow", "wide", "merge", "fc"]
    assert all(row.ms > 0 and row.ratio > 0 and row.mb > 0 for row in report.layers)
    assert "conv2d_sparse" in str(report) and "90%" in str(report).replace(" ", "")
    report.save(tmp_path / "report.csv")
    assert len((tmp_path / "report.csv").read_text().splitlines()) == 6
    report.save(tmp_path / "report.json")
    with pytest.raises(ArgumentError, match="path"):
        report.save(tmp_path / "report.txt")


class Remembers(nn.Module):
    """Traces without an error, but to a graph that is wrong: the branch depends on state that tracing freezes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) if self.calls % 2 else -self.conv(x)


def test_a_graph_that_computes_something_else_is_not_used() -> None:
    model = Remembers().eval()
    fast = _convert(model)
    assert "(model)" in fast.conversion.kept
    assert "conv" in _layers(fast)


class BorrowsWeight(nn.Module):
    """Its forward reads a layer's weight itself, beside calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.conv.weight, padding=1)


@pytest.mark.parametrize("quantized", [False, True])
def test_layer_whose_weight_is_read_elsewhere_stays(quantized: bool) -> None:
    model = BorrowsWeight().eval()
    if quantized:
        cnncomp.quantize(model, [X], progress=False)
    fast = _convert(model)
    _close(fast, model, tol=0.05 if quantized else 1e-4)  # its input is no longer rounded
    assert "conv" in fast.conversion.kept


def test_measuring_leaves_random_numbers_and_the_default_dtype_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CNNCOMP_CACHE_DIR", str(tmp_path))
    model = mask_weights(cnncomp.models.ArticleNet(), 0.9).eval()
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        fast = cnncomp.convert(model, X, progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    _close(fast, model)


def test_a_cached_plan_without_its_layers_is_measured_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CNNCOMP_CACHE_DIR", str(tmp_path))
    model = mask_weights(cnncomp.models.ArticleNet(), 0.9).eval()
    plan = cnncomp.convert(model, X, progress=False).plan
    (file,) = (tmp_path / "plans").iterdir()
    plan.layers.clear()
    file.write_text(plan.to_json())
    again = cnncomp.convert(model, X, progress=False).plan
    assert set(again.layers) == {"features.0", "features.3", "classifier"} and again.layers["features.3"].ms


def test_other_bad_arguments_are_typed() -> None:
    conv = nn.Conv2d(3, 3, 1)
    with pytest.raises(DeviceError, match="device"):
        cnncomp.convert(conv, X, device=1.5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="input_scale: got 'a'"):
        cnncomp.nn.QuantSpec("a", torch.uint8)  # type: ignore[arg-type]
