"""The command line: what it writes is what the Python functions give, and errors are one line with exit code 2."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import cnncomp
from cnncomp import cli, doctor
from cnncomp.errors import ArgumentError, CnncompError

image_module = pytest.importorskip("PIL.Image")

MODULE = """
import torch
from torch import nn

number = 3

def build():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )

def grey():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))

def needs(width):
    return nn.Linear(width, 5)

def fails():
    raise RuntimeError("no weights\\nhere")

class Two(nn.Module):
    def forward(self, x, y):
        return x + y
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def trained() -> nn.Sequential:
    """The network of MODULE with weights of its own."""
    namespace: dict[str, object] = {}
    exec(MODULE, namespace)
    network = namespace["build"]()  # type: ignore[operator]
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.5).add_(0.01)
    return network.eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the module tinynet, its weights and twelve images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "tinynet", raising=False)
    (tmp_path / "tinynet.py").write_text(MODULE)
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    (tmp_path / "broken.py").write_text("def build(:")
    cnncomp.save(cnncomp.convert(trained(), torch.randn(1, 3, 16, 16), measure=False), tmp_path / "saved.cnncomp")
    (tmp_path / "images").mkdir()
    for i in range(12):
        pixels = torch.randint(0, 256, (20 + i, 24, 3), dtype=torch.uint8)
        image_module.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i:02}.png")
    return tmp_path


NETWORK = ("--model", "tinynet:build", "--weights", "weights.pt", "--size", 16)
COMPRESS = ("compress", *NETWORK, "--images", "images", "--out", "x")


def pictures() -> Tensor:
    return cli.read_images(Path("images"), 16)


def test_version_and_entry_point() -> None:
    assert run("--version").output == f"cnncomp {cnncomp.__version__}\n"
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="cnncomp")
    assert entry.load() is cli.main


@pytest.mark.parametrize("command", ["compress", "convert", "profile", "demo", "doctor"])
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: cnncomp {command}" in " ".join(result.output.split())
    assert command in run("--help").output


def test_compress_to_a_target(folder: Path) -> None:
    result = run("compress", *NETWORK, "--images", "images", "--out", "a.cnncomp", "--accuracy-drop", "1")
    assert result.exit_code == 0, result.output
    assert "reached (at most 100 points lost)" in " ".join(result.output.split())
    assert cnncomp.load(folder / "a.cnncomp", replan=False)(pictures()[:1]).shape == (1, 5)
    result = run("compress", *NETWORK, "--images", "images", "--out", "b.cnncomp", "--latency", "0")
    assert result.exit_code == 2 and "latency: got 0" in result.output
    assert not (folder / "b.cnncomp").exists()


def test_compress_is_the_python_function(folder: Path) -> None:
    result = run("compress", *NETWORK, "--images", "images", "--out", "a.cnncomp", "--no-measure", "--exclude", "0")
    assert result.exit_code == 0, result.output
    x = pictures()
    calibration, held_out = cli.split(x)
    recipe = cnncomp.Recipe(exclude=("0",))
    expected = cnncomp.compress(trained(), list(calibration.split(8)), recipe, example_inputs=x[:1], measure=False)
    loaded = cnncomp.load("a.cnncomp")
    assert torch.equal(loaded(x), expected(x))
    assert {name: p.kernel for name, p in loaded.plan.layers.items()} == {
        "0": "dense.direct", "3": "conv2d_int8", "7": "linear_int8",
    }  # fmt: skip
    same = int((loaded(held_out).argmax(1) == trained()(held_out).argmax(1)).sum())
    assert len(held_out) == 2 and f"same class as full precision on {same} of 2 images" in result.output
    assert f"{(folder / 'a.cnncomp').stat().st_size / 1e6:.2f} MB in a.cnncomp" in result.output


