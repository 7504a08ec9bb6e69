"""Saving and loading: bit-equal round trips, small files, atomic writes, kernels planned again on another machine."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnncomp
from cnncomp._container import contents, unpack
from cnncomp._module_json import TORCH_MODULES, decode_module, encode_module
from cnncomp.dispatch import device_key
from cnncomp.errors import ArgumentError, DeviceError, SerializationError
from cnncomp.models import DigitsNet
from cnncomp.nn import (
    Activation,
    ChannelAffine,
    ConcatChannels,
    ConvertedLayer,
    DenseConv2d,
    DenseLinear,
    MeanPool2d,
    QuantMaxPool2d,
    ScaleChannels,
)
from cnncomp.quantization import ClampChannels
from tests.saved_networks import NETWORKS, converted

HERE = device_key(torch.device("cpu"))


class OddsAndEnds(nn.Module):
    """All that a graph can hold: functions, methods, operators, attributes, slices, constants, keywords, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.twice = nn.Conv2d(6, 6, 1)
        self.act = nn.Hardtanh(-1.0, math.inf)
        self.gain = nn.Parameter(torch.randn(6, 1, 1))
        self.inner = nn.Module()
        self.inner.register_buffer("shift", torch.randn(1, 6, 1, 1))

    def forward(self, x: Tensor, y: Tensor, factor: float = 2.0) -> dict[str, Any]:
        x = self.act(self.twice(self.twice(self.conv(torch.cat([x, y[:, :2]], dim=1))))) * self.gain + self.inner.shift
        a, b = x.chunk(2, 1)
        z = torch.clamp(F.interpolate(a, scale_factor=factor), min=-math.inf, max=3.0).to(torch.float64)
        z = z.reshape(x.shape[0], -1)[..., ::2].to(torch.float32)
        return {"z": z + 1, "sizes": (x.shape, b.dtype), "b": [F.gelu(b, approximate="tanh"), None]}


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _same_layers(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = (
        {n: m for n, m in model.named_modules() if isinstance(m, (ConvertedLayer, QuantMaxPool2d))} for model in (a, b)
    )
    assert sorted(ours) == sorted(theirs)
    for name, layer in ours.items():
        other = theirs[name]
        assert type(layer) is type(other) and repr(layer) == repr(other)
        if isinstance(layer, ConvertedLayer) and isinstance(other, ConvertedLayer):
            assert layer.config() == other.config()
            for field in ("name", "pattern", "reason", "timings", "input"):
                assert getattr(layer.info, field) == getattr(other.info, field), (name, field)
            pair = layer.info.weight_scale, other.info.weight_scale
            assert pair[0] is pair[1] or torch.equal(*pair)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", NETWORKS)
def test_round_trip_is_bit_equal(case: str, tmp_path: Path) -> None:
    model, x = converted(case)
    cnncomp.save(model, tmp_path / "m.cnncomp")
    loaded = cnncomp.load(tmp_path / "m.cnncomp")
    assert torch.equal(model(x), loaded(x))
    assert torch.equal(model(x[:1]), loaded(x[:1]))
    assert loaded.plan == model.plan and loaded.conversion == model.conversion
    _same_layers(model, loaded)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert _names(tmp_path) == ["m.cnncomp"]


def test_measured_plan_and_its_timings_survive(tmp_path: Path) -> None:
    model, x = converted("conv1d-int8", measure=True)
    cnncomp.save(model, tmp_path / "m.cnncomp")
    loaded = cnncomp.load(tmp_path / "m.cnncomp")
    assert loaded.plan == model.plan and loaded.plan.measured and loaded.plan.network_ms == model.plan.network_ms
    _same_layers(model, loaded)
    assert torch.equal(model(x), loaded(x))


def test_graph_with_functions_attributes_and_constants(tmp_path: Path) -> None:
    net = OddsAndEnds().eval()
    cnncomp.prune(net, sparsity=0.5, include_first_last=True)  # "twice" stays torch's, with its mask
    inputs = (torch.randn(2, 2, 5, 6), torch.randn(2, 3, 5, 6))
    model = cnncomp.convert(net, inputs, measure=False, cache=False)
    cnncomp.save(model, tmp_path / "m")
    loaded = cnncomp.load(tmp_path / "m")
    expected, got = model(*inputs), loaded(*inputs)
    assert got["sizes"] == expected["sizes"] and got["b"][1] is None
    assert torch.equal(got["z"], expected["z"]) and torch.equal(got["b"][0], expected["b"][0])
    assert "twice" in loaded.conversion.kept
    assert torch.equal(loaded(*inputs, factor=1.0)["z"], model(*inputs, factor=1.0)["z"])
    assert torch.equal(cnncomp.load(tmp_path / "m", replan=True)(*inputs)["z"], expected["z"])


def test_quantised_layer_that_is_called_twice_runs_in_float_and_can_be_saved(tmp_path: Path) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    net = cnncomp.quantize(nn.Sequential(layer, layer).eval(), [x], progress=False)
    model = cnncomp.convert(net, x, measure=False, cache=False)
    assert model.conversion.kept == {"0": "is called more than once, and runs in float"}
    cnncomp.save(model, tmp_path / "m")
    assert torch.equal(cnncomp.load(tmp_path / "m")(x), model(x))


_SEQUENCE, _IMAGE = (2, 6, 8), (2, 6, 8, 8)
#: An instance of every torch layer that a file may hold, with arguments that are not the defaults, and an input shape.
SAMPLES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.AdaptiveAvgPool1d(3), _SEQUENCE), (nn.AdaptiveAvgPool2d((None, 3)), _IMAGE),
    (nn.AdaptiveMaxPool1d(3), _SEQUENCE), (nn.AdaptiveMaxPool2d((2, 3)), _IMAGE), (nn.AlphaDropout(0.3), _IMAGE),
    (nn.AvgPool1d(3, 2, 1, count_include_pad=False), _SEQUENCE), (nn.AvgPool2d(3, (1, 2), divisor_override=5), _IMAGE),
    (nn.BatchNorm1d(6, eps=1e-3, affine=False), _SEQUENCE), (nn.BatchNorm2d(6, momentum=None), _IMAGE),
    (nn.CELU(0.5), _IMAGE), (nn.ChannelShuffle(2), _IMAGE), (nn.ConstantPad1d((1, 2), 0.5), _SEQUENCE),
    (nn.ConstantPad2d(1, -1.5), _IMAGE), (nn.Conv1d(6, 4, 3, 2, 1, 1, 2, padding_mode="circular"), _SEQUENCE),
    (nn.Conv2d(6, 4, (3, 1), padding="same", bias=False), _IMAGE), (nn.Linear(8, 3, bias=False), _IMAGE),
    (nn.ConvTranspose1d(6, 4, 3, 2, 1, 1, 2), _SEQUENCE), (nn.ConvTranspose2d(6, 4, 3, 2, 1, (1, 0)), _IMAGE),
    (nn.Dropout(0.3), _IMAGE), (nn.Dropout1d(0.3), _SEQUENCE), (nn.Dropout2d(0.3, inplace=True), _IMAGE),
    (nn.ELU(0.7), _IMAGE), (nn.Embedding(10, 4, padding_idx=1), (3,)), (nn.Flatten(2), _IMAGE),
    (nn.GELU("tanh"), _IMAGE), (nn.GLU(1), _IMAGE), (nn.GroupNorm(3, 6, eps=1e-4), _IMAGE), (nn.Hardsigmoid(), _IMAGE),
    (nn.Hardswish(inplace=True), _IMAGE), (nn.Hardtanh(-math.inf, 0.5), _IMAGE), (nn.Identity(), _IMAGE),
    (nn.InstanceNorm1d(6, affine=True), _SEQUENCE), (nn.InstanceNorm2d(6, track_running_stats=True), _IMAGE),
    (nn.LayerNorm((8, 8), bias=False), _IMAGE), (nn.LeakyReLU(0.2), _IMAGE), (nn.LocalResponseNorm(3, k=2.0), _IMAGE),
    (nn.LogSigmoid(), _IMAGE), (nn.LogSoftmax(1), _IMAGE), (nn.MaxPool1d(3, 2, 1), _SEQUENCE),
    (nn.MaxPool2d(3, 2, (1, 0), ceil_mode=True), _IMAGE), (nn.Mish(), _IMAGE), (nn.PReLU(6), _IMAGE),
    (nn.PixelShuffle(1), _IMAGE), (nn.PixelUnshuffle(2), _IMAGE), (nn.ReLU(inplace=True), _IMAGE), (nn.ReLU6(), _IMAGE),
    (nn.ReflectionPad1d((1, 2)), _SEQUENCE), (nn.ReflectionPad2d(2), _IMAGE), (nn.ReplicationPad1d(1), _SEQUENCE),
    (nn.ReplicationPad2d((1, 0, 2, 1)), _IMAGE), (nn.SELU(), _IMAGE), (nn.SiLU(), _IMAGE), (nn.Sigmoid(), _IMAGE),
    (nn.Softmax(2), _IMAGE), (nn.Softplus(2.0, 10.0), _IMAGE), (nn.Tanh(), _IMAGE), (nn.Unflatten(1, (2, 3)), _IMAGE),
    (nn.Upsample(scale_factor=(2.0, 1.5), mode="bilinear", align_corners=True), _IMAGE),
    (nn.UpsamplingBilinear2d(scale_factor=2), _IMAGE), (nn.UpsamplingNearest2d((5, 7)), _IMAGE),
    (nn.ZeroPad1d(1), _SEQUENCE), (nn.ZeroPad2d((0, 1, 2, 3)), _IMAGE), (QuantMaxPool2d(2, 2), _IMAGE),
    (ClampChannels(6), _IMAGE), (MeanPool2d(), _IMAGE), (Activation("silu"), _IMAGE),
    (ChannelAffine(6, 0.0), _IMAGE), (ConcatChannels(), _IMAGE),
]  # fmt: skip


