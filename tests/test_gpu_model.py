"""The model of bench/gpu_model.py: its facts against published peaks, its bounds on kernels whose answer is known."""

from __future__ import annotations

import pytest
import torch

from bench.gpu_hardware import GPUS, REGISTERS, RTX_3070, blocks_per_sm, gpu_of
from bench.gpu_model import LABEL, LAUNCH, Launch, bounds, model, report, sample_of
from tests.ptx import emulate, load
from tests.ptx.test_checks import KERNEL

PUBLISHED = {"T4": (130, 65), "A100": (624, 312), "RTX 3090": (284, 71), "RTX 4090": (660.6, 165.2), "H100": (1979, 989.5),
             "RTX 5090": (838, 209.5), "RTX 3070": (162.6, 40.6)}  # fmt: skip  # dense int8 TOPS; dense fp16 TFLOPS with fp32 sums


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


def test_report_says_that_it_is_a_model():
    row = {"network": "n", "batch": 1, "gpu": "A100", "us": 10.0, "count": 2, "macs": 10**6, "bound": "issue"}
    text = report([row])
    assert LABEL in text and "0.020" in text
