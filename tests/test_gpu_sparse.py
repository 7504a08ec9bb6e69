"""Modelled times of sparse kernels: bench/gpu_sparse.py."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bench.gpu_hardware import gpu_of
from bench.layers import ConvShape
from tests import cuda_emulated as emulated

pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
from bench import gpu_sparse

pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")

LAYER = ConvShape("net", "layer", 1, 128, 8, 8, 64, 3, 3, 1, 1, 1, 1)


def test_counts_of_a_2to4_layer():
    """64 channels x 64 pixels in whole tiles: the products are those of the dense layer, the weights 5/8 of its bytes."""
    run = gpu_sparse.run_2to4(LAYER, 1, "80", gpu_of("80"))
    assert run is not None and (run.pattern, run.sparsity) == ("2:4", 0.5)
    counts, launch = run.counted
    assert launch.sparse and launch.grid == 1 and launch.registers > 64
    assert counts["tensor_ops"] == 2 * LAYER.macs
    half = gpu_sparse.run_2to4(LAYER, 1, "80", gpu_of("80"), "fp16")
    assert half is not None and half.counted[0]["tensor_ops"] == 2 * LAYER.macs and half.counted[1].dtype == "fp16"
    assert launch.least_bytes == LAYER.c * 64 + LAYER.k * 9 * LAYER.c * 5 // 8 + LAYER.k * 64 + 12 * LAYER.k


def test_layers_that_the_kernel_cannot_run():
    narrow = ConvShape("net", "stem", 1, 3, 8, 8, 64, 3, 3, 1, 1, 1, 1)
    assert gpu_sparse.run_2to4(narrow, 1, "80", gpu_of("80")) is None
    assert gpu_sparse.records([narrow], 1, [gpu_of("80")]) == []


def test_masks_are_2to4():
    weight = gpu_sparse.two_to_four((3, 8, 2, 1), torch.int8)
    assert weight.sum() == weight.numel() // 2 and bool((weight.unflatten(1, (2, 4)).sum(2) == 2).all())


def test_report_and_records(monkeypatch, tmp_path, capsys):
    out = tmp_path / "gpu_model.json"
    out.write_text(json.dumps([{"kernel": "other"}, {"kernel": "old", "dense_us": 1.0}]))
    monkeypatch.setattr(gpu_sparse, "OUT", out)
    monkeypatch.setattr(gpu_sparse, "headers", lambda: None)
    monkeypatch.setattr(gpu_sparse, "gpu_shapes", lambda network: [LAYER])
    monkeypatch.setattr(sys, "argv", ["gpu_sparse", "--network", "resnet50", "--batch=1", "--gpu=A100", "--dtype=int8"])
    gpu_sparse.main()
    other, row = json.loads(out.read_text())
    assert other == {"kernel": "other"} and row["pattern"] == "2:4" and row["arch"] == "sm_80"
    text = capsys.readouterr().out
    assert (
        f"{row['dense_us']['own'] / row['us']:.2f}" in text and "modelled" in text and "nan" in text
    )  # no layer of 256 channels