def test_every_torch_layer_of_the_table_has_a_sample() -> None:
    two_inputs = {ScaleChannels}  # test_activations.py saves one
    assert {type(module) for module, _ in SAMPLES} | two_inputs == set(TORCH_MODULES)


@pytest.mark.parametrize(
    ("module", "shape"), SAMPLES, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else ""
)
def test_torch_layer_round_trip(module: nn.Module, shape: tuple[int, ...]) -> None:
    for t in (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()):
        nn.init.uniform_(t, 0.5, 1.5)
    encoded, tensors = encode_module("m", module.eval())
    other = decode_module(json.loads(json.dumps(encoded, allow_nan=False)), tensors).eval()
    x = torch.randint(0, 10, shape) if isinstance(module, nn.Embedding) else torch.randn(shape)
    assert type(other) is type(module) and repr(other) == repr(module)
    assert torch.equal(module(x.clone()), other(x.clone()))


@pytest.mark.parametrize(("case", "most"), [("int8", 0.29), ("sparse-int8", 0.11), ("sparse", 0.18), ("dense", 1.03)])
def test_sizes(case: str, most: float, tmp_path: Path) -> None:
    """Against 4 bytes per weight: int8 a quarter, each zero a bit, and at most 20 kB for all that is not weights."""
    model, _ = converted(case)
    cnncomp.save(model, tmp_path / "m")
    weights = sum(p.numel() for p in DigitsNet().parameters())
    assert (tmp_path / "m").stat().st_size <= most * 4 * weights


