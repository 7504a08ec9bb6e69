"""ONNX Runtime: the CPU provider with all its optimisations; int8 by its static quantiser, as quantise-dequantise pairs with a
scale per channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxruntime as ort

from bench.peers.case import Case
from bench.peers.engines import Loaded
from bench.peers.onnx_model import write_onnx


def load(case: Case, threads: int) -> Loaded:
    path = case.folder / "ort.onnx"
    write_onnx(case, path)
    if case.int8:
        from bench.peers.engines._onnxruntime import QuantFormat, write_int8

        write_int8(case, path, path := case.folder / "ort_qdq.onnx", QuantFormat.QDQ, per_channel=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def bind(x: Any) -> Callable[[], Any]:
        return lambda: session.run(None, {"input": x})

    return Loaded(ort.__version__, bind, lambda y: y[0])
