"""A network's description as an ONNX model: operators that every runtime knows, static shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bench.peers.case import Case

#: Old enough for the oldest engine.
OPSET, IR_VERSION = 13, 7


def write_onnx(case: Case, path: Path, relu6: bool = True) -> None:
    """Write ``case`` as ``path``, with an input "input" and an output "output" of fixed shapes.

    ``relu6=False``: with ReLU in place of ReLU6, for a quantiser that merges only the former with a convolution.
    """
    steps, tensors = case.graph()
    if not relu6:
        steps = [{**step, "hi": None} if step["op"] == "clamp" else step for step in steps]
    steps[-1]["output"] = "output"
    nodes = [_node(step) for step in steps]
    constants = {**tensors, "zero": np.float32(0), "six": np.float32(6)}
    used = {name for node in nodes for name in node.input}
    model = helper.make_model(
        helper.make_graph(
            nodes,
            case.network,
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, case.array("input").shape)],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, case.array("output").shape)],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in used],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model)
    onnx.save(onnx.shape_inference.infer_shapes(model), str(path))


def _node(step: dict[str, Any]) -> onnx.NodeProto:
    inputs, output = list(step["inputs"]), [step["output"]]
    op = step["op"]
    if op in ("conv", "linear"):
        inputs += [f"{step['layer']}.weight", f"{step['layer']}.bias"]
    if op == "conv":
        where = {"strides": step["stride"], "pads": step["padding"] * 2, "group": step["groups"]}
        return helper.make_node("Conv", inputs, output, name=step["output"], **where)
    if op == "linear":
        return helper.make_node("Gemm", inputs, output, name=step["output"], transB=1)
    if op == "max_pool":
        k, s, p = step["kernel"], step["stride"], step["padding"]
        window = {"kernel_shape": [k, k], "strides": [s, s], "pads": [p] * 4}
        return helper.make_node("MaxPool", inputs, output, name=step["output"], **window)
    if op == "clamp" and step["hi"] is not None:
        assert step["hi"] == 6
        return helper.make_node("Clip", [*inputs, "zero", "six"], output, name=step["output"])
    plain = {"clamp": "Relu", "add": "Add", "mean": "GlobalAveragePool", "flatten": "Flatten"}
    return helper.make_node(plain[op], inputs, output, name=step["output"])
