"""The peers of the model: they compute what they should, and the model is given what they are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import conv2d

pytest.importorskip("triton", reason="Triton is not installed")

from bench import peers_inductor, peers_triton

pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
from bench import gpu_layers, gpu_peers, peers_cutlass
from bench.gpu_hardware import gpu_of
from bench.gpu_layers import run_layer
from bench.gpu_model import model
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


@pytest.mark.parametrize(
    ("dtype", "c", "kernel", "stride", "padding"),
    [("fp16", 48, 3, 2, 1), ("fp16", 3, 7, 2, 3), ("fp16", 48, 1, 1, 0), ("int8", 48, 1, 1, 0), ("int8", 64, 1, 1, 0)],
)
def test_inductor_templates(dtype, c, kernel, stride, padding, tmp_path, monkeypatch):
    """The rendered text computes the layer, with every check of the emulator, and is inductor's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(peers_inductor, "CACHE", tmp_path)
    torch.manual_seed(0)
    most, kind = (128, torch.int8) if dtype == "int8" else (4, torch.float16)
    problem = peers_inductor.Problem(2, 9, 6, c, 80, kernel, kernel, stride, padding, dtype)
    assert problem.product == (kernel == 1)
    x, weight = (torch.randint(-most, most, size).to(kind) for size in ((2, 9, 6, c), (80, kernel, kernel, c)))
    scale, bias = 2.0 ** torch.randint(-9, -6, (80,)), torch.randint(-9, 9, (80,)).float()
    tile = peers_inductor.tiles(problem)[0]
    given = bias if dtype == "int8" else bias.half()
    out, _, launch = peers_inductor.run(problem, tile, x, weight, scale, given)
    images, filters = x.permute(0, 3, 1, 2).double(), weight.permute(0, 3, 1, 2).double()
    sums = conv2d(images, filters, None, stride, padding).permute(0, 2, 3, 1)
    value = (sums * scale + bias if dtype == "int8" else sums + bias).clamp(min=0)
    assert torch.equal(out, value.round().clamp(max=127).to(kind) if dtype == "int8" else value.to(kind))
    assert launch.grid == math.ceil(problem.rows / tile.m) * math.ceil(80 / tile.n)


def test_inductor_tiles_are_its_own():
    """Never larger than the problem, never more than a block may have, each once, among inductor's for the same warps."""
    for shape in (*conv_shapes("resnet50"), *conv_shapes("mobilenet_v2")):
        for dtype, batch in (("int8", 1), ("fp16", 64)):
            problem = peers_inductor.Problem.of(shape, batch, dtype)
            found = peers_inductor.scaled(problem)
            assert len(set(found)) == len(found) >= len(peers_inductor.tiles(problem)) >= 4, shape
            for tile in found:
                assert tile.shared(dtype) <= peers_inductor.SHARED and tile.warps * 256 <= tile.m * tile.n
                assert tile.n <= max(16, 2 * shape.k) and tile.k <= max(32, 2 * shape.c), (shape, tile)


def test_requantize_pass():
    """Five bytes an element, from the memory where the L2 is too small."""
    shape, a100 = ConvShape("n", "l", 1, 64, 56, 56, 64, 1, 1, 1, 0, 1, 1), gpu_of("80")
    elements = 56 * 56 * 64
    small, large = (gpu_peers.requantize_pass(shape, batch, a100) - 2 for batch in (1, 64))
    assert small == pytest.approx(5e6 * elements / (0.98 * 5120 * 1.41e9))
    assert large == pytest.approx(64 * 5e6 * elements / (0.9 * 1555e9))


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


def named(network: str, name: str) -> ConvShape:
    return next(shape for shape in conv_shapes(network) if shape.name == name)


def assert_stands_for(sampled, whole, products=0.0):
    """Counts of a sample, scaled to the grid, are the whole grid's: within 3 %, bytes that padding leaves out within 13 %.

    products: How far tensor operations may be off, where not all blocks have as many.
    """
    (part, launch), (full, _) = sampled, whole
    assert part["blocks"] < full["blocks"] == launch.grid
    scale = launch.grid / part["blocks"]
    for name, within in (("tensor_ops", products), ("instructions", 0.03), ("wavefronts", 0.03), ("l2_bytes", 0.13)):
        assert part[name] * scale == pytest.approx(full[name], rel=within), name
    for gpu in (gpu_of("80"), gpu_of("86")):
        assert model(part, launch, gpu)["us"] == pytest.approx(model(full, launch, gpu)["us"], rel=0.02)


@pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    ("shape", "batch"),
    [
        (named("resnet50", "conv1"), 1),
        (named("resnet50", "layer1.0.conv2"), 4),
        (named("resnet50", "layer2.0.downsample.0"), 2),
        (named("mobilenet_v2", "features.2.conv.1.0"), 1),
    ],
    ids=str,
)
def test_sampled_counts_of_the_kernels(shape, batch, monkeypatch, tmp_path):
    monkeypatch.setattr("bench.gpu_counts.CACHE", tmp_path)
    found = []
    for blocks in (gpu_layers.BLOCKS, 10**9):
        monkeypatch.setattr(gpu_layers, "BLOCKS", blocks)
        found.append(run_layer(shape, batch, "80", gpu_of("80"))[0])
    assert_stands_for(*found)


@pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")
def test_sampled_counts_where_the_last_tiles_are_shared(monkeypatch, tmp_path):
    monkeypatch.setattr("bench.gpu_counts.CACHE", tmp_path)
    shape, gpu = named("resnet50", "layer3.0.downsample.0"), replace(gpu_of("80"), sms=40)
    (part, launch), _ = run_layer(shape, 4, "80", gpu)
    monkeypatch.setattr(gpu_layers, "_blocks", lambda plan, shape: None)
    full = run_layer(shape, 4, "80", gpu)[0]
    assert launch.grid > 7 * 8  # tiles of 128 x 128
    assert_stands_for((part, launch), full, products=0.011)


def test_sampled_counts_of_a_triton_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x, weight, ones = torch.zeros(4, 28, 28, 64).half(), torch.zeros(96, 3, 3, 64).half(), torch.ones(96)
    found = [
        peers_triton.run_conv("fp16", peers_triton.TILES[1], x, weight, ones, ones, 1, 1, most=most)[1:]
        for most in (gpu_layers.BLOCKS, 10**9)
    ]
    assert_stands_for(*((result.summary(), launch) for result, launch in found))


@pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")
def test_sampled_counts_of_cutlass():
    """576 channels are nine tiles, four of which are taken together: a quarter of the grid's blocks has no tile."""
    pytest.importorskip("cutlass_library", reason="without the extra gpu-lab")
    shape = named("resnet50", "layer1.0.conv1")
    variant = [v for v, _ in gpu_peers.conv_variants(shape, 1, "80", "int8")][-1]
    found = [
        peers_cutlass.run_conv(variant, 4, (14, 14), 96, 576, (1, 1), 0, 1, most=most)
        for most in (gpu_layers.BLOCKS, 10**9)
    ]
    assert found[0][1].grid == math.ceil(4 * 14 * 14 / 64) * 9
    assert_stands_for(*((result.summary(), launch) for result, launch in found))


def test_blocks_with_a_tile():
    """Two tiles of rows, five of columns, four together: x is 4 row + column % 4; one each in the second row of blocks."""
    assert peers_cutlass.working((8, 2, 1), 2, 5) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12]
    assert peers_cutlass.working((3, 2, 1), 3, 2) == [0, 1, 2, 3, 4, 5]
