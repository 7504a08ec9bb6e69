"""Networks that fusion and partial conversion could get wrong in silence. Each must compute the same after convert."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import cnncomp
from cnncomp.nn import Clamp, ConvertedLayer, DenseConv2d, Geometry
from tests.helpers import randomize_norms

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class PreActivation(nn.Module):
    """The shortcut reads the tensor before an activation changes it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.shortcut, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        shortcut = self.shortcut(x)
        x = self.relu(x)
        return shortcut + self.conv(x)


class Mutates(nn.Module):
    """One of several mutations of the tensor that a convolution read or wrote."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.a(x)
        if self.how == "zero":
            z = self.b(h)
            h.zero_()
            return F.relu(z), h
        if self.how == "add":
            k = h
            h = h.add_(self.b(h))
            return h + k
        if self.how == "iadd":
            k = h
            h += self.b(h)
            return h + k
        if self.how == "view":
            v = h.view(h.size(0), -1)
            v.clamp_(0, 1)
            return h
        if self.how == "input":
            x.sub_(1)
            return self.a(x)
        if self.how == "functional":
            y = F.relu(h, True)
            return self.b(h) + y
        h[:, :1] = 0
        return self.b(h)


@pytest.mark.parametrize("how", ["zero", "add", "iadd", "view", "input", "functional", "setitem"])
def test_mutations(how: str) -> None:
    model = Mutates(how).eval()
    _same(model)


def test_pre_activation() -> None:
    fast = _same(randomize_norms(PreActivation()).eval())
    assert len(_layers(fast)) == 2


class Positions(nn.Module):
    """The addend's shape is the output's only at batch 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.positions = nn.Parameter(torch.randn(1, 4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.positions


def test_addend_that_broadcasts_at_another_batch() -> None:
    model = cnncomp.prune(Positions(), sparsity=0.9, include_first_last=True).eval()
    fast = cnncomp.convert(model, X[:1], measure=False)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X), rtol=1e-4, atol=1e-5)


class Defaults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, features: bool = False, mask: Tensor | None = None) -> Tensor:
        y = F.hardtanh(self.bn(self.conv(x)), 0.0, 3.0)
        if mask is not None:
            y = y * mask
        return (y, x) if features else y.view(size=(y.size(0), -1))


def test_default_arguments_do_not_hinder_tracing() -> None:
    fast = _same(randomize_norms(Defaults()).eval())
    assert not fast.conversion.kept
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    assert _layers(fast)["conv"].activation == cnncomp.nn.Clamp(0.0, 3.0)


