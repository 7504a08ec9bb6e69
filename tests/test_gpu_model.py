"""The model of bench/gpu_model.py: its facts against published peaks, its bounds on kernels whose answer is known."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.gpu_hardware import GPUS, REGISTERS, RTX_3070, blocks_per_sm, gpu_of
from bench.gpu_model import (
    LABEL,
    LAUNCH,
    VARIATIONS,
    Calibration,
    Launch,
    bounds,
    main,
    merge,
    model,
    records,
    sample_of,
    save,
    touched,
)
from bench.gpu_report import averages, compare, lacking, overview, ratios, report
from bench.gpu_validation import CONV_FILES, count, counted, modelled, points, ranks, spearman, within_layers
from bench.layers import gpu_shapes
from bench.plot import plot_gpu, plot_gpu_means
from tests import cuda_emulated as emulated
from tests.ptx import emulate, load
from tests.ptx.test_checks import KERNEL

#: Dense int8 TOPS; dense fp16 TFLOPS with fp32 sums.
PUBLISHED = {"T4": (130, 65), "A100": (624, 312), "RTX 3090": (284, 71), "RTX 4090": (660.6, 165.2), "H100": (1979, 989.5),
             "RTX 5090": (838, 209.5), "RTX 3070": (162.6, 40.6)}  # fmt: skip


@pytest.mark.parametrize("gpu", [*GPUS, RTX_3070], ids=lambda gpu: gpu.name)
def test_peaks_are_the_published_ones(gpu):
    int8, fp16 = PUBLISHED[gpu.name]
    assert gpu.int8_peak / 1e12 == pytest.approx(int8, rel=0.01)
    assert gpu.sms * gpu.fp16_ops * gpu.clock / 1e3 == pytest.approx(fp16, rel=0.01)
    assert gpu is RTX_3070 or gpu_of(gpu.arch) is gpu


def test_occupancy():
    """What NVIDIA's occupancy calculator gives for these."""
    a100, t4 = gpu_of("80"), gpu_of("75")
    assert blocks_per_sm(a100, 256, 32, 0) == 8  # threads
    assert blocks_per_sm(a100, 128, 128, 0) == 4  # registers
    assert blocks_per_sm(a100, 128, 40, 48 << 10) == 3  # shared memory, and 1 KB each
    assert blocks_per_sm(a100, 32, 16, 0) == 32  # blocks
    assert blocks_per_sm(t4, 256, 255, 0) == REGISTERS // (256 * 256)
    assert blocks_per_sm(t4, 1024, 32, 0) == 1


def scale_kernel(blocks, only=None):
    x, out = torch.zeros(64 * blocks, dtype=torch.int32), torch.zeros(64 * blocks)
    return emulate(load(KERNEL, "scale"), blocks, 64, [x, out, 1.0, 64 * blocks], blocks=only).summary()


def test_copy_is_bound_by_memory():
    """A kernel that reads and writes each word once can't be faster than DRAM."""
    gpu, blocks = gpu_of("80"), 4000
    result = scale_kernel(blocks)
    found = bounds(result, Launch(blocks, 64, 16, 0), gpu)
    assert found["dram"] == pytest.approx(2 * 4 * 64 * blocks / gpu.dram)
    assert found["tensor"] == found["shared"] == 0 and "latency" not in found
    answer = model(result, Launch(blocks, 64, 16, 0), gpu)
    assert answer["us"] > max(answer["bounds_us"].values()) + LAUNCH * 1e6
    assert answer["waves"] == 2 and answer["blocks_per_sm"] == 32


def test_sample_scales_to_the_grid():
    gpu, blocks = gpu_of("80"), 400
    launch = Launch(blocks, 64, 16, 2 * 4 * 64 * blocks)
    whole, part = scale_kernel(blocks), scale_kernel(blocks, sample_of(blocks))
    assert part["blocks"] < blocks
    for name, seconds in bounds(whole, launch, gpu).items():
        assert bounds(part, launch, gpu)[name] == pytest.approx(seconds, rel=0.01), name


