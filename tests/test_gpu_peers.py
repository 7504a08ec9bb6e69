"""The peers of the model: they compute what they should, and the model is given what they are."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

pytest.importorskip("triton", reason="Triton is not installed")

from bench import peers_triton

pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
from bench import gpu_peers
from bench.gpu_hardware import gpu_of
from bench.gpu_layers import run_layer
from bench.layers import ConvShape, conv_shapes
from tests import cuda_emulated as emulated


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_plain_triton_convolution(dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    most, kind = (128, torch.int8) if dtype == "int8" else (4, torch.float16)
    x, weight = (torch.randint(-most, most, size).to(kind) for size in ((2, 7, 6, 48), (80, 3, 3, 48)))
    scale, bias = 2.0 ** torch.randint(-9, -6, (80,)), torch.randint(-9, 9, (80,)).float()
    out, _, launch = peers_triton.run_conv(dtype, peers_triton.TILES[1], x, weight, scale, bias, 2, 1)
    sums = conv2d(x.permute(0, 3, 1, 2).double(), weight.permute(0, 3, 1, 2).double(), None, 2, 1).permute(0, 2, 3, 1)
    value = (sums * scale + bias).clamp(min=0)
    expected = value.round().clamp(max=127).to(kind) if dtype == "int8" else value.to(kind)
    assert torch.equal(out, expected)
    assert launch.grid == 2 and launch.dtype == dtype


def test_wgmma_bound():
    """A 3x3 layer at 75 % of the tensor cores' peak, a small product at the memory's."""
    h100 = gpu_of("90")
    deep = ConvShape("n", "deep", 1, 512, 28, 28, 512, 3, 3, 1, 1, 1, 1)
    found = gpu_peers.wgmma_bound(deep, 8, h100, "int8")
    assert found["bound"] == "tensor"
    assert found["us"] == pytest.approx(2e6 * 8 * deep.macs / (0.75 * h100.int8_peak) + 2)
    linear = ConvShape("n", "fc", 1, 4096, 1, 1, 4096, 1, 1, 1, 0, 1, 1)
    found = gpu_peers.wgmma_bound(linear, 1, h100, "fp16")
    assert found["bound"] == "dram"
    assert found["bounds_us"]["dram"] == pytest.approx(1e6 * 2 * (4096 + 4096**2 + 4096) / h100.dram)


@pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")
def test_counts_are_kept(monkeypatch, tmp_path):
    """The second time nothing runs, and the answer is the same."""
    monkeypatch.setattr("bench.gpu_counts.CACHE", tmp_path)
    shape = conv_shapes("resnet50")[-1]
    first = run_layer(shape, 1, "80", gpu_of("80"))
    monkeypatch.setattr("bench.gpu_layers.emulate", None)
    assert run_layer(shape, 1, "80", gpu_of("80")) == first
    assert first[0][1].least_bytes > shape.k * shape.geometry.reduction