@pytest.mark.parametrize("case", [case for case, (_, _, quantized, _) in NETWORKS.items() if quantized])
def test_integers_are_stored_whichever_kernel_runs_them(case: str, tmp_path: Path) -> None:
    model, x = converted(case, device=HERE)
    dense = [name for name, m in model.network.named_modules() if isinstance(m, (DenseConv2d, DenseLinear))]
    cnncomp.save(model, tmp_path / "m")
    stored = contents(unpack((tmp_path / "m").read_bytes()))[1]
    for name in dense:
        layer = model.network.get_submodule(name)
        assert isinstance(layer, ConvertedLayer)
        quantized = layer.info.weight_scale is not None
        weight = stored.get(f"{name}.weight", stored.get(f"{name}.weight:values"))
        assert weight is not None and weight.dtype == (torch.int8 if quantized else torch.float32)
    assert len(dense) > 1
    loaded = cnncomp.load(tmp_path / "m", replan=False)
    _same_layers(model, loaded)
    assert torch.equal(loaded(x), model(x))


def test_float_weight_off_the_grid_stays_float(tmp_path: Path) -> None:
    model, x = converted("int8", device=HERE)
    model = copy.deepcopy(model)
    fc = model.network.get_submodule("fc")
    assert isinstance(fc, DenseLinear)
    fc.weight.data[0, 0] += 1e-3
    cnncomp.save(model, tmp_path / "m")
    assert contents(unpack((tmp_path / "m").read_bytes()))[1]["fc.weight"].dtype == torch.float32
    assert torch.equal(cnncomp.load(tmp_path / "m", replan=False)(x), model(x))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cnncomp.load(tmp_path / "nothing")


