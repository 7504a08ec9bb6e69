"""The race of CPU engines: workers, their protocol, and what becomes of their times. No time is asserted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import cpu
from bench.peers import networks, report
from bench.peers.bars import ANY_PEER, BARS, OURS, Bar
from bench.peers.case import Case
from bench.peers.race import Engine, Entry, Worker, WorkerError, cores, rounds, started
from bench.peers.worker import compare, times
from cnncomp.models import resnet50

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(sys.executable)
TORCH, CNNCOMP = Engine("torch eager", "torch_eager", HERE), Engine("cnncomp", "cnncomp", HERE)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """MobileNetV2 with zeros, on small images."""
    variant = networks.Variant("sparse-85", 0.85)
    return networks.write("mobilenet_v2", variant, tmp_path_factory.mktemp("race"), batch=1, size=32, images=2)


def test_case_on_disk_is_the_network(case: Case) -> None:
    """The graph with BatchNorm folded, run by its own description, against the model's output."""
    assert Case.read(case.folder) == case
    steps, tensors = case.graph()
    found = {"input": torch.from_numpy(case.array("input"))}
    for step in steps:
        x = [found[name] for name in step["inputs"]]
        found[step["output"]] = y = run_step(step, tensors, x)
    np.testing.assert_allclose(y.numpy(), case.array("output"), atol=1e-4 * np.abs(case.array("output")).max())


def run_step(step: dict, tensors: dict, x: list[torch.Tensor]) -> torch.Tensor:
    f = torch.nn.functional
    if step["op"] in ("conv", "linear"):
        weight, bias = (torch.from_numpy(tensors[f"{step['layer']}.{name}"]) for name in ("weight", "bias"))
        if step["op"] == "linear":
            return f.linear(x[0], weight, bias)
        return f.conv2d(x[0], weight, bias, step["stride"], step["padding"], groups=step["groups"])
    return {
        "clamp": lambda: x[0].clamp(0, step.get("hi")),
        "add": lambda: x[0] + x[1],
        "mean": lambda: x[0].mean((2, 3), keepdim=True),
        "flatten": lambda: x[0].flatten(1),
    }[step["op"]]()


def test_macs_are_those_of_the_literature() -> None:
    """4.09 GMAC at 224x224: ResNet-50 with its strides in the 3x3 convolutions."""
    steps, tensors = networks.describe(resnet50().eval())
    dense, kept = networks.macs_of(steps, tensors, torch.Size((1, 3, 224, 224)))
    assert dense / 1e9 == pytest.approx(4.09, abs=0.005)
    assert kept == pytest.approx(dense, rel=1e-6)  # of millions of random weights one or two are zero


def test_zeros_are_in_the_layers_that_the_table_says(case: Case) -> None:
    steps, tensors = case.graph()
    for step in steps:
        if step["op"] not in ("conv", "linear"):
            continue
        weight = tensors[f"{step['layer']}.weight"]
        pruned = step["op"] == "conv" and weight.shape[2:] == (1, 1)
        assert (weight == 0).mean() == pytest.approx(0.85 if pruned else 0.0, abs=0.03), step["layer"]
    assert case.macs[1] < case.macs[0]


@pytest.mark.parametrize("engine", [TORCH, CNNCOMP], ids=lambda e: e.module)
def test_worker_gives_the_models_output_and_times(case: Case, engine: Engine, tmp_path: Path) -> None:
    with Worker(engine, case, 1, tmp_path / "log", patience=120) as worker:
        assert worker.ready["error"] < cpu.MAX_ERROR and worker.ready["cosine"] > 0.999
        entries = [Entry(worker, 1), Entry(worker, 3)]
        rounds(entries, 2, lambda _: None, warm=0.0, seconds=0.0, least=2)
        assert [len(e.ms) for e in entries] == [4, 4] and all(ms > 0 for e in entries for ms in e.ms)
    assert worker.process.poll() is not None


def test_idle_worker_is_stopped(case: Case, tmp_path: Path) -> None:
    with Worker(TORCH, case, 1, tmp_path / "log", patience=120) as worker:
        status = Path(f"/proc/{worker.process.pid}/stat")
        for _ in range(50):
            state = status.read_text().rsplit(")", 1)[1].split()[0]
            if state == "T":
                break
            time.sleep(0.02)
        assert state == "T"


def test_what_cannot_run_is_skipped_with_a_line(case: Case, tmp_path: Path) -> None:
    lines = []
    wanted = [
        (Engine("absent", "torch_eager", tmp_path / "no-python"), case, 1),
        (Engine("unknown", "no_such_engine", HERE), case, 1),
        (TORCH, dataclasses.replace(case, folder=tmp_path), 1),  # a folder without a model
    ]
    with started(wanted, tmp_path, lambda engine, _, why: lines.append((engine.name, why)), lambda _: None) as workers:
        assert not workers
    assert [name for name, _ in lines] == ["absent", "unknown", "torch eager"]
    assert (
        "not installed" in lines[0][1] and "ModuleNotFoundError" in lines[1][1] and "FileNotFoundError" in lines[2][1]
    )


