"""DeepSparse: float models as ONNX; int8 in the one form that its own kernels run.

That is QLinearConv with one scale per weight tensor and ReLU merged into it (ReLU6 too, whose bound an untrained network's
activations do not reach). Other forms, with a scale per channel or quantise-dequantise pairs, it hands to the ONNX Runtime
that it bundles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import deepsparse

from bench.peers.case import Case
from bench.peers.engines import Loaded
from bench.peers.onnx_model import write_onnx


def load(case: Case, threads: int) -> Loaded:
    logging.disable(logging.WARNING)
    path = case.folder / "deepsparse.onnx"
    write_onnx(case, path, relu6=not case.int8)
    if case.int8:
        from bench.peers.engines._onnxruntime import QuantFormat, write_int8

        float_model, path = path, case.folder / "deepsparse_qlinear.onnx"
        write_int8(case, float_model, path, QuantFormat.QOperator, op_types_to_quantize=["Conv", "Relu", "Add"])
    engine = deepsparse.Engine(str(path), batch_size=case.batch, num_cores=threads)
    share = engine.fraction_of_supported_ops
    note = "" if share == 1 else f"{share:.0%} of the operations run on its own kernels"

    def bind(x: Any) -> Callable[[], Any]:
        return lambda: engine.run([x], val_inp=False)

    return Loaded(deepsparse.__version__, bind, lambda y: y[0], note)
