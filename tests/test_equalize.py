"""Cross-layer equalisation: which layers are linked, and what rescaling keeps and gains."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnncomp
from cnncomp.models import mobilenet_v2
from cnncomp.quantization import ClampChannels, quantize
from cnncomp.quantization.equalize import equalize
from cnncomp.quantization.links import Link, layer_graph, links_of
from tests.helpers import noise, randomize_norms
from tests.quantized_nets import NETS, Chain


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def unbalanced() -> nn.Module:
    """Channels that differ by up to 10,000, which a step per tensor does not suit, made of ones that do not."""
    a, b, c = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3, groups=24), nn.Conv2d(24, 16, 1)
    with torch.no_grad():
        for first, second in ((a, b), (b, c)):
            factor = 100 ** (2 * torch.rand(24) - 1)
            first.weight.mul_(factor.view(-1, 1, 1, 1))
            first.bias.mul_(factor)
            second.weight.div_(factor.view(-1, 1, 1, 1) if second.groups > 1 else factor.view(1, -1, 1, 1))
    return nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c).eval()


@pytest.mark.parametrize("by", ["activations", "weights"])
@pytest.mark.parametrize("name", NETS)
def test_equalised_nets_compute_the_same(name: str, by: str) -> None:
    build, shape, links = NETS[name]
    model, x = randomize_norms(build().eval()), torch.randn(shape)
    before = copy.deepcopy(model)
    found = equalize(model, lambda: model(x), by)
    assert len(found) == links, [(list(k.firsts), list(k.seconds)) for k in found]
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))
    for images in (x, 5 * torch.randn(shape)):  # not only where it was calibrated: upper bounds went along
        torch.testing.assert_close(model(images), before(images), rtol=1e-3, atol=1e-3)


def test_what_is_between_links() -> None:
    model = Chain()
    a, b, c, d = links_of(model, layer_graph(model))
    assert a == Link({"a": None}, {"b": 1}, ["six"], pooled=True)
    assert b == Link({"b": "norm"}, {"c": 1}, ["act"])
    assert c == Link({"c": None}, {"d": 4}, pooled=True)
    assert d == Link({"d": None}, {"e": 1})


def test_layers_that_are_added_share_a_link() -> None:
    model = mobilenet_v2(10, 0.35)
    links = links_of(model, layer_graph(model))
    stream = next(k for k in links if "features.4.conv.2" in k.firsts)
    assert set(stream.firsts) == {f"features.{i}.conv.2" for i in (4, 5, 6)}
    assert set(stream.seconds) == {f"features.{i}.conv.0.0" for i in (5, 6, 7)}
    assert set(stream.firsts.values()) == {f"features.{i}.conv.3" for i in (4, 5, 6)}


def test_no_link_through_what_minds_a_factor() -> None:
    class Net(nn.Module):
        def __init__(self, between: nn.Module) -> None:
            super().__init__()
            self.a, self.between, self.b = nn.Conv2d(3, 4, 1), between, nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.between(self.a(x)))

    for between in (
        nn.SiLU(),
        nn.Sigmoid(),
        nn.Hardtanh(-1, 1),
        nn.BatchNorm2d(4, affine=False),
        nn.LocalResponseNorm(2),
    ):
        net = Net(between).eval()
        assert links_of(net, layer_graph(net)) == [], between

    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + self.a(x).sum()

    net = Twice(nn.Identity())
    assert links_of(net, layer_graph(net)) == []


@pytest.mark.parametrize("by", ["activations", "weights"])
def test_equalisation_restores_an_unbalanced_net(by: str) -> None:
    model, x = unbalanced(), torch.randn(8, 3, 16, 16)
    expected = model(x)
    plain = noise(quantize(copy.deepcopy(model), x)(x), expected)
    better = noise(quantize(copy.deepcopy(model), x, equalize=by)(x), expected)
    assert better < 1e-2 * plain and better < 1e-3, (plain, better)


def test_equalised_nets_convert_and_are_saved(tmp_path: Path) -> None:
    model = randomize_norms(mobilenet_v2(10, 0.35).eval())
    x = torch.randn(2, 3, 32, 32)
    quantize(model, x, equalize="activations", exclude=["classifier", "features.1"])
    assert any(isinstance(m, ClampChannels) for m in model.modules())
    fast = cnncomp.convert(model, x, measure=False)
    assert not any(isinstance(m, ClampChannels) for m in fast.modules())  # part of the epilogue
    assert noise(fast(x), model(x)) < 1e-3
    cnncomp.save(fast, tmp_path / "net.cnncomp")
    assert torch.equal(cnncomp.load(tmp_path / "net.cnncomp", replan=False)(x), fast(x))


def test_a_clamp_that_is_not_fused_is_saved_too(tmp_path: Path) -> None:
    clamp = ClampChannels(3)
    clamp.hi.copy_(torch.tensor([0.1, 0.2, torch.inf]))
    net = nn.Sequential(nn.AvgPool2d(2), clamp, nn.Conv2d(3, 4, 1)).eval()
    x = torch.randn(1, 3, 8, 8)
    fast = cnncomp.convert(net, x, measure=False)
    cnncomp.save(fast, tmp_path / "net.cnncomp")
    torch.testing.assert_close(cnncomp.load(tmp_path / "net.cnncomp", replan=False)(x), net(x))


@pytest.mark.parametrize("kernel", ["dense.nchw", "dense.channels_last", "dense.fused"])
@pytest.mark.parametrize("residual", [False, True])
def test_dense_layers_clamp_per_channel(kernel: str, residual: bool) -> None:
    hi = (0.5, float("inf"), 0.1, 2.0)
    weight, bias, x = torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(2, 3, 6, 6)
    layer = cnncomp.nn.DenseConv2d(cnncomp.nn.Geometry(3, 4, (3, 3)), weight, bias, cnncomp.nn.Clamp(0.0, hi), kernel)
    res = torch.randn(2, 4, 4, 4) if residual else None
    t = F.conv2d(x, weight, bias) + (0 if res is None else res)
    expected = torch.minimum(t.clamp(min=0), torch.tensor(hi).view(-1, 1, 1))
    with torch.no_grad():
        torch.testing.assert_close(layer(x, res), expected, rtol=1e-4, atol=1e-5)
    rebuilt = cnncomp.nn.DenseConv2d.build(layer.config(), layer.tensors())
    assert rebuilt.activation == layer.activation