def test_issue_counts_the_busiest_multiprocessor():
    """One block more than there are multiprocessors doubles the bound of an SM, not that of the chip."""
    gpu = gpu_of("80")
    one, two = (bounds(scale_kernel(n), Launch(n, 64, 16, 0), gpu) for n in (gpu.sms, gpu.sms + 1))
    assert two["issue"] == pytest.approx(2 * one["issue"])
    assert two["dram"] == pytest.approx(one["dram"] * (gpu.sms + 1) / gpu.sms)


def test_sample_of_blocks():
    assert sample_of(90) is None
    found = sample_of(1000)
    assert len(found) == 48 and found[0] == 0 and found[-1] == 999
    found = sample_of(200, 16, row=25)  # an eighth of the grid ends it, and of the sample
    assert found == [*range(8), *range(169, 177)] and sum(i >= 175 for i in found) == 2
    assert sample_of(200, 16, row=300)[-1] == 199


def test_report_says_that_it_is_a_model():
    row = {
        "network": "n",
        "batch": 1,
        "gpu": "A100",
        "us": 10.0,
        "count": 2,
        "macs": 10**6,
        "bound": "issue",
        "peer": None,
        "pattern": "dense",
    }
    text = report([row])
    assert LABEL in text and "0.020" in text


def test_norm_and_shares():
    """Two equal bounds at half their peaks: together 2 ** (1/p) times as long as one, which takes twice the bound."""
    gpu = gpu_of("80")
    counts = dict(tensor_ops=0, instructions=4 * 10**6, wavefronts=10**6, l2_bytes=0, dram_bytes=0, bytes_in_flight=0, blocks=1,
                  warps=1, shared_bytes=0, classes={})  # fmt: skip
    alone = 10**6 / (gpu.clock * 1e9)
    found = model(counts, Launch(1, 32, 16, 0), gpu, Calibration(0.5, 1.0, 1.0, norm=2.0, step=1.0))
    assert found["us"] == pytest.approx(1e6 * (2 * alone * 2**0.5 + LAUNCH))


def test_larger_input_than_cache_is_read_by_each_sweep():
    gpu, mega = gpu_of("80"), 1 << 20
    counts = dict(tensor_ops=0, instructions=1, wavefronts=0, l2_bytes=10**9, dram_bytes=0, bytes_in_flight=0, blocks=1,
                  warps=1, shared_bytes=0, classes={})  # fmt: skip
    launch = lambda read: Launch(10**5, 32, 16, read + mega, "int8", read, 4)  # noqa: E731
    fits, not_so = bounds(counts, launch(gpu.l2 - 1), gpu)["dram"], bounds(counts, launch(gpu.l2 + 1), gpu)["dram"]
    assert fits * gpu.dram == pytest.approx(gpu.l2 + mega, rel=1e-6)
    assert not_so * gpu.dram == pytest.approx(4 * gpu.l2 + mega, rel=1e-6)


def test_touched():
    assert [touched(8, 1, 2), touched(8, 3, 2), touched(1, 1, 2), touched(8, 1, 1)] == [0.5, 1, 1, 1]


