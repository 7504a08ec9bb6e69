"""bench/gpu_check.py with the device calls routed to the emulator."""

from __future__ import annotations

import pytest
import torch

from bench import gpu_check
from tests import cuda_emulated as emulated

pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")


def test_dry_run_is_exact():
    found = gpu_check.run(emulate=True, networks=["resnet50"], batches=[1], layers=3, sanitizer=True)
    assert [r["differing"] for r in found["layers"]] == [0, 0, 0] and found["device"] == "emulator"
    assert not gpu_check.failed(found) and gpu_check.report(found).count("exact") == 3


def test_a_difference_fails(monkeypatch):
    real = gpu_check.cuda.conv2d_int8
    monkeypatch.setattr(gpu_check.cuda, "conv2d_int8", lambda *a: real(*a) ^ 1)
    found = gpu_check.run(emulate=True, networks=["mobilenet_v2"], batches=[1], layers=2, sanitizer=False)
    assert gpu_check.failed(found) and "DIFFER" in gpu_check.report(found)


def test_sanitizer_decides_too():
    found = {"layers": [], "sanitizer": {"memcheck": {"ok": True}, "racecheck": {"ok": False}}}
    assert gpu_check.failed(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="--emulate"):
        gpu_check.run(emulate=False, networks=["resnet50"], batches=[1], layers=1, sanitizer=False)
