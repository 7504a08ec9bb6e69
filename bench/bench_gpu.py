"""Layers on this machine's GPU: the package's int8 kernels, cuDNN in fp16, inductor and CUTLASS, and the model beside each.

``pytest bench/bench_gpu.py``. Each round is many launches one after the other, in a warm cache, as on a busy GPU;
bench/gpu_check.py times single launches with a cold one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import gpu_check
from bench.layers import ConvShape

LAUNCHES, ROUNDS = 100, 10
KERNELS = ("cnncomp", "cudnn_fp16", "inductor_fp16", "cutlass_int8", "cutlass_fp16")


def bench_layer(benchmark: Any, shape: ConvShape, batch: int, kernel: str, device: torch.device) -> None:
    """Time one of KERNELS on a layer; of several tiles that which is the fastest alone. Skipped where it can't be had.

    Args:
        benchmark: The fixture of pytest-benchmark.
        shape, batch: The layer.
        kernel: One of KERNELS.
        device: A GPU; the CPU within ``tests.cuda_device.emulated_device``, for a dry run.
    """
    makers = {
        "cnncomp": lambda: [gpu_check.own_call(shape, batch, device)[0]],
        **gpu_check.peer_calls(shape, batch, device),
    }
    if kernel not in makers:
        pytest.skip(f"{kernel} has no kernel for this layer")
    try:
        calls = makers[kernel]()
        best = min(calls, key=lambda call: gpu_check.milliseconds(call)[0]) if len(calls) > 1 else calls[0]
        best()
    except Exception as error:
        if kernel == "cnncomp":
            raise
        pytest.skip(f"{type(error).__name__}: {error}")
    on_gpu = device.type == "cuda"
    launches = LAUNCHES if on_gpu else 1

    def round_of() -> None:
        for _ in range(launches):
            best()
        if on_gpu:
            torch.cuda.synchronize(device)

    benchmark.group = f"{shape} batch {batch}, {launches} launches"
    guesses = gpu_check.modelled(shape, batch, device) if on_gpu else {}
    benchmark.extra_info.update(kernel=kernel, batch=batch, launches=launches, modelled_us=guesses.get(kernel))
    benchmark.extra_info.update(
        network=shape.network, layer=shape.name, device=gpu_check.device_facts(device)["device"]
    )
    benchmark.pedantic(round_of, rounds=ROUNDS if on_gpu else 1, warmup_rounds=int(on_gpu))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_gpu_layer(benchmark: Any, shape: ConvShape, batch: int, kernel: str) -> None:
    bench_layer(benchmark, shape, batch, kernel, torch.device("cuda:0"))
