"""Modelled times of sparse kernels: bench/gpu_sparse.py."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import pytest
import torch

from bench.gpu_hardware import gpu_of
from bench.layers import ConvShape
from cnncomp.sparsity import unpack_2to4, unpack_gathered, unpack_vnm, vnm
from cnncomp.sparsity.blocks import kept_fraction
from tests import cuda_emulated as emulated

pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
from bench import gpu_model, gpu_sparse

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
    some = [gpu_sparse.MASKS[0], gpu_sparse.MASKS[1]]
    assert gpu_sparse.records([narrow], 1, [gpu_of("80")], masks=some) == []
    assert gpu_sparse.run_sparse(narrow, 1, "80", gpu_of("80"), "int8", gpu_sparse.Mask("vectors", 0.5)) is not None


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


def test_runs_take_their_share_of_the_dense_products():
    """Two runs over 128 channels at 9 taps: of the positions kept in each, pieces of 8 fours or 16 channels, 8 images of 64."""
    gpu, mask = gpu_of("80"), gpu_sparse.Mask("vectors", 0.75)
    for dtype, of_piece in (("int8", 8), ("fp16", 16)):
        run = gpu_sparse.run_sparse(LAYER, 8, "80", gpu, dtype, mask)
        assert run is not None and run[0][1].grid == 16
        kept = 2 * (LAYER.c // 4 if dtype == "int8" else LAYER.c) * 9 // 4
        most = kept + 2 * of_piece  # of the last pieces a part is zero
        each = 2 * 32 * (4 if dtype == "int8" else 1) * 512
        assert kept * each <= run[0][0]["tensor_ops"] <= most * each
    assert (mask.pattern("int8"), mask.pattern("fp16")) == ("4x32", "1x32")


def test_vnm_takes_half_of_what_its_columns_take():
    mask = gpu_sparse.Mask("vnm", 1 - 2 / 16)
    shape = (140, 64, 3, 3)
    weight = unpack_vnm(mask.packed(shape, torch.int8, 2), shape, torch.int8, 2)
    assert weight.sum() == weight.numel() // 8 and vnm.kept_columns(weight, 16, 2) == 0.25
    assert vnm.find_m(weight, 2) == 16 and mask.pattern("int8") == "64:2:16"
    for dtype, batch in (("int8", 16), ("fp16", 8)):
        run = gpu_sparse.run_sparse(LAYER, batch, "80", gpu_of("80"), dtype, mask)
        assert run is not None and run[0][1].sparse
        columns, of_piece = LAYER.c * 9 // 4, 64 if dtype == "int8" else 32
        assert run[0][0]["tensor_ops"] == 2 * 64 * -(-columns // of_piece) * of_piece * batch * 64


def test_pixels_of_1x1_convolutions_are_images_and_the_copy_is_charged():
    mask, gpu = gpu_sparse.Mask("vectors", 0.9), gpu_of("80")
    pointwise = ConvShape("net", "layer", 1, 30, 7, 7, 64, 1, 1, 1, 0, 1, 1)
    assert gpu_sparse.image_of(pointwise, 2, mask, torch.uint8) == (98, 1, 1, 32)
    assert gpu_sparse.image_of(LAYER, 2, mask, torch.float16) == (2, 8, 8, 128)
    small, large = (gpu_sparse.units_pass(gpu_sparse.Image(n, 56, 56, 64), gpu, torch.float16) for n in (1, 64))
    least = 2 + 2 * 2 * 64 * 64 * 56 * 56 / 0.9 / 1.555e6
    assert 2 < small < 4 and least <= large < 1.3 * least
    odd = gpu_sparse.units_pass(gpu_sparse.Image(64, 56, 56, 60), gpu, torch.float16)
    assert odd == pytest.approx(2 + (least - 2) * 60 / 64)


def test_report_and_records(monkeypatch, tmp_path, capsys):
    out = tmp_path / "gpu_model.json"
    old = dict(network=LAYER.network, layer=LAYER.name, shape=asdict(LAYER), batch=1, gpu="A100", peer=None)
    old |= dict(dtype="int8", pattern="2:4", sparsity=0.5)
    out.write_text(json.dumps([{"kernel": "other"}, old]))
    for module in (gpu_model, gpu_sparse):
        monkeypatch.setattr(module, "OUT", out)
    monkeypatch.setattr(gpu_sparse, "headers", lambda: None)
    monkeypatch.setattr(gpu_sparse, "gpu_shapes", lambda network: [LAYER])
    monkeypatch.setattr(sys, "argv", ["gpu_sparse", "--network", "resnet50", "--batch=1", "--gpu=A100", "--dtype=int8"])
    gpu_sparse.main()
    other, row, *blocks = json.loads(out.read_text())
    ops = [r["counters"]["tensor_ops"] for r in blocks]
    assert [r["sparsity"] for r in blocks] == [
        0.5,
        0.75,
        0.9,
        0.95,
        0.5,
        0.65,
        0.75,
        0.85,
        0.9,
        0.95,
        0.75,
        0.875,
        0.9,
        0.95,
    ]
    assert (
        ops[3] < ops[0]
        and ops[-5] < ops[4]
        and ops[-1] < ops[-4]
        and [r["pass_us"] > 0 for r in blocks] == [False] * 4 + [True] * 10
    )
    assert other == {"kernel": "other"} and row["pattern"] == "2:4" and row["arch"] == "sm_80"
    text = capsys.readouterr().out
    assert (
        f"{row['dense_us']['own'] / row['us']:.2f}" in text and "modelled" in text and "nan" in text
    )  # no layer of 256 channels