class NeedsChildren(nn.Module):
    """Can't be traced, and reads its children's attributes or wants their layout."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.conv = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            x = -x
        x = self.features(x)
        if self.how == "weight":
            x = x.to(self.conv.weight.dtype)
        x = self.conv(x)
        return self.fc(x.view(x.size(0), -1)) if self.how == "view" else self.fc(x.flatten(1)) * self.fc.out_features


@pytest.mark.parametrize("how", ["weight", "view"])
@pytest.mark.parametrize("quantized", [False, True])
def test_partly_converted_networks_still_run(how: str, quantized: bool) -> None:
    model = NeedsChildren(how).eval()
    if quantized:
        cnncomp.quantize(model, [X], progress=False)
    fast = _same(model, 0.1 if quantized else 1e-4)
    assert "features.0" in _layers(fast)
    if how == "weight":
        assert "needs it as it is" in fast.conversion.kept["conv"]


@pytest.mark.parametrize("layer", [nn.Identity, nn.ReLU, lambda: nn.MaxPool2d(2), nn.Flatten])
def test_hooked_layers_without_weights_stay(layer) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer(), nn.Flatten(), nn.LazyLinear(5)).eval()
    model(X)
    cnncomp.quantize(model, [X], progress=False)
    seen: list[torch.dtype] = []
    model[1].register_forward_hook(lambda m, a, out: seen.append(a[0].dtype))
    fast = cnncomp.convert(model, X, measure=False)
    seen.clear()
    fast(X)
    assert seen == [torch.float32] and fast.conversion.kept["1"] == "has hooks"


def test_eight_bit_passes_the_common_idioms() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(F.max_pool2d(F.relu_(self.a(x)), 2), training=self.training)
            x = self.b(x).clamp(min=0)
            return self.fc(x.view(x.size(0), -1))

    model = cnncomp.quantize(Net().eval(), [X], progress=False)
    layers = _layers(_same(model, 0.1))
    assert layers["a"].out_dtype == layers["b"].out_dtype == torch.uint8


def test_networks_that_hold_our_layers_convert() -> None:
    inner = cnncomp.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), X, measure=False)
    model = nn.Sequential(inner, cnncomp.nn.SparseConv2d.from_float(nn.Conv2d(8, 4, 1)), nn.Conv2d(4, 4, 1)).eval()
    _same(model)


def test_convert_leaves_its_arguments_alone() -> None:
    model, x = Mutates("input").eval(), X.clone()
    cnncomp.convert(model, x, measure=False)
    assert torch.equal(x, X)
    fast = cnncomp.convert(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)).eval(), x, measure=False)
    assert not fast.train().training


def test_models_that_cannot_be_copied_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    prune.l1_unstructured(model[0], "weight", 0.5)
    model(X)
    with pytest.raises(cnncomp.errors.ArgumentError, match=r"layer '0'.*torch\.nn\.utils\.prune\.remove"):
        cnncomp.convert(model, X, measure=False)
    assert _layers(cnncomp.convert(torch.compile(nn.Sequential(nn.Conv2d(3, 4, 1)).eval()), X, measure=False))


def _layers(model: nn.Module) -> dict[str, ConvertedLayer]:
    return {m.info.name: m for m in model.modules() if isinstance(m, ConvertedLayer)}


def _same(model: nn.Module, tolerance: float = 1e-4) -> cnncomp.ConvertedModel:
    """Convert on every dense layout and check the results."""
    with torch.no_grad():
        expected = copy.deepcopy(model)(X.clone())
    fast = cnncomp.convert(model, X, measure=False)
    plans = [fast.plan]
    for kernel in ("dense.channels_last", "dense.fused"):
        plan = copy.deepcopy(fast.plan)
        for layer in plan.layers.values():
            layer.kernel = kernel if layer.kernel == "dense.nchw" else layer.kernel
        plans.append(plan)
    for plan in plans:
        result = cnncomp.convert(model, X, plan=plan)(X.clone())
        for got, want in zip(*((t,) if isinstance(t, Tensor) else t for t in (result, expected)), strict=True):
            assert (got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))
    return fast


def test_weights_laid_out_for_onednn_are_held_once_and_follow_the_layer() -> None:
    """Copies, moves, and weights made in inference mode; other input sizes than the first one."""
    geometry = Geometry(8, 16, (3, 3), (2, 2), (1, 1), (1, 1), 2)
    weight, bias = torch.randn(16, 4, 3, 3), torch.randn(16)
    layer = DenseConv2d(geometry, weight, bias, Clamp(0.0, 6.0), "dense.fused")
    with torch.inference_mode():
        layer(torch.randn(1, 8, 7, 7))
        born_in_it = DenseConv2d(geometry, weight, bias, Clamp(0.0, 6.0), "dense.fused")
        born_in_it(torch.randn(1, 8, 7, 7))
    assert layer.plain is None and torch.equal(layer.weight, weight)
    copied, stored = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    moved = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    moved.load_state_dict(copied.state_dict())
    plain = DenseConv2d(geometry, weight, bias, Clamp(0.0, 6.0))
    x, residual = torch.randn(3, 8, 12, 5), torch.randn(3, 16, 6, 3)
    for fused in (layer, copied, stored, moved, born_in_it):
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fused(x, residual), plain(x, residual), rtol=1e-5, atol=1e-5)
        assert fused.plain is None and torch.equal(fused.weight, weight)
        fused(x.clone().requires_grad_()).sum().backward()


class GivenUp(nn.Module):
    """Changes in place that fusion understands, and one, of a view, for which it gives the graph up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.silu = nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x * 2
        z = self.relu(y)
        w = z * 0.5
        v = w.flatten(1)
        self.silu(w)
        return y, v, self.conv(z)


def test_modules_of_a_graph_that_is_given_up_stay_as_they_were() -> None:
    net, x = GivenUp().eval(), torch.randn(2, 3, 9, 9)
    model = cnncomp.convert(net, x, measure=False, cache=False)
    with torch.no_grad():
        for got, expected in zip(model(x), net(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