class Unknown(nn.Linear):
    pass


class Stateful(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Fft(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real


class TakesApart(nn.Module):
    """Reads a layer's weight beside calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fc(x), self.fc.weight)


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model[1].register_forward_hook(lambda module, args, out: out + 1)
    return model


UNSAVEABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "control flow": (lambda: nn.Sequential(nn.Linear(4, 4), Stateful()), "can't be traced.*convert and save the parts"),
    "subclass": (lambda: nn.Sequential(nn.Linear(4, 4), Unknown(4, 4)), r"layer '1' is a .*Unknown.*torch\.save"),
    "function": (lambda: nn.Sequential(nn.Linear(4, 4), Fft()), r"fft_fft.*torch\.export"),
    "hook": (_hooked, "has hooks.*remove them"),
    "parts": (TakesApart, "'fc.weight' lies inside 'fc'.*is used on its own too"),
}


@pytest.mark.parametrize("case", UNSAVEABLE)
def test_what_cannot_be_saved_is_named_and_nothing_written(case: str, tmp_path: Path) -> None:
    make, message = UNSAVEABLE[case]
    path = tmp_path / "m.cnncomp"
    path.write_text("old")
    model = cnncomp.convert(make(), torch.randn(2, 4), measure=False, cache=False)
    with pytest.raises(SerializationError, match=message):
        cnncomp.save(model, path)
    assert path.read_text() == "old" and _names(tmp_path) == ["m.cnncomp"]


def test_save_takes_converted_models_only(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="model: got DigitsNet, expected what cnncomp.convert returned"):
        cnncomp.save(DigitsNet(), tmp_path / "m")  # type: ignore[arg-type]
    assert not _names(tmp_path)


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
def test_failed_write_leaves_the_old_file(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = converted("dense")
    path = tmp_path / "m.cnncomp"
    path.write_text("old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="disk full"):
        cnncomp.save(model, path)
    monkeypatch.undo()
    assert path.read_text() == "old" and _names(tmp_path) == ["m.cnncomp"]


def _kernels(model: cnncomp.ConvertedModel) -> set[str]:
    return {m.kernel for m in model.modules() if isinstance(m, ConvertedLayer)}


@pytest.mark.parametrize("replan", ["auto", True, False])
@pytest.mark.parametrize("moved", [False, True])
def test_replanning(replan: Any, moved: bool, tmp_path: Path) -> None:
    """A quantised network that was planned dense becomes int8 where it is planned again."""
    int8, x = converted("int8")
    dense, _ = converted("int8", device="another machine" if moved else HERE)
    cnncomp.save(dense, tmp_path / "m")
    loaded = cnncomp.load(tmp_path / "m", replan=replan)
    if replan is True or (replan == "auto" and moved):
        assert _kernels(loaded) == {"conv2d_int8", "linear_int8"} and loaded.plan.device == HERE
        assert torch.equal(loaded(x), int8(x))
        assert loaded.conversion.inputs == dense.conversion.inputs
    else:
        assert _kernels(loaded) == {"dense.nchw", "dense.linear"}
        assert torch.equal(loaded(x), dense(x))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, factor: float) -> Tensor:
        return self.fc(x) * factor


def test_network_with_other_inputs_than_tensors_keeps_its_kernels(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    model = cnncomp.convert(Scaled(), (x, 3.0), measure=False, cache=False)
    model.plan.device = "another machine"
    cnncomp.save(model, tmp_path / "m")
    assert torch.equal(cnncomp.load(tmp_path / "m")(x, 3.0), model(x, 3.0))
    with pytest.raises(SerializationError, match="replan=False"):
        cnncomp.load(tmp_path / "m", replan=True)


def test_arguments_of_load(tmp_path: Path) -> None:
    saved = tmp_path / "m"
    cnncomp.save(converted("dense")[0], saved)
    with pytest.raises(ArgumentError, match="replan: got 'no'"):
        cnncomp.load(saved, replan="no")  # type: ignore[arg-type]
    with pytest.raises(DeviceError):
        cnncomp.load(saved, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="no CUDA device"):
            cnncomp.load(saved, device="cuda")
