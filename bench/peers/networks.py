"""The networks of the race: random weights and masks, the same for every engine, written to files that each can read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

import cnncomp
from bench.peers.case import Case


@dataclass(frozen=True)
class Variant:
    """What is done to a network: pruning, 8 bit. The first convolution, depthwise ones and the classifier stay dense."""

    name: str
    sparsity: float = 0.0
    pattern: str = "unstructured"
    int8: bool = False


DENSE, INT8 = Variant("dense"), Variant("int8", int8=True)

#: Of each network, what is raced. "-1x4": runs of four input channels.
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "resnet50": (
        DENSE,
        *(Variant(f"sparse-{p}", p / 100) for p in (80, 90, 95)),
        INT8,
        Variant("int8-sparse-90", 0.9, int8=True),
        *(Variant(f"int8-sparse-{p}-1x4", p / 100, "1x4", int8=True) for p in (75, 90)),
    ),
    "mobilenet_v2": (DENSE, *(Variant(f"sparse-{p}", p / 100) for p in (85, 90)), INT8),
}


def build(network: str, variant: Variant, size: int) -> nn.Module:
    """The network in eval mode with seeded random weights, pruned layer by layer; its BatchNorm statistics are those of
    random images (N, 3, size, size), so that signals neither die nor grow."""
    torch.manual_seed(0)
    model = getattr(cnncomp.models, network)()
    if variant.sparsity:
        cnncomp.prune(model, variant.sparsity, variant.pattern, scope="layer", progress=False)
        cnncomp.remove_masks(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # type: ignore[assignment]  # the mean over all batches
    with torch.no_grad():
        model.train()(torch.randn(4, 3, size, size))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def write(network: str, variant: Variant, folder: Path, *, batch: int, size: int, images: int) -> Case:
    """Write the model with its inputs and the outputs that are right into ``folder``.

    Args:
        images: how many random images there are to calibrate with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = build(network, variant, size)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "weights.safetensors")
    x, calibration = torch.randn(batch, 3, size, size), torch.randn(images, 3, size, size)
    with torch.no_grad():
        y = model(x)
    for name, t in {"input": x, "output": y, "calibration": calibration}.items():
        np.save(folder / f"{name}.npy", t.numpy())
    steps, tensors = describe(model)
    np.savez(folder / "graph.npz", **{k: v.detach().numpy() for k, v in tensors.items()})
    case = Case(folder, network, variant.name, variant.int8, batch, macs_of(steps, tensors, x.shape))
    (folder / "graph.json").write_text(json.dumps(steps))
    case.write()
    return case


def describe(model: nn.Module) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The network as a list of operations, BatchNorm folded, and the tensors that they name.

    Each has ``op`` ("conv", "linear", "clamp", "add", "max_pool", "mean" over the image, "flatten"), ``inputs`` and ``output``,
    and what the operation needs. The network's input is called "input", its result is the last output.

    Raises:
        TypeError: an operation that is none of these.
    """
    traced = fuse(model)
    modules, names = dict(traced.named_modules()), {}
    steps: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            names[node] = "input"
        elif node.op == "output":
            break
        else:
            step = _step(node, modules, tensors)
            inputs = [names[n] for n in node.all_input_nodes]
            names[node] = inputs[0] if step is None else node.name
            if step is not None:
                steps.append({**step, "inputs": inputs, "output": node.name})
    return steps, tensors


def _step(node: fx.Node, modules: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """One operation; None for what does nothing in inference."""
    if node.op != "call_module":
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        known = {"add": "add", "iadd": "add", "flatten": "flatten"}
        if name not in known:
            raise TypeError(f"{name}: no operation that can be exported")
        return {"op": known[name]}
    m = modules[str(node.target)]
    if isinstance(m, (nn.Conv2d, nn.Linear)):
        tensors[f"{node.name}.weight"] = m.weight
        tensors[f"{node.name}.bias"] = torch.zeros(m.weight.shape[0]) if m.bias is None else m.bias
        if isinstance(m, nn.Linear):
            return {"op": "linear", "layer": node.name}
        where = {"stride": list(m.stride), "padding": list(m.padding), "groups": m.groups}
        return {"op": "conv", "layer": node.name, **where}
    if isinstance(m, nn.ReLU6):
        return {"op": "clamp", "hi": 6.0}
    if isinstance(m, nn.ReLU):
        return {"op": "clamp", "hi": None}
    if isinstance(m, nn.MaxPool2d):
        return {"op": "max_pool", "kernel": m.kernel_size, "stride": m.stride, "padding": m.padding}
    if isinstance(m, nn.AdaptiveAvgPool2d):
        return {"op": "mean"}
    if isinstance(m, (nn.Dropout, nn.Identity)):
        return None
    raise TypeError(f"{type(m).__name__}: no layer that can be exported")


def macs_of(steps: list[dict[str, Any]], tensors: dict[str, Tensor], shape: torch.Size) -> tuple[int, int]:
    """Multiply-adds of the convolutions and linear layers for an input of ``shape`` (N, C, H, W): all of them, and those
    with weights that are not zero."""
    shapes = {"input": shape[2:]}
    dense = kept = 0
    for step in steps:
        size = shapes[step["inputs"][0]]
        if step["op"] in ("conv", "max_pool"):
            kernel = tensors[f"{step['layer']}.weight"].shape[2:] if step["op"] == "conv" else (step["kernel"],) * 2
            stride, padding = (v if isinstance(v, list) else [v, v] for v in (step["stride"], step["padding"]))
            size = torch.Size(
                (n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True)
            )
        elif step["op"] in ("mean", "flatten"):
            size = torch.Size((1, 1))
        if step["op"] in ("conv", "linear"):
            weight = tensors[f"{step['layer']}.weight"]
            pixels = shape[0] * math.prod(size)
            dense += pixels * weight.numel()
            kept += pixels * int(weight.count_nonzero())
        shapes[step["output"]] = size
    return dense, kept
