"""The benches run in quick mode, note what their readers need, and can be drawn. No time is asserted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import cnncomp
from bench.crossover import LEVELS, PATTERNS, crossover
from bench.layers import NETWORKS, OUTPUT, calls, conv_shapes, random_layer
from bench.limits import limits
from bench.plot import read_results
from cnncomp.dispatch import CONV_CANDIDATES
from cnncomp.nn.dense import DIRECT_KERNEL
from tests.helpers import outside_xdist

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
    # In a process among several of pytest's, benchmarks would not be timed.
    env = outside_xdist()
    run = subprocess.run([*command, f"--benchmark-json={out}"], cwd=ROOT, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


def test_extra_info_of_a_quick_bench(results: Path) -> None:
    entries = json.loads(results.read_text())["benchmarks"]
    assert [entry["extra_info"]["kernel"] for entry in entries] == 2 * ["conv2d_int8"]
    for entry in entries:
        info = entry["extra_info"]
        assert set(info) == KEYS
        dense = {c.kernel for c in CONV_CANDIDATES if c.dense and "cpu" in c.devices}
        assert set(info["ms"]) == {info["kernel"], *dense} - {DIRECT_KERNEL}
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


def test_calls_are_the_layer_on_each_kernel() -> None:
    """All kernels of the table give the float layer's output, up to the steps of 8 bit."""
    shape = min(conv_shapes("resnet50"), key=lambda s: s.macs)
    layer, x = random_layer(shape, zeros=0.5, quantized=True)
    expected = layer(x)
    found = calls(layer, x, [c for c in CONV_CANDIDATES if c.kernel in PATTERNS[1].kernels])
    assert tuple(sorted(found)) == tuple(sorted(PATTERNS[1].kernels))
    with torch.inference_mode():
        for call in found.values():
            out = call()
            assert isinstance(out, torch.Tensor)
            got = out.float() * (OUTPUT.scale if out.dtype == torch.uint8 else 1.0)
            torch.testing.assert_close(got, expected, atol=2 * OUTPUT.scale, rtol=0.05)


def test_crossover_is_where_sparse_stays_ahead() -> None:
    assert crossover([(0.0, 1.2), (0.5, 1.4)]) == 0.0
    assert crossover([(0.0, 0.5), (0.5, 0.9)]) is None
    assert crossover([(0.0, 0.5), (0.4, 1.1), (0.6, 0.8), (0.8, 1.2)]) == pytest.approx(0.7)


def test_a_quick_crossover_bench(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.crossover", "--quick", "--networks", "mobilenet_v2", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    records = json.loads((tmp_path / "crossover.json").read_text())["records"]
    assert {(r["pattern"], r["sparsity"]) for r in records} == {(p.name, z) for p in PATTERNS for z in (0.0, 0.9, 0.99)}
    assert set(LEVELS) >= {r["sparsity"] for r in records}
    for r in records:
        pattern = next(p for p in PATTERNS if p.name == r["pattern"])
        assert set(r["ms"]) == set(pattern.kernels) and r["ms"][r["winner"]] == min(r["ms"].values())
        assert (r["ratio"] > 1) == (r["winner"] == pattern.kernels[-1])
    assert (tmp_path / "crossover.png").read_bytes().startswith(b"\x89PNG")
    assert "sparse from" in run.stdout


def test_limits_of_a_layer() -> None:
    shape = next(s for s in conv_shapes("resnet50") if s.name == "layer1.1.conv1")  # 256 to 64 channels, 56x56
    core = {"fma_fp32_gmacs": 10.0, "l1_gbs": 100.0, "l3_gbs": 20.0, "l3_write_gbs": 10.0}
    pixels, nonzero = 56 * 56, 500
    found = limits(shape, nonzero, core, sparse=True)
    assert found.multiply_adds == pytest.approx(pixels * nonzero / 10e6)
    assert found.l1_reads == pytest.approx(4 * pixels * nonzero / 100e6)
    assert found.traffic == pytest.approx(4 * pixels * (256 / 20e6 + 64 / 10e6))
    assert found.binds == "traffic" and found.ms == found.traffic
    assert limits(shape, nonzero, core, sparse=False).l1_reads == 0


@pytest.mark.skipif(shutil.which("c++") is None, reason="the core's limits are measured by a C++ program")
def test_a_quick_bench_of_limits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.limits", "--quick", "--networks", "mobilenet_v2", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "limits.json").read_text())
    shapes = conv_shapes("mobilenet_v2")
    assert [r["layer"] for r in found["records"]] == [s.name for s in shapes]
    for r, shape in zip(found["records"], shapes, strict=True):
        assert r["ms"] > 0 and 0 < r["macs"] <= shape.macs
        assert (r["kernel"] == "conv2d_sparse") == (r["sparsity"] > 0) == (shape.groups == 1 and shape.c > 4)
    assert "multiply adds" in run.stdout and f"{sum(s.count for s in shapes)}" in run.stdout
