"""LiteRT with XNNPACK; int8 by its quantiser's static recipe.

litert-torch converts a module that is built anew from the description, with channels last at the input.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import litert_torch
import numpy as np
import torch
import torch.nn.functional as F
from ai_edge_litert.interpreter import Interpreter
from torch import Tensor, nn

from bench.peers.case import Case
from bench.peers.engines import Loaded


class Described(nn.Module):
    """The network of a case's description."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.steps, tensors = case.graph()
        self.names = {name: f"t{i}" for i, name in enumerate(tensors)}
        for name, value in tensors.items():
            self.register_buffer(self.names[name], torch.from_numpy(value))

    def forward(self, x: Tensor) -> Tensor:
        values = {"input": x}
        for step in self.steps:
            x = self._step(step, *(values[name] for name in step["inputs"]))
            values[step["output"]] = x
        return x

    def _step(self, step: dict[str, Any], x: Tensor, *others: Tensor) -> Tensor:
        op = step["op"]
        if op in ("conv", "linear"):
            weight, bias = (getattr(self, self.names[f"{step['layer']}.{kind}"]) for kind in ("weight", "bias"))
            if op == "linear":
                return F.linear(x, weight, bias)
            return F.conv2d(x, weight, bias, step["stride"], step["padding"], groups=step["groups"])
        if op == "clamp":
            return F.relu(x) if step["hi"] is None else F.relu6(x)
        if op == "max_pool":
            return F.max_pool2d(x, step["kernel"], step["stride"], step["padding"])
        if op == "mean":
            return F.adaptive_avg_pool2d(x, (1, 1))
        return x + others[0] if op == "add" else x.flatten(1)


def quantized(path: str, case: Case) -> str:
    """The int8 model's path."""
    from ai_edge_quantizer import quantizer, recipe

    work = quantizer.Quantizer(path)
    work.load_quantization_recipe(recipe.static_wi8_ai8())
    (name,) = Interpreter(path).get_signature_list()
    (argument,) = Interpreter(path).get_signature_list()[name]["inputs"]
    images = [{argument: _last(x)} for x in case.calibration_batches()]
    out = path.replace(".tflite", "_int8.tflite")
    work.quantize(work.calibrate({name: images})).export_model(out, overwrite=True)
    return out


def _last(x: Any) -> Any:
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def load(case: Case, threads: int) -> Loaded:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    torch.set_num_threads(threads)
    module = litert_torch.to_channel_last_io(Described(case).eval(), args=[0])
    path = str(case.folder / "litert.tflite")
    litert_torch.convert(module, (torch.from_numpy(_last(case.array("input"))),)).export(path)
    if case.int8:
        path = quantized(path, case)
    interpreter = Interpreter(path, num_threads=threads)
    interpreter.allocate_tensors()
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()

    def to_input(x: Any) -> Any:
        x = _last(x)
        if given["dtype"] == np.float32:
            return x
        scale, zero = given["quantization"]
        return np.clip(np.round(x / scale) + zero, -128, 127).astype(given["dtype"])

    def to_numpy(y: Any) -> Any:
        scale, zero = result["quantization"]
        return y if y.dtype == np.float32 else (y.astype(np.float32) - zero) * scale

    def bind(x: Any) -> Callable[[], Any]:
        ready = to_input(x)

        def run() -> Any:
            interpreter.set_tensor(given["index"], ready)
            interpreter.invoke()
            return interpreter.get_tensor(result["index"])

        return run

    return Loaded(version("ai-edge-litert"), bind, to_numpy)