def test_spearman():
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(a, a**3) == 1 and spearman(a, -a) == -1 and spearman(a, np.ones(4)) == 0
    assert spearman(a, np.array([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)
    assert ranks(np.array([5.0, 1.0, 5.0])).tolist() == [1.5, 0.0, 1.5]


def test_ranking_within_layers():
    """A layer that is slower as a whole says nothing of its tiles, nor do tiles that hardly differ."""
    published = np.array([1.0, 2.0, 100.0, 103.0])
    assert within_layers(published, published, [[0, 1], [2, 3]]) == (1, 1)
    assert within_layers(np.array([2.0, 1.0, 103.0, 100.0]), published, [[0, 1], [2, 3]]) == (-1, 0)
    assert within_layers(np.array([1.0, 2.0, 103.0, 100.0]), published, [[0, 1], [2, 3]]) == (pytest.approx(0.8), 1)


def test_model_against_published_times():
    """On the GEMMs that the constants were not fitted to: median and worst error, rank correlation."""
    everything = points()
    us = modelled(everything, counted(everything), VARIATIONS[0])
    held = [i for i, p in enumerate(everything) if not p.fitted]
    published = np.array([p.us for p in everything])
    error = np.abs(us / published - 1)[held]
    assert len(held) >= 9 and np.median(error) <= 0.2 and error.max() <= 0.5
    assert spearman(us[held], published[held]) >= 0.95


def test_convolutions_are_read_from_the_profilers_files(tmp_path):
    """Rows of kernels that were counted, of the right instruction and width; others are left out."""
    row = {"Operation": "x_align16", "min_cc": 80, "iterator_algorithm": "optimized", "cta_m": 128, "cta_n": 128, "cta_k": 64,
           "stages": 5, "warps_m": 2, "warps_n": 2, "n": 256, "h": 56, "c": 64, "k": 256, "r": 1, "stride_h": 1, "pad_h": 0,
           "Runtime": 2.5}  # fmt: skip
    others = [{"Operation": "x_align4"}, {"min_cc": 75}, {"iterator_algorithm": "analytic"}, {"cta_m": 512}]
    lines = [",".join(row)] + [",".join(str(v) for v in {**row, **o}.values()) for o in ({}, *others)]
    for dtype, name in CONV_FILES.items():
        (tmp_path / name).write_text("\n".join(lines if dtype == "int8" else lines[:1]) + "\n")
    found = [p for p in points(tmp_path) if len(p.problem) == 7]
    assert [(p.us, p.kernel["warp_m"], p.fitted) for p in found] == [(2500.0, 64, True)]
    assert len(counted(found)) == 1


@pytest.mark.skipif(not os.environ.get("CNNCOMP_GPU_FULL"), reason="make test-gpu-full")
def test_counts_of_published_kernels_are_kept():
    """What counts.json keeps is what the emulator counts now."""
    pytest.importorskip("cutlass_library", reason="without the extra gpu-lab")
    point = next(p for p in points() if p.kernel["m"] == 128)
    assert [count(point)] == counted([point])


def test_layers_of_vgg16():
    """15.47 billion multiply-adds of an image (Simonyan and Zisserman 2014, configuration D)."""
    assert sum(s.count * s.macs for s in gpu_shapes("vgg16")) == pytest.approx(15.47e9, rel=1e-3)
    assert gpu_shapes("resnet50")[-1].name == "fc"


def test_seconds_of_the_emulator(monkeypatch, capsys):
    """A line for each layer, without and with all checks, and the slowest of each."""
    pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
    gpu_emulator = pytest.importorskip("bench.gpu_emulator")
    if emulated.NVCC is None:
        pytest.skip("nvcc is not installed")
    small, large = (replace(gpu_emulator.GEMM, name=str(h), c=64, k=64, h=h, w=h) for h in (4, 24))
    monkeypatch.setattr(gpu_emulator, "GEMM", small)
    monkeypatch.setattr(gpu_emulator, "gpu_shapes", lambda network: [large])
    monkeypatch.setattr("sys.argv", ["gpu_emulator"])
    gpu_emulator.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["4", "24", "slowest"]


def row_of(layer, us, peer=None):
    return {"network": "n", "layer": layer, "gpu": "A100", "batch": 8, "peer": peer, "dtype": "int8", "pattern": "dense",
            "us": us, "pass_us": 20.0 if peer else 0.0, "us_varied": [us, us * (1.5 if peer else 1.0)]}  # fmt: skip


def test_a_sparse_peer_stands_beside_both_patterns():
    """The dense kernel's time is not taken for the sparse one's, and a layer without a sparse kernel is left out."""
    sparse = {"pattern": "2:4"}
    rows = [row_of("a", 10.0), row_of("a", 5.0) | sparse, row_of("b", 10.0)]
    rows += [row_of(layer, 8.0, "cutlass") | sparse for layer in "ab"]
    key = ("n", "A100", 8, "cutlass int8 2:4")
    assert ratios(rows)[key] == {"a": [0.8, 1.2], "b": [0.8, 1.2]}
    assert ratios(rows, pattern="2:4") == {key: {"a": [8 / 5, 12 / 5]}}
    assert overview(rows, ["A100"]).splitlines()[-1].endswith("| 0.80 | 1.60 |")


def test_sparse_kernels_are_among_the_records(monkeypatch):
    pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr("bench.layers.gpu_shapes", lambda network: [])
    kinds = lambda masks: [mask.format for mask in masks]  # noqa: E731
    monkeypatch.setattr(
        "bench.gpu_sparse.records", lambda shapes, batch, gpus, masks: [(batch, len(gpus), *kinds(masks))]
    )
    assert records("resnet50", 8) == [(8, len(GPUS) - 1, "sparse24")]


def test_comparison(tmp_path):
    rows = [
        row_of("a", 10.0),
        row_of("b", 10.0),
        row_of("a", 40.0, "cutlass"),
        row_of("b", 10.0, "cutlass"),
        row_of("c", 1.0),
    ]
    assert ratios(rows) == {("n", "A100", 8, "cutlass int8 dense"): {"a": [4.0, 6.0], "b": [1.0, 1.5]}}
    head, _, line = compare(rows).splitlines()
    assert LABEL in head and line == "| n | A100 | 8 | cutlass int8 dense | 2 | 2.00 | 2.00..3.00 | 1.00 | 4.24 |"
    whole = overview(rows, ["A100"]).splitlines()
    assert (
        whole[2].split("|")[1:] == [" n ", " A100 ", " 8 ", " 2.00 ", " 4.24 ", ""]
        and overview(rows, ["T4"]).count("\n") == 1
    )
    assert plot_gpu(ratios(rows), tmp_path / "a.png").stat().st_size > 5000
    assert averages(rows)["n", "A100", 8] == {"CUTLASS int8": 2.0, "and its pass": pytest.approx(18**0.5)}
    assert plot_gpu_means(averages(rows), tmp_path / "b.png").stat().st_size > 5000


def test_records_are_merged_one_by_one(tmp_path, monkeypatch):
    """Newer ones win in their places only; a layer of another shape, peer, dtype or pattern is another place."""
    old = [row_of("a", 1.0), row_of("a", 2.0, "inductor"), row_of("b", 3.0) | {"kernel": "old"}]
    new = [row_of("b", 4.0) | {"kernel": "new"}, row_of("a", 5.0) | {"shape": {"c": 1}}, row_of("a", 6.0, "cutlass")]
    assert merge(old, new) == [*old[:2], *new]
    monkeypatch.setattr("bench.gpu_model.OUT", tmp_path / "new" / "rows.json")
    assert save(old, keep=True) == old and save(new, keep=True) == [*old[:2], *new]
    assert json.loads((tmp_path / "new" / "rows.json").read_text()) == [*old[:2], *new]
    assert save(new, keep=False) == new


def test_empty_cells_say_why():
    rows = [row_of("a", 10.0) | {"gpu": gpu, "batch": batch} for gpu in ("A100", "T4") for batch in (1, 8)]
    rows += [row_of("a", 20.0, "inductor"), row_of("b", 20.0, "triton") | {"batch": 1}, row_of("a", 10.0, "triton")]
    cells = [
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in overview(rows + [row_of("a", 30.0, "cutlass") | {"gpu": "T4"}]).splitlines()[2:]
    ]
    assert ["T4", "8", "3.00", "5.00", "no kernel", "no kernel"] in cells
    assert ["A100", "8", "not counted", "not counted", "2.00", "1.00"] in cells
    assert lacking(rows, ("n", "A100", 1), "inductor int8") == "not counted"
    assert lacking(rows, ("n", "A100", 1), "plain Triton int8") == "no kernel"


@pytest.mark.parametrize("option, value", [("gpu", "A1000"), ("network", "resnet51"), ("batch", "0"), ("batch", "x")])
def test_unknown_arguments_are_named(option, value, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_model", f"--{option}", value])
    with pytest.raises(SystemExit):
        main()
    error = capsys.readouterr().err
    assert f"argument --{option}" in error and repr(value) in error
