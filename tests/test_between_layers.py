"""What lies between layers, on kernels of this package: sigmoids and their kin, affine maps of channels, concatenation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import cnncomp
from cnncomp import _cpu
from cnncomp.errors import ArgumentError, DtypeError, InferenceOnlyError
from cnncomp.executor import Recording
from cnncomp.nn import Activation, ChannelAffine, ConcatChannels, MeanPool2d, QuantMaxPool2d, ScaleChannels
from cnncomp.ops.activate import ACTIVATIONS
from tests.helpers import mask_weights
from tests.instruction_sets import float_isa as isa

__all__ = ["isa"]  # a fixture

IN_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(isa: str, kind: str) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.linspace(-87, 87, 40_001), torch.randn(10_000), torch.randn(1000) * 1e-20, torch.zeros(1)])
    expected = IN_TORCH[kind](x.double())
    for part in (x, x[:1], x[5:22], x[:17000].view(5, 4, 10, 85)):
        want = expected[:1] if part.numel() == 1 else IN_TORCH[kind](part.double())
        got = torch.ops.cnncomp.activate(part, kind)
        assert got.shape == part.shape
        assert ((got.double() - want).abs() <= 5e-7 * want.abs()).all()


def test_the_edges_of_activations(isa: str) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-inf, -1e38, -100.0, -87.5, 87.5, 1e30, inf, nan])
    for kind in ACTIVATIONS:
        got = torch.ops.cnncomp.activate(x, kind)
        assert got[-1].isnan()
        torch.testing.assert_close(got[4:-1], IN_TORCH[kind](x[4:-1]), rtol=1e-6, atol=0)
        if not kind.startswith("hard"):
            assert (got[:4].abs() < 1e-35).all()


def test_channels_are_scaled(isa: str) -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(3, 5, 7, 9), torch.randn(3, 5, 1, 1)
    assert torch.equal(ScaleChannels()(x, scale), x * scale)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(ScaleChannels()(last, scale), x * scale)
    assert torch.equal(torch.ops.cnncomp.scale_channels(last, scale), x * scale)
    got = Activation("silu")(last)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, F.silu(x))
    assert torch.equal(Activation("silu")(x[:0]), x[:0])
    torch.testing.assert_close(Activation("sigmoid")(x[..., ::2]), torch.sigmoid(x[..., ::2]))


def test_wrong_arguments() -> None:
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ArgumentError, match="kind"):
        Activation("relu")
    with pytest.raises(ArgumentError, match="activation"):
        torch.ops.cnncomp.activate(x, "relu")
    for scale in (torch.randn(3, 1, 1), torch.randn(1, 3, 1, 1)):
        with pytest.raises(ArgumentError, match="scale"):
            torch.ops.cnncomp.scale_channels(x, scale)
    with pytest.raises(ValueError, match="no activation"):
        _cpu.activate(x.data_ptr(), 1, 1, len(ACTIVATIONS), x.data_ptr(), 1)


def test_gradients_go_through_torch() -> None:
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    ScaleChannels()(Activation("hardswish")(x), x.mean((2, 3), keepdim=True)).sum().backward()
    assert x.grad is not None
    with pytest.raises(InferenceOnlyError):
        torch.ops.cnncomp.activate(x, "silu").sum().backward()


class Excited(nn.Module):
    """Squeeze and excitation, written in several ways, with activations as modules, functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 1), nn.Conv2d(24, 32, 1)
        self.act, self.gate = nn.SiLU(inplace=True), nn.Hardsigmoid()
        self.down, self.up, self.pool = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1), nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Linear(24, 24)
        self.drop, self.fc = nn.Dropout(0.2, inplace=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        x = x * self.gate(self.up(F.relu(self.down(self.pool(x)))))
        x = F.hardswish(self.b(x))
        x = torch.mul(self.squeeze(x.mean([2, 3])).sigmoid()[:, :, None, None], x)
        x = F.silu(self.c(x))
        return self.fc(self.drop(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)))


def python_nodes(model: cnncomp.ConvertedModel, x: Tensor) -> list[fx.Node]:
    assert isinstance(model.network, fx.GraphModule)
    return [item.node for item in Recording(model.network, (x,)).items if item.node is not None]