def test_compress_takes_patterns_and_methods(folder: Path) -> None:
    options = ("--no-measure", "--pattern", "2:4", "--method", "minmax", "--rounding", "adaptive")
    options += ("--float-dtype", "bfloat16")
    result = run("compress", *NETWORK, "--images", "images", "--out", "a.cnncomp", *options)
    assert result.exit_code == 0, result.output
    x = pictures()
    recipe = cnncomp.Recipe(pattern="2:4", reconstruct=True, method="minmax", rounding="adaptive")
    batches = list(cli.split(x)[0].split(8))
    expected = cnncomp.compress(trained(), batches, recipe, example_inputs=x[:1], measure=False)
    loaded = cnncomp.load("a.cnncomp")
    assert torch.equal(loaded(x), expected(x)) and loaded.plan.float_dtype == "bfloat16"
    for wrong in (("--pattern", "4:2"), ("--method", "guess"), ("--rounding", "up"), ("--float-budget", "2")):
        result = run("compress", *NETWORK, "--images", "images", "--out", "b.cnncomp", *wrong)
        assert result.exit_code == 2 and "Error" in result.output, wrong
        assert not (folder / "b.cnncomp").exists()


def test_compress_prunes_and_leaves_precision(folder: Path) -> None:
    arguments = ("--images", "images", "--out", "a.cnncomp", "--no-measure", "--sparsity", 0.75, "--no-int8")
    result = run("compress", *NETWORK, *arguments)
    assert result.exit_code == 0, result.output
    kernels = [p.kernel for p in cnncomp.load("a.cnncomp").plan.layers.values()]
    assert kernels == ["dense.direct", "conv2d_sparse", "dense.linear"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".ckpt"])
def test_convert_keeps_the_zeros_that_are_there(folder: Path, suffix: str) -> None:
    network = cnncomp.remove_masks(cnncomp.prune(trained(), sparsity=0.9, scope="layer", include_first_last=True))
    path = folder / f"pruned{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(network.state_dict(), path)
    else:
        torch.save(
            {"state_dict": network.state_dict(), "epoch": 3} if suffix == ".ckpt" else network.state_dict(), path
        )
    arguments = ("--model", "tinynet:build", "--weights", path, "--size", 16, "--out", "b.cnncomp", "--no-measure")
    result = run("convert", *arguments, "--images", "images")
    assert result.exit_code == 0, result.output
    assert "of 12 images" in result.output
    loaded = cnncomp.load("b.cnncomp")
    torch.testing.assert_close(loaded(pictures()), network(pictures()), rtol=1e-4, atol=1e-5)
    assert {p.kernel for p in loaded.plan.layers.values()} == {"conv2d_sparse", "linear_sparse"}
    assert run("convert", *arguments).exit_code == 0  # without images


def test_compress_takes_channels_out(folder: Path) -> None:
    result = run(*COMPRESS, "--no-measure", "--no-int8", "--pattern", "channel", "--sparsity", 0.5)
    assert result.exit_code == 0, result.output
    assert cnncomp.load("x").network.get_submodule("0").weight.shape[0] < 16


def test_convert_measures(folder: Path) -> None:
    result = run("convert", *NETWORK, "--out", "c.cnncomp", "--threads", 1, "--float-dtype", "float16")
    assert result.exit_code == 0, result.output
    plan = cnncomp.load("c.cnncomp").plan
    assert plan.float_dtype == "float16"
    assert plan.measured and all(ms > 0 for ms in plan.layers["0"].ms.values())


def test_profile_writes_json_and_csv(folder: Path) -> None:
    run("convert", *NETWORK, "--out", "c.cnncomp", "--no-measure")
    result = run("profile", "c.cnncomp", "--json", "p.json", "--csv", "p.csv")
    assert result.exit_code == 0, result.output
    layers = json.loads(Path("p.json").read_text())["layers"]
    assert [(row["name"], row["shape"]) for row in layers] == [("0", "1×3×16×16"), ("3", "1×16×8×8"), ("7", "1×32")]
    rows = list(csv.DictReader(Path("p.csv").read_text().splitlines()))
    assert [row["kernel"] for row in rows] == [row["kernel"] for row in layers]
    assert run("profile", "c.cnncomp", "--shape", "2,3,12,10", "--json", "q.json").exit_code == 0
    assert json.loads(Path("q.json").read_text())["layers"][0]["shape"] == "2×3×12×10"


