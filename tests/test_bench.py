"""The benches run in quick mode, note what their readers need, and can be drawn. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import cnncomp
from bench.layers import NETWORKS, conv_shapes, random_layer
from bench.plot import read_results
from cnncomp.dispatch import CONV_CANDIDATES

ROOT = Path(__file__).resolve().parents[1]
KEYS = {
    "network", "layer", "count", "shape", "pattern", "kernel", "ms", "rival", "ratio", "gmac_per_s",
    "cpu", "isa", "threads", "versions",
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON of the int8 bench in quick mode, one network."""
    out = tmp_path_factory.mktemp("bench") / "cpu.json"
    command = [sys.executable, "-m", "pytest", "bench/bench_conv2d_int8.py", "--quick", "-k", "mobilenet_v2", "-q"]
    run = subprocess.run([*command, f"--benchmark-json={out}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


def test_extra_info_of_a_quick_bench(results: Path) -> None:
    entries = json.loads(results.read_text())["benchmarks"]
    assert [entry["extra_info"]["kernel"] for entry in entries] == 2 * ["conv2d_int8"]
    for entry in entries:
        info = entry["extra_info"]
        assert set(info) == KEYS
        assert set(info["ms"]) == {info["kernel"], *(c.kernel for c in CONV_CANDIDATES if c.dense)}
        assert all(ms > 0 for ms in info["ms"].values())
        rivals = {name: ms for name, ms in info["ms"].items() if name != info["kernel"]}
        assert info["ms"][info["rival"]] == min(rivals.values())
        assert info["ratio"] == pytest.approx(min(rivals.values()) / info["ms"][info["kernel"]])
        assert info["threads"] == 1 and info["versions"]["torch"] == torch.__version__


def test_plot_is_written(results: Path) -> None:
    run = subprocess.run([sys.executable, "bench/plot.py", results], cwd=ROOT, capture_output=True, text=True)
    picture = results.with_suffix(".png")
    assert run.returncode == 0 and run.stdout.strip() == str(picture), run.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_refuses_other_results(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"benchmarks": [{"extra_info": {}}]}))
    with pytest.raises(ValueError, match="no results of cnncomp's benches"):
        read_results(path)


@pytest.mark.parametrize("network", NETWORKS)
def test_shapes_are_those_of_the_network(network: str) -> None:
    """The file against the network itself: every convolution, its input and its multiply-adds."""
    model = getattr(cnncomp.models, network)().eval()
    found: dict[tuple[object, ...], int] = {}

    def record(conv: nn.Conv2d, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        key = (cnncomp.nn.Geometry.of(conv), *args[0].shape[2:], out[0].numel() * conv.weight[0].numel())
        found[key] = found.get(key, 0) + 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record)
    with torch.device("meta"):
        model.to("meta")(torch.empty(1, 3, 224, 224))
    shapes = conv_shapes(network)
    assert {(s.geometry, s.h, s.w, s.macs): s.count for s in shapes} == found
    modules = dict(model.named_modules())
    assert all(isinstance(modules[s.name], nn.Conv2d) for s in shapes)


def test_random_layer_has_the_zeros_that_were_asked_for() -> None:
    shape = conv_shapes("resnet50")[2]
    layer, x = random_layer(shape, zeros=0.9)
    zeros = float((layer.weight == 0).float().mean())
    assert zeros == pytest.approx(0.9, abs=0.02)
    assert tuple(layer(x).shape[1:2]) == (shape.k,) and layer.info.input is None
    assert random_layer(shape, quantized=True)[0].info.input is not None