@pytest.mark.parametrize("batch", [1, 3])
def test_networks_run_without_python_between_layers(batch: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = mask_weights(Excited(), 0.8).eval(), torch.randn(batch, 3, 30, 30)
    model = cnncomp.convert(net, x, measure=False, cache=False)
    kinds = [m.kind for m in model.modules() if isinstance(m, Activation)]
    assert sorted(kinds) == ["hardsigmoid", "hardswish", "sigmoid", "silu", "silu"]
    assert sum(isinstance(m, ScaleChannels) for m in model.modules()) == 2
    assert sum(isinstance(m, MeanPool2d) for m in model.modules()) == 3
    with torch.no_grad():
        expected = net(x)
        for _ in range(3):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(model(x), model.network(x))
        names = {node.op for node in python_nodes(model, x)}
    assert names <= {"placeholder", "call_function"}  # the one that indexes with None
    cnncomp.save(model, tmp_path / "net.cnncomp")
    loaded = cnncomp.load(tmp_path / "net.cnncomp")
    assert torch.equal(loaded(x), model(x))


def test_outputs_lie_over_inputs_that_nobody_reads_again() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(F.silu(y)) + torch.tanh(y)

    class Once(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.silu(self.a(x)))

    x = torch.randn(1, 3, 32, 32)
    image = 8 * 32 * 32 * 4
    for cls, images in ((Once, 1), (Twice, 2)):
        model = cnncomp.convert(mask_weights(cls(), 0.8).eval(), x, measure=False, cache=False)
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(model(x), model.network(x))
        assert isinstance(model.network, fx.GraphModule)
        assert round(Recording(model.network, (x,)).arena_bytes / image) == images


@fx.wrap
def stochastic_depth(input: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    assert not training
    return input


stochastic_depth.__module__ = "torchvision.ops.stochastic_depth"


class Dropping(nn.Module):
    def __init__(self, depth: bool) -> None:
        super().__init__()
        self.depth = depth
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.a(x), 0.5, self.training, True)
        y = F.dropout2d(self.b(x), p=0.5, training=self.training)
        return x + (stochastic_depth(y, 0.1, "row", self.training) if self.depth else y)


def test_what_drops_in_training_only_is_left_out() -> None:
    net, x = mask_weights(Dropping(True), 0.8).eval(), torch.randn(1, 3, 9, 9)
    model = cnncomp.convert(net, x, measure=False, cache=False)
    net.depth = False
    assert isinstance(model.network, fx.GraphModule)
    assert {n.op for n in model.network.graph.nodes} <= {"placeholder", "call_module", "call_method", "output"}
    torch.testing.assert_close(model(x), net(x), rtol=1e-4, atol=1e-5)


def test_hooked_activations_and_pools_stay() -> None:
    net, x = mask_weights(Excited(), 0.8).eval(), torch.randn(1, 3, 30, 30)
    seen: list[Tensor] = []
    for module in (net.act, net.pool):
        module.register_forward_hook(lambda module, args, out: seen.append(out))
    model = cnncomp.convert(net, x, measure=False, cache=False)
    seen.clear()
    model(x)
    assert len(seen) == 2


def test_affine_maps_of_channels(isa: str) -> None:
    torch.manual_seed(0)
    x, scale, shift = torch.randn(3, 5, 7, 9), torch.randn(5), torch.randn(5)
    layer = ChannelAffine(5, -0.5, 1.5)
    layer.scale, layer.shift = scale, shift
    expected = (x.double() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).clamp(-0.5, 1.5)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(layer(image), expected.float(), rtol=1e-6, atol=1e-6)
    grad = torch.randn(1, 5, 2, 2, requires_grad=True)
    layer(grad).sum().backward()
    assert grad.grad is not None
    for wrong in ((x[0], scale, shift), (x, scale[:4], shift), (x, scale, shift[:4])):
        with pytest.raises(ArgumentError):
            torch.ops.cnncomp.affine_channels(*wrong, 0.0, 1.0)


class PreActivated(nn.Module):
    """A block as DenseNet's: BatchNorm and ReLU before the convolutions, images one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.last, self.plain = nn.BatchNorm2d(14, affine=False), nn.Conv2d(14, 4, 1)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = torch.cat([x, self.conv(torch.relu(self.norm(x)))], dim=1)
        return self.plain(self.pool(self.last(x)))


def test_norms_that_no_layer_takes_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = mask_weights(PreActivated(), 0.8).eval(), torch.randn(2, 3, 20, 18)
    for norm in (net.norm, net.last):
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            if t is not None:
                nn.init.uniform_(t, 0.5, 1.5)
    model = cnncomp.convert(net, x, measure=False, cache=False)
    found = [m for m in model.modules() if isinstance(m, ChannelAffine)]
    assert sorted((m.lo, m.hi) for m in found) == [(-math.inf, math.inf), (0.0, math.inf)]
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), net(x), rtol=1e-4, atol=1e-5)
            assert torch.equal(model(x), model.network(x))
        assert {node.op for node in python_nodes(model, x)} == {"placeholder"}
    cnncomp.save(model, tmp_path / "net.cnncomp")
    assert torch.equal(cnncomp.load(tmp_path / "net.cnncomp")(x), model(x))


def test_norms_that_others_see_stay() -> None:
    net, x = mask_weights(PreActivated(), 0.8).eval(), torch.randn(2, 3, 20, 18)
    seen: list[Tensor] = []
    net.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    net.last = nn.BatchNorm2d(14, track_running_stats=False)  # its statistics are the batch's
    model = cnncomp.convert(net, x, measure=False, cache=False)
    assert not any(isinstance(m, ChannelAffine) for m in model.modules())
    torch.testing.assert_close(model(x), net(x), rtol=1e-4, atol=1e-5)
    assert seen


def test_images_one_behind_the_other() -> None:
    torch.manual_seed(0)
    images = [torch.randn(2, c, 5, 6) for c in (3, 1, 0, 7)]
    strided = torch.randn(2, 8, 5, 6)[:, ::2]
    last = [t.contiguous(memory_format=torch.channels_last) for t in images]
    assert torch.ops.cnncomp.concat_channels(last).is_contiguous(memory_format=torch.channels_last)
    for given in (images, last, images[:1], [images[0], images[0]], [images[3], strided]):
        assert torch.equal(torch.ops.cnncomp.concat_channels(given), torch.cat(given, 1))
        assert torch.equal(ConcatChannels()(*given), torch.cat(given, 1))
    for wrong in ([images[0], torch.randn(1, 3, 5, 6)], [images[0], torch.randn(2, 3, 5, 5)], [torch.randn(2, 3)]):
        with pytest.raises(ArgumentError, match="tensors"):
            torch.ops.cnncomp.concat_channels(wrong)
    with pytest.raises(DtypeError):
        torch.ops.cnncomp.concat_channels([images[0], images[1].double()])


class Gated(nn.Module):
    """Factors that are one for all images, or for each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain = nn.Conv2d(3, 8, 3, padding=1), nn.Parameter(torch.rand(1, 8, 1, 1))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.conv(x) * self.gain * gate


def test_factors_that_broadcast_at_another_batch() -> None:
    net = mask_weights(Gated(), 0.8).eval()
    model = cnncomp.convert(net, (torch.randn(1, 3, 6, 6), torch.rand(1, 8, 1, 1)), measure=False, cache=False)
    assert any(isinstance(m, ScaleChannels) for m in model.modules())
    with torch.no_grad():
        for n, gate in ((1, (1, 8, 1, 1)), (4, (1, 8, 1, 1)), (4, (4, 8, 1, 1)), (2, (2, 8, 6, 6)), (2, (8, 1, 1))):
            args = torch.randn(n, 3, 6, 6), torch.rand(gate)
            for _ in range(3):
                torch.testing.assert_close(model(*args), net(*args), rtol=1e-4, atol=1e-5)


def test_max_pools_of_whole_numbers() -> None:
    for ceil_mode in (False, True):
        pool = QuantMaxPool2d(3, 2, ceil_mode=ceil_mode)
        for dtype in (torch.int64, torch.int32, torch.uint8, torch.int8):
            x = torch.randint(0, 100, (1, 2, 8, 8)).to(dtype)
            assert torch.equal(pool(x).long(), F.max_pool2d(x.long(), 3, 2, ceil_mode=ceil_mode))