def test_dead_worker_drops_out_and_the_others_go_on(case: Case, tmp_path: Path) -> None:
    with Worker(TORCH, case, 1, tmp_path / "a") as one, Worker(TORCH, case, 1, tmp_path / "b") as two:
        one.process.kill()
        one.process.wait()
        entries = [Entry(one, 1), Entry(two, 1)]
        rounds(entries, 2, lambda _: None, warm=0.0, seconds=0.0, least=1)
        assert entries[0].failed and not entries[0].ms and len(entries[1].ms) == 2


def test_silent_worker_is_given_up(case: Case, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="no answer in 0 s"):
        Worker(TORCH, case, 1, tmp_path / "log", patience=0.01)


def test_compare_notices_wrong_outputs() -> None:
    right = np.random.default_rng(0).normal(size=(2, 10))
    assert compare(right, right) == {"error": 0.0, "cosine": pytest.approx(1.0)}
    assert compare(right + 5, right)["error"] == pytest.approx(0.0)  # the same to all classes
    assert compare(right[:, ::-1], right)["cosine"] < 0.95
    assert compare(right[:1], right)["error"] == np.inf and compare(right * np.nan, right)["error"] == np.inf


def test_times_takes_enough_calls() -> None:
    calls: list[int] = []
    found = times(lambda: calls.append(1), warm=0.0, seconds=0.0, least=5)
    assert len(found) == 5 and len(calls) == 6  # one unmeasured


def test_cores_are_there() -> None:
    assert len(cores(1)) == 1
    with pytest.raises(ValueError, match="4096 threads on"):
        cores(4096)


def test_bars_are_ratios_of_medians() -> None:
    medians = {("net", "a", OURS): 2.0, ("net", "b", "x"): 5.0, ("net", "b", "y"): 3.0, ("net", "b", OURS): 1.0}
    assert Bar("net", "a", "x", "b", 1.0).ratio(medians) == (2.5, "x")
    assert Bar("net", "a", ANY_PEER, "b", 1.0).ratio(medians) == (1.5, "y")
    assert Bar("net", "a", OURS, "b", 1.0).ratio(medians) == (0.5, OURS)
    assert Bar("net", "c", "x", "b", 1.0).ratio(medians) is None
    assert Bar("net", "a", "z", "b", 1.0).ratio(medians) is None


def test_bars_name_variants_that_are_raced() -> None:
    for bar in BARS:
        names = {v.name: v for v in networks.VARIANTS[bar.network]}
        assert {bar.variant, bar.rival_variant} <= set(names)
        engines = [e for e in cpu.ENGINES if cpu.wanted(e, names[bar.rival_variant])]
        rivals = {cpu.ENGINES[e][0].name for e in engines}
        assert bar.rival in rivals if bar.rival != ANY_PEER else rivals - {OURS}


def made(**values: object) -> report.Record:
    base = report.Record("resnet50", "dense", OURS, "1", 1, 1, 10.0, 9.0, "cpu", 5, 1.0, 0.5, 1.0, 0.0, "")
    return dataclasses.replace(base, **values)  # type: ignore[arg-type]


def test_avx2_has_targets_of_its_own() -> None:
    medians = {("resnet50", "sparse-90", OURS): 1.0, ("resnet50", "sparse-90", "DeepSparse"): 2.0}
    reached = {isa: report.bars_table(medians, isa)[1][0]["reached"] for isa in (True, False)}
    assert reached == {True: True, False: False}


def test_scaling_compares_with_fewer_threads_and_smaller_batches() -> None:
    records = [
        made(), made(threads=2, ms_median=5.0), made(batch=2, ms_median=16.0), made(batch=4, ms_median=40.0),
        made(variant="int8"), made(engine="other", batch=8),
    ]  # fmt: skip
    _, rows = report.scaling_table(records, threads=1, batch=1)
    found = {(r["threads"], r["batch"]): (r["ratio"], r["reached"]) for r in rows}
    assert found == {
        (1, 1): (None, None),
        (2, 1): (2.0, True),
        (1, 2): (pytest.approx(1.25), True),
        (1, 4): (pytest.approx(0.8), False),
    }


def test_quick_race_writes_records_table_and_picture(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.cpu", "--quick", "--engines", "cnncomp,torch_eager"]
    command += ["--networks", "mobilenet_v2", "--variants", "dense,int8", "--no-scaling", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert {(r["variant"], r["engine"]) for r in found["records"]} == {
        ("dense", "cnncomp"), ("dense", "torch eager"), ("int8", "cnncomp"),
    }  # fmt: skip
    keys = {"network", "variant", "engine", "version", "threads", "batch", "ms_median", "ms_min", "cpu"}
    assert all(keys <= set(r) for r in found["records"])
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
