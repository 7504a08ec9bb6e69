"""bench/gpu_limits.py: what a resource's absence would gain, bytes that come out of bounds as they went in, the mean pool."""

from __future__ import annotations

import json

import pytest

from tests import cuda_emulated as emulated

pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
from bench import gpu_limits
from bench.gpu_hardware import gpu_of
from bench.gpu_model import LAUNCH, Launch, model

COUNTS = {
    "blocks": 4, "l2_bytes": 1e8, "dram_bytes": 3e7, "classes": {"barrier": 64}, "fences": 0, "warps": 4, "tensor_ops": 1e10,
    "instructions": 1e6, "wavefronts": 1e5, "bytes_in_flight": 32768, "shared_bytes": 65536,
}  # fmt: skip


def record(peer: str | None, dtype: str, factor: float, layer: str = "a", count: int = 1) -> dict[str, object]:
    counts = COUNTS | {name: COUNTS[name] * factor for name in ("l2_bytes", "dram_bytes")}  # type: ignore[operator]
    about = {"network": "n", "gpu": "A100", "batch": 8, "layer": layer, "count": count, "peer": peer, "dtype": dtype}
    return about | {"pattern": "dense"} | model(counts, Launch(4, 128, 100, 0), gpu_of("80"))


def test_without_a_resource():
    found = model(COUNTS, Launch(4, 128, 100, 0), gpu_of("80"))
    times = {name: gpu_limits.without(found, name) for name in found["bounds_us"]}
    assert min(times, key=lambda name: times[name]) == found["bound"]
    assert all(LAUNCH * 1e6 < us <= found["us"] for us in times.values())


def test_bytes_are_those_that_were_counted(tmp_path):
    moved = gpu_limits.moved(record(None, "int8", 1.0))
    assert moved == {"l2": pytest.approx(1e8), "dram": pytest.approx(3e7)}
    rows = [record(None, "int8", 1.0), record("cutlass", "fp16", 2.0), record(None, "int8", 3.0, "b", 2)]
    rows += [record("cutlass", "fp16", 4.0, "b", 2), record(None, "int8", 9.0, "c")]  # the last one has no peer
    rows += [record("inductor", "fp16", 0.1) | {"pattern": "2:4"}]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(rows))
    head, line = gpu_limits.ratios(gpu_limits.read(path))
    assert line.split()[:5] == ["n", "A100", "8", "cutlass", "fp16"]
    assert line.split()[5:10] == ["2", "0.70", "0.70", "0.70", "1"]  # 1 + 2 x 3 over 2 + 2 x 4
    assert len(head.split()) == 11


@pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")
def test_mean_of_pixels():
    times = [gpu_limits.mean_pool(gpu_of("80"), batch, channels=256) for batch in (1, 256)]
    assert LAUNCH * 1e6 < times[0] < times[1]
