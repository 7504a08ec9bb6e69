"""Choice of sparse kernels for a GPU that nothing can be measured on: cnncomp/dispatch/modelled.py."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import nn

import cnncomp
from cnncomp.dispatch import modelled
from cnncomp.dispatch import network as planning
from cnncomp.dispatch.candidates import options_for
from cnncomp.dispatch.modelled import CHANNELS, FORMATS, IMAGES, KERNELS, SIZES, Size, gain
from cnncomp.graph import trace
from cnncomp.nn import DenseConv2d, DenseLinear, Geometry, QuantSpec
from tests import cuda_emulated as emulated
from tests.test_packers import masked_2to4, masked_blocks, masked_vnm

RATIOS = [
    [[0.5, 0.8], [1.0, 1.3], [1.5, 2.0]],
    [[0.6, 0.9], [1.2, 1.4], [1.7, 2.5]],
    [[0.7, 1.0], [1.3, 1.6], [1.9, 3.0]],
]


@pytest.fixture
def table(monkeypatch):
    """1x1 alone: 2:4 as above, V:2:M at 75 % twice that and at 90 % three times."""
    times = lambda factor: [[[factor * v for v in row] for row in plane] for plane in RATIOS]  # noqa: E731
    found = {"sparse24": {"1x1": {"0.5": RATIOS}}, "vnm": {"1x1": {"0.75": times(2), "0.9": times(3)}}}
    monkeypatch.setattr(modelled, "_table", lambda: {"sm_80": found})


def test_shipped_table_is_whole():
    """Every number of the grid is there and a ratio of times."""
    ratios = json.loads(modelled.TABLE.read_text())
    assert set(ratios) == {"sm_80", "sm_90"}
    for formats in ratios.values():
        assert set(formats) == set(FORMATS)
        for levels in (levels for kernels in formats.values() for levels in kernels.values()):
            found = torch.tensor([levels[level] for level in sorted(levels, key=float)])
            assert found.shape[1:] == (len(CHANNELS), len(IMAGES), len(SIZES))
            assert bool((found > 0.05).all() and (found < 20).all())
        assert all(set(kernels) == set(KERNELS) for kernels in formats.values())


@pytest.mark.parametrize(
    "size, expected",
    [
        (Size((1, 1), 128, 8, 28 * 28), 1.4),  # on the grid
        (Size((1, 1), 128, 8, 20 * 20), 1.2),  # the worst of two
        (Size((1, 1), 100, 20, 20 * 20), 1.0),  # the worst of eight
        (Size((1, 1), 64, 1, 7 * 7), 0.5),  # the worst of all numbers of channels
        (Size((1, 1), 4096, 999, 112 * 112), 3.0),  # beyond its end
        (Size((1, 1), 63, 64, 28 * 28), None),
        (Size((1, 1), 64, 64, 6 * 8), None),
        (Size((1, 2), 64, 64, 28 * 28), None),  # as 3x3, which this table lacks
    ],
)
def test_between_the_points_the_worst_counts(table, size, expected):
    assert gain("sm_80", "sparse24", 0.5, size) == expected
    assert gain("sm_86", "sparse24", 0.5, size) is None and gain("sm_80", "blocks", 0.5, size) is None


def test_fewer_zeros_than_the_table_are_no_answer(table):
    size = Size((1, 1), 256, 64, 28 * 28)
    assert [gain("sm_80", "vnm", zeros, size) for zeros in (0.7, 0.75, 0.85, 0.9, 0.95)] == [None, 6, 6, 9, 9]


def conv(weight, groups=1, stride=1):
    k, c, *kernel = weight.shape
    layer = DenseConv2d(Geometry(c * groups, k, tuple(kernel), (stride, stride), groups=groups), weight, None)
    layer.info.input = QuantSpec(0.02, torch.uint8)
    return layer


def chosen(layer, shape, arch="sm_80"):
    option, reason = modelled.choose(layer, options_for(layer, "cuda")[0], arch, shape)
    return option and option.candidate.kernel, reason


def test_what_gains_most_is_chosen_and_what_loses_is_not(table):
    torch.manual_seed(0)
    dense = torch.randn(128, 128, 1, 1)
    both = masked_vnm(dense, 64, 8)
    both[:, 2::4] = both[:, 3::4] = 0  # 2:4 too
    assert chosen(conv(both), (8, 128, 28, 28)) == ("conv2d_vnm_int8", "modelled 2.80× faster than dense int8")
    half = conv(masked_2to4(dense))
    assert chosen(half, (64, 128, 28, 28))[0] == "conv2d_sparse24_int8"
    for images, ratio in ((1, "0.90"), (8, None)):
        kernel, reason = chosen(half, (images, 128, 28, 28))
        assert kernel == (None if ratio else "conv2d_sparse24_int8")
        assert (
            ratio is None or reason == f"conv2d_sparse24_int8 at 50% zeros is modelled {ratio}× dense int8, kept dense"
        )
    assert chosen(half, (8, 128, 7, 7))[0] == "conv2d_sparse24_int8" and chosen(half, (2, 128, 7, 7))[0] is None
    for layer, arch in ((half, "sm_89"), (conv(masked_2to4(torch.randn(128, 64, 1, 1)), 2), "sm_80")):
        assert (
            chosen(layer, (64, 128, 28, 28), arch)[1]
            == "conv2d_sparse24_int8 at 50% zeros is not modelled here, kept dense"
        )
    strided = conv(masked_2to4(dense), stride=2)
    assert chosen(strided, (64, 128, 28, 28))[0] is None
    assert chosen(conv(dense), (64, 128, 28, 28)) == (None, "")


def test_pixels_of_a_linear_layer_are_its_rows(table):
    layer = DenseLinear(masked_2to4(torch.randn(128, 128)), None)
    layer.info.input = QuantSpec(0.02, torch.uint8)
    assert chosen(layer, (64, 49, 128))[0] == "linear_sparse24_int8" and chosen(layer, (48, 128))[0] is None


def test_zeros_that_a_kernel_leaves_out():
    torch.manual_seed(0)
    weight = torch.randn(128, 160, 3, 3)
    assert modelled.left_out(conv(masked_vnm(weight, 64, 20)), "vnm") == pytest.approx(0.9)
    for format, rows, cols in (("vectors", 32, 4), ("blocks", 64, 16)):
        layer = conv(masked_blocks(weight, rows, cols, 1, 0.3))
        assert modelled.left_out(layer, format) == pytest.approx(0.7, abs=0.1)
    assert modelled.left_out(conv(masked_2to4(weight)), "sparse24") == 0.5


def test_network_for_a_gpu_without_measurement(monkeypatch):
    """Kernels and reasons of its plan; what is not quantised stays dense whatever its zeros."""
    monkeypatch.setattr(planning, "device_key", str)
    monkeypatch.setattr(modelled, "arch_of", lambda device: "sm_80")
    torch.manual_seed(0)
    wide, narrow = (nn.Conv2d(c, c, 3, padding=1) for c in (256, 64))
    model = nn.Sequential(wide, nn.Conv2d(256, 64, 1), narrow)
    wide.weight.data = masked_blocks(wide.weight.data, 64, 16, 1, 0.1)
    narrow.weight.data = masked_blocks(narrow.weight.data, 32, 4, 1, 0.2)
    x = torch.randn(8, 256, 7, 7)
    for quantised in (True, False):
        found = cnncomp.quantize(copy.deepcopy(model), [x], progress=False) if quantised else model
        planner = planning.NetworkPlanner(trace(found, (x,)), (x,), torch.device("cuda"))
        layers = planner.rule_of_thumb().layers
        if quantised:
            assert layers["0"].kernel == "conv2d_blocks_int8"
            assert re.fullmatch(r"modelled \d\.\d\d× faster than dense int8", layers["0"].reason)
            assert layers["1"].kernel == layers["2"].kernel == "conv2d_int8"
            lost = r"conv2d_vectors_int8 at \d\d% zeros is modelled 0\.\d\d× dense int8, kept dense"
            assert re.search(lost, layers["2"].reason)
        else:
            assert {layer.kernel for layer in layers.values()} == {"dense.nchw"}


@pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")
def test_bench_writes_the_grid_and_checks_networks(monkeypatch):
    """On a grid of one point whose ratio decides what a network's layer is checked against."""
    pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
    from bench import gpu_crossover
    from bench.gpu_sparse import Mask
    from bench.layers import ConvShape

    layers = [ConvShape("net", f"s{stride}", 1, 64, 7, 7, 64, 1, 1, stride, 0, 1, 1) for stride in (1, 2)]
    small = {"CHANNELS": (64,), "IMAGES": (1,), "SIZES": (7,), "KERNELS": {"1x1": 1}}
    for name, value in small.items():
        monkeypatch.setattr(gpu_crossover, name, value)
        monkeypatch.setattr(modelled, name, value)
    monkeypatch.setattr(gpu_crossover, "MASKS", (Mask("sparse24", 0.5),))
    monkeypatch.setattr(gpu_crossover, "MODELLED", gpu_crossover.MODELLED[:1])
    monkeypatch.setattr(gpu_crossover, "gpu_shapes", lambda network: layers)
    found = gpu_crossover.crossovers()
    [[[[value]]]] = found["sm_80"]["sparse24"]["1x1"].values()
    assert value == pytest.approx(
        gpu_crossover.ratio(layers[0], 1, gpu_crossover.MODELLED[0], gpu_crossover.MASKS[0]), abs=0.01
    )
    for claimed, lines in ((0.9, 0), (1.3, 1)):
        table = {"sm_80": {"sparse24": {"1x1": {"0.5": [[[claimed]]]}}}}
        monkeypatch.setattr(modelled, "_table", lambda table=table: table)
        said = gpu_crossover.check("net", (1,))
        assert len(said) == lines and all(f"net-s1: 1.30, {value:.2f} " in line for line in said)
        assert all(line.endswith("ahead" if value >= 1 else "behind") for line in said)
