"""bench/gpu_check.py with the device calls routed to the emulator."""

from __future__ import annotations

import ctypes

import pytest
import torch

from bench import bench_gpu, gpu_check, gpu_exact
from bench.layers import conv_shapes
from tests import cuda_emulated as emulated
from tests.cuda_device import emulated_device
from tests.ptx.cute import headers

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
        "modelled_us": {"cnncomp": 5.0, "cudnn_fp16": "none", "inductor_fp16": 7.0, "cutlass_int8": 3.0},
    }
    found = {"device": "G", "cnncomp": "1", "torch": "2", "sanitizer": None, "cases": []}
    peers = {"cudnn_fp16": 8.0, "inductor_fp16": 9.0, "cutlass_int8": "RuntimeError: no such kernel"}
    found["layers"] = [layer | {"peers": peers}]
    assert not gpu_check.failed(found)
    assert "exact  us (modelled): cnncomp 4.0 (5.0), cudnn_fp16 8.0, inductor_fp16 9.0 (7.0)" in gpu_check.report(found)


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


class Listener:
    """In the place of pytest-benchmark's fixture, whose table is not for tests."""

    def __init__(self):
        self.extra_info, self.group, self.rounds = {}, "", 0

    def pedantic(self, target, rounds, warmup_rounds):
        for self.rounds in range(1, rounds + warmup_rounds + 1):
            target()


@pytest.mark.parametrize("kernel", bench_gpu.KERNELS)
def test_benchmark_runs_dry(kernel, monkeypatch):
    """The package's kernel in the emulator; peers as far as they go without a GPU: what can't be had is skipped, not failed."""
    shape = next(s for s in conv_shapes("resnet50") if s.name == "layer4.0.downsample.0")
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    heard = Listener()
    with emulated_device():
        if kernel.startswith("cutlass"):
            with pytest.raises(pytest.skip.Exception, match="Error"):
                bench_gpu.bench_layer(heard, shape, 1, kernel, torch.device("cpu"))
            return
        bench_gpu.bench_layer(heard, shape, 1, kernel, torch.device("cpu"))
    assert heard.rounds == 1 and heard.extra_info["kernel"] == kernel and heard.extra_info["modelled_us"] is None


def test_the_model_stands_beside_each_peer(monkeypatch):
    """As on an A100: a guess for the package's kernel and for each peer whose kernels can be counted here."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from bench import gpu_peers

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("bench.gpu_peers.TILES", gpu_peers.TILES[-1:])
    monkeypatch.setattr("bench.peers_inductor.CANDIDATES", 1)
    shape = conv_shapes("resnet50")[-1]
    found = gpu_check.modelled(shape, 1, torch.device("cuda:0"))
    assert set(found) == {"cnncomp", "cutlass_int8", "cutlass_fp16", "inductor_fp16"}
    assert isinstance(found["cnncomp"], float) and isinstance(found["inductor_fp16"], float)
    if headers():
        assert found["cutlass_int8"] < found["cutlass_fp16"] and 2 < found["cnncomp"] < 100
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert gpu_check.modelled(shape, 1, torch.device("cuda:0")) == {}