@pytest.mark.parametrize("shape", ["", "1,3,a,4", "1,0,4,4", "1,3,4,"])
def test_bad_shape(shape: str) -> None:
    with pytest.raises(ArgumentError, match="--shape"):
        cli.parse_shape(shape)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("profile", "nosuch.cnncomp"), "nosuch.cnncomp"),
        (("profile", "tinynet.py"), "not a file that cnncomp.save wrote"),
        (("convert", "--model", "tinynet", "--out", "x"), "MODULE:FUNCTION"),
        (("convert", "--model", "nosuchmodule:build", "--out", "x"), "nosuchmodule"),
        (("convert", "--model", "tinynet:nosuch", "--out", "x"), "nosuch"),
        (("convert", "--model", "tinynet:number", "--out", "x"), "torch.nn.Module"),
        (("convert", "--model", "torch.nn:Identity", "--weights", "weights.pt", "--out", "x"), "--weights"),
        (("convert", "--model", "tinynet:build", "--weights", "tinynet.py", "--out", "x"), "can't be read as weights"),
        (("convert", "--model", "tinynet:build", "--weights", "nosuch.pt", "--out", "x"), "nosuch.pt"),
        (("convert", *NETWORK, "--device", "toaster", "--out", "x"), "device"),
        (("compress", *NETWORK, "--images", "nosuch", "--out", "x"), "folder"),
        (("compress", *NETWORK, "--images", "images", "--out", "x", "--sparsity", 2), "sparsity"),
        (("compress", *NETWORK, "--images", "images", "--out", "nosuch/x", "--no-measure"), "nosuch"),
        ((*COMPRESS, "--sparsity", -0.5, "--no-int8"), "sparsity: got -0.5"),
        ((*COMPRESS, "--method", "kl", "--no-int8"), "method: got 'kl'"),
        ((*COMPRESS, "--pattern", "channel", "--reconstruct"), "reconstruct: got True"),
        ((*COMPRESS, "--latency", 0.5, "--reconstruct"), "reconstruct: got True"),
        ((*COMPRESS, "--latency", 0.5, "--float-budget", 0.1), "float_budget: got 0.1"),
        ((*COMPRESS, "--latency", 0.5, "--no-measure"), "measure: got False"),
        (("demo", "--only", "nosuch"), "mobilenet"),
        (("convert", "--model", "tinynet:needs", "--out", "x"), "takes no arguments"),
        (("convert", "--model", "tinynet:fails", "--out", "x"), "RuntimeError: no weights"),
        (("convert", "--model", "broken:build", "--out", "x"), "SyntaxError"),
        (("convert", "--model", "tinynet:Two", "--out", "x"), "--size and --channels"),
        (("convert", "--model", "tinynet:grey", "--out", "x"), "--size and --channels"),
        (("convert", "--model", "tinynet:grey", "--channels", 1, "--size", 20, "--out", "x"), "--size and --channels"),
        (
            ("compress", "--model", "tinynet:grey", "--images", "images", "--out", "x", "--size", 16),
            "--size and --channels",
        ),
        (("compress", *NETWORK, "--images", "images", "--out", "x", "--channels", 2), "--channels: got 2"),
        (("convert", *NETWORK, "--channels", 5, "--out", "x"), "--size and --channels"),
        (("convert", *NETWORK, "--out", "images"), "--out: got 'images' ('images' is a folder)"),
        (("profile", "saved.cnncomp", "--shape", "1,3"), "--shape"),
        (("profile", "saved.cnncomp", "--shape", "1,1,32,32"), "--shape"),
        (("profile", "saved.cnncomp", "--json", "nosuch/p.json"), "--json"),
    ],
)
def test_errors_are_one_line(folder: Path, arguments: tuple[object, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output and len(result.output.strip().splitlines()) == 1
    assert result.output.startswith("Error: ") and not Path("x").exists()
    debug = run(*arguments, "--debug")
    assert isinstance(debug.exception, (CnncompError, OSError))


def test_output_is_checked_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cnncomp, "convert", None)
    result = run("convert", *NETWORK, "--out", "nosuch/x")
    assert result.exit_code == 2 and "--out: got 'nosuch/x' ('nosuch' does not exist)" in result.output
    with pytest.raises(OSError, match="nosuch/x'$"):
        cnncomp.save(cnncomp.load("saved.cnncomp"), "nosuch/x")


def test_grey_images(folder: Path) -> None:
    arguments = ("--model", "tinynet:grey", "--images", "images", "--size", 16, "--channels", 1, "--no-measure")
    result = run("compress", *arguments, "--out", "g.cnncomp")
    assert result.exit_code == 0, result.output
    x = cli.read_images(Path("images"), 16, 1)
    assert x.shape == (12, 1, 16, 16)
    rgb = pictures()
    torch.testing.assert_close(x.mean(), rgb.mean(), rtol=0.2, atol=0.05)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("form", ["plain", "model", "state_dict", "model_state_dict", "wrapped", "compiled"])
def test_state_dicts_as_they_come(folder: Path, suffix: str, form: str) -> None:
    """Of a pruned network as it trains, in checkpoints, and behind wrappers."""
    network = cnncomp.prune(trained(), sparsity=0.75)
    with torch.no_grad():
        network[3].parametrizations.weight.original.add_(0.01)  # only the mask says what is zero
    weights = network.state_dict()
    if form in ("wrapped", "compiled"):
        weights = {f"{'module.' if form == 'wrapped' else '_orig_mod.'}{k}": v for k, v in weights.items()}
    if suffix == ".safetensors":
        safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, f"w{suffix}")
    else:
        torch.save({form: weights, "epoch": 3} if form.endswith(("model", "dict")) else weights, f"w{suffix}")
    loaded = cli.load_network("tinynet:build", Path(f"w{suffix}"))
    assert torch.equal(loaded(pictures()), network(pictures()))
    assert torch.equal(loaded[3].weight == 0, network[3].weight == 0)


