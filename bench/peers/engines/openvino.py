"""OpenVINO's CPU plugin, asked for latency; int8 by NNCF's post-training quantisation with its defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openvino as ov

from bench.peers.case import Case
from bench.peers.engines import Loaded
from bench.peers.onnx_model import write_onnx


def load(case: Case, threads: int) -> Loaded:
    path = case.folder / "model.onnx"
    write_onnx(case, path)
    core = ov.Core()
    model, version = core.read_model(path), ov.__version__.split("-")[0]
    if case.int8:
        import nncf

        images = nncf.Dataset(case.calibration_batches())
        model = nncf.quantize(model, images, subset_size=len(case.calibration_batches()))
        version += f", nncf {nncf.__version__}"
    # The race does the pinning; float32 stays what it says, also on a CPU with bf16.
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def bind(x: Any) -> Callable[[], Any]:
        tensor = ov.Tensor(x, shared_memory=True)

        def run() -> Any:
            request.set_input_tensor(tensor)
            request.infer()
            return request.get_output_tensor()

        return run

    return Loaded(version, bind, lambda y: y.data)
