"""Modelled times of sparse kernels: bench/gpu_sparse.py."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bench.gpu_hardware import gpu_of
from bench.layers import ConvShape
from cnncomp.sparsity import unpack_2to4, unpack_gathered
from cnncomp.sparsity.blocks import kept_fraction
from tests import cuda_emulated as emulated

pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
from bench import gpu_sparse

pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")

LAYER = ConvShape("net", "layer", 1, 128, 8, 8, 64, 3, 3, 1, 1, 1, 1)


def test_counts_of_a_2to4_layer():
    """64 channels x 64 pixels in whole tiles: the products are those of the dense layer, the weights 5/8 of its bytes."""
    run = gpu_sparse.run_sparse(LAYER, 1, "80", gpu_of("80"))
    assert run is not None
    counts, launch = run[0]
    assert launch.sparse and launch.grid == 1 and launch.registers > 64
    assert counts["tensor_ops"] == 2 * LAYER.macs
    half = gpu_sparse.run_sparse(LAYER, 1, "80", gpu_of("80"), "fp16")
    assert half is not None and half[0][0]["tensor_ops"] == 2 * LAYER.macs and half[0][1].dtype == "fp16"
    assert launch.least_bytes == LAYER.c * 64 + LAYER.k * 9 * LAYER.c * 5 // 8 + LAYER.k * 64 + 12 * LAYER.k


def test_layers_that_the_kernel_cannot_run():
    narrow = ConvShape("net", "stem", 1, 3, 8, 8, 64, 3, 3, 1, 1, 1, 1)
    assert gpu_sparse.run_sparse(narrow, 1, "80", gpu_of("80")) is None
    assert gpu_sparse.records([narrow], 1, [gpu_of("80")]) == []


def test_masks():
    two, blocks = gpu_sparse.MASKS[0], gpu_sparse.Mask("blocks", 0.75)
    weight = unpack_2to4(two.packed((3, 16, 2, 1), torch.int8, 1), (3, 16, 2, 1), torch.int8)
    assert weight.sum() == weight.numel() // 2 and bool((weight.unflatten(1, (4, 4)).sum(2) == 2).all())
    shape = (140, 64, 3, 3)
    weight = unpack_gathered(blocks.packed(shape, torch.int8, 2), shape, torch.int8, 2)
    assert weight.sum() == weight.numel() // 4 and kept_fraction(weight, 64, 16, 2) == 0.25
    assert (blocks.pattern("int8"), blocks.pattern("fp16")) == ("block64x16", "block64x8")


def test_blocks_take_their_share_of_the_dense_products():
    run = gpu_sparse.run_sparse(LAYER, 1, "80", gpu_of("80"), "int8", gpu_sparse.Mask("blocks", 0.75))
    assert run is not None and not run[0][1].sparse
    # 18 of 72 blocks: three steps of eight
    assert run[0][0]["tensor_ops"] == 2 * LAYER.macs * 3 / 9


def test_report_and_records(monkeypatch, tmp_path, capsys):
    out = tmp_path / "gpu_model.json"
    out.write_text(json.dumps([{"kernel": "other"}, {"kernel": "old", "dense_us": 1.0}]))
    monkeypatch.setattr(gpu_sparse, "OUT", out)
    monkeypatch.setattr(gpu_sparse, "headers", lambda: None)
    monkeypatch.setattr(gpu_sparse, "gpu_shapes", lambda network: [LAYER])
    monkeypatch.setattr(sys, "argv", ["gpu_sparse", "--network", "resnet50", "--batch=1", "--gpu=A100", "--dtype=int8"])
    gpu_sparse.main()
    other, row, *blocks = json.loads(out.read_text())
    ops = [r["counters"]["tensor_ops"] for r in blocks]
    assert [r["sparsity"] for r in blocks] == [0.5, 0.75, 0.9, 0.95] and ops[3] < ops[0]
    assert other == {"kernel": "other"} and row["pattern"] == "2:4" and row["arch"] == "sm_80"
    text = capsys.readouterr().out
    assert (
        f"{row['dense_us']['own'] / row['us']:.2f}" in text and "modelled" in text and "nan" in text
    )  # no layer of 256 channels