def test_weights_of_a_quantised_network_are_refused(folder: Path) -> None:
    torch.save(cnncomp.quantize(trained(), [pictures()], progress=False).state_dict(), "q.pt")
    result = run("convert", "--model", "tinynet:build", "--weights", "q.pt", "--out", "x")
    assert result.exit_code == 2 and "quantised" in result.output and "layer '0'" in result.output


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("owned"),)


def test_weights_run_no_code(folder: Path) -> None:
    torch.save({"state_dict": Malicious()}, "evil.pt")
    result = run("convert", "--model", "tinynet:build", "--weights", "evil.pt", "--out", "x")
    assert result.exit_code == 2 and "can't be read as weights" in result.output
    assert not Path("owned").exists()


def test_every_fifth_image_is_held_out_of_ten() -> None:
    few = torch.arange(9).view(9, 1)
    assert all(torch.equal(part, few) for part in cli.split(few))
    calibration, held_out = cli.split(torch.arange(23).view(23, 1))
    assert held_out.flatten().tolist() == [4, 9, 14, 19]
    assert sorted([*calibration.flatten().tolist(), *held_out.flatten().tolist()]) == list(range(23))


def test_doctor_finds_that_every_kernel_works() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    for kernel in doctor.CHECKS:
        assert [f"{kernel},", "cpu", "works"] in lines
    assert torch.__version__ in result.output


def test_doctor_sees_a_broken_kernel_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    def fails(device: torch.device) -> bool:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    monkeypatch.setitem(doctor.CHECKS, "linear_int8", fails)
    monkeypatch.setattr(cnncomp.nn.QuantConv2d, "forward", lambda self, x: torch.zeros(1))
    result = run("doctor")
    text = " ".join(result.output.split())
    assert result.exit_code == 0
    assert "conv2d_int8, cpu gives wrong results" in text
    assert "linear_int8, cpu does not run: RuntimeError: no such instruction" in text
    assert "pip install --no-deps foolbox==3.3.4" in text


@pytest.mark.parametrize("nvcc", [None, "13.0, /usr/bin/nvcc"])
def test_doctor_says_how_to_get_the_cuda_kernels(nvcc: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_nvcc", lambda: nvcc)
    monkeypatch.setattr("cnncomp.ops.cuda._cuda", None)
    (found,) = (f for f in doctor.examine() if f.topic == "CUDA kernels")
    assert ("install the CUDA toolkit" in found.advice) == (nvcc is None) and "install" in found.advice
