"""bench/gpu_check.py with the device calls routed to the emulator."""

from __future__ import annotations

import ctypes

import pytest
import torch

from bench import gpu_check, gpu_exact
from tests import cuda_emulated as emulated

pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")


def test_dry_run_is_exact():
    found = gpu_check.run(emulate=True, networks=["resnet50"], batches=[1], layers=3, sanitizer=True)
    assert [r["differing"] for r in found["layers"]] == [0, 0, 0] and found["device"] == "emulator"
    assert not gpu_check.failed(found) and gpu_check.report(found).count("exact") == 4
    assert len(found["cases"]) == len(gpu_exact.CONVS) + len(gpu_exact.LINEAR)
    assert len({tuple(case["types"]) for case in found["cases"]}) >= 20 and not any(
        c["differing"] for c in found["cases"]
    )


def test_a_difference_fails(monkeypatch):
    real = gpu_check.cuda.conv2d_int8
    flipped = lambda out: out + 1 if out.is_floating_point() else out ^ 1  # noqa: E731
    monkeypatch.setattr(gpu_check.cuda, "conv2d_int8", lambda *a: flipped(real(*a)))
    found = gpu_check.run(emulate=True, networks=["mobilenet_v2"], batches=[1], layers=2, sanitizer=False)
    assert gpu_check.failed(found) and "DIFFER" in gpu_check.report(found)
    assert gpu_check.failed(found | {"layers": []}) and all(
        c["differing"] for c in found["cases"] if "conv" in c["case"]
    )


def test_sanitizer_decides_too():
    found = {"layers": [], "cases": [], "sanitizer": {"memcheck": {"ok": True}, "racecheck": {"ok": False}}}
    assert gpu_check.failed(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="--emulate"):
        gpu_check.run(emulate=False, networks=["resnet50"], batches=[1], layers=1, sanitizer=False)


def test_a_peer_that_fails_says_why_and_fails_nothing():
    def broken():
        raise RuntimeError("no such kernel")

    assert gpu_check.attempt(broken) == "RuntimeError: no such kernel" and gpu_check.attempt(lambda: 2.5) == 2.5
    layer = {
        "network": "n",
        "layer": "l",
        "batch": 1,
        "differing": 0,
        "us": 4.0,
        "cudnn_fp16_us": 8.0,
        "modelled_us": 5.0,
    }
    found = {"device": "G", "cnncomp": "1", "torch": "2", "sanitizer": None, "cases": []}
    found["layers"] = [layer | {"peers": {"inductor_fp16": 9.0, "cutlass_int8": "RuntimeError: no such kernel"}}]
    assert not gpu_check.failed(found)
    assert "exact  4.0 us, cuDNN fp16 8.0, inductor_fp16 9.0, modelled 5.0" in gpu_check.report(found)


def test_cutlass_is_launched_as_planned(monkeypatch):
    """Through a driver that only listens: module, function, shared memory, grid, and the parameter's bytes."""
    pytest.importorskip("cutlass_library", reason="without the extra gpu-lab")
    from bench import cutlass_device
    from bench.cutlass_kernels import Planned, Tile, Variant

    heard = {}

    class Driver:
        def __getattr__(self, name):
            def call(*arguments):
                heard[name] = arguments
                if name == "cuLaunchKernel":  # the buffer is the caller's
                    heard["bytes"] = ctypes.string_at(arguments[9][0], 5)
                return 700 if name == heard.get("fails") else 0

            return call

    monkeypatch.setattr(cutlass_device, "_driver", Driver)
    variant = Variant("conv", "int8", Tile(64, 64, 64, 4, 32, 32), "int8", "int32", alpha=2**-7)
    planned = Planned((3, 2, 1), 128, 65536, b"bytes")
    cutlass_device.launch(variant, planned, 77)
    module = heard["cuModuleLoadData"][1]
    assert b".entry" in module and heard["cuModuleGetFunction"][2] in module
    assert heard["cuFuncSetAttribute"][1:] == (8, 65536)
    assert heard["cuLaunchKernel"][1:8] == (3, 2, 1, 128, 1, 1, 65536)
    assert heard["bytes"] == b"bytes"
    heard["fails"] = "cuLaunchKernel"
    with pytest.raises(RuntimeError, match="cuLaunchKernel failed with CUresult 700"):
        cutlass_device.launch(variant, planned, 77)
