"""``cnncomp.profile``: what each layer of a model costs, against the best dense float kernel, measured side by side."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cnncomp.convert import ConvertedModel, as_inputs
from cnncomp.dispatch.candidates import NCHW, NHWC
from cnncomp.dispatch.choose import to_format
from cnncomp.dispatch.device import device_key
from cnncomp.dispatch.timing import interleaved
from cnncomp.errors import ArgumentError
from cnncomp.nn import ConvertedLayer, DenseConv2d, DenseLinear, QuantConv2d, QuantLinear
from cnncomp.nn.dense import CONV_KERNELS, HALF_KERNELS, LINEAR_KERNELS, NCHW_KERNELS, dense_kernels
from cnncomp.nn.units import Units
from cnncomp.progress import track
from cnncomp.recordings import kernels_of


@dataclass
class LayerProfile:
    """One layer: input shape, sparse pattern, kernel, median ms, dense fp32's median ms over it, on a GPU that of dense fp16 or
    bf16 (NaN on a CPU), weight MB, and why."""

    name: str
    layer: str
    shape: str
    pattern: str
    kernel: str
    ms: float
    ratio: float
    ratio_half: float
    mb: float
    reason: str


@dataclass
class ProfileReport:
    """Layers in the order of execution, and the whole network. ``ratio`` > 1 means faster than dense fp32."""

    device: str
    layers: list[LayerProfile]
    total_ms: float
    mb: float
    kept: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def to_csv(self) -> str:
        out = io.StringIO()
        writer = csv.DictWriter(out, fieldnames=list(LayerProfile.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(layer) for layer in self.layers)
        return out.getvalue()

    def save(self, path: str | Path) -> None:
        """Write JSON or CSV, by the file's suffix.

        Raises:
            ArgumentError: another suffix.
        """
        path = Path(path)
        writers = {".json": self.to_json, ".csv": self.to_csv}
        if path.suffix not in writers:
            raise ArgumentError("path", str(path), "a name that ends in .json or .csv")
        path.write_text(writers[path.suffix]())

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.total_ms:.2f} ms, {self.mb:.2f} MB on {self.device}")
        for column in ("layer", "shape", "pattern", "kernel"):
            table.add_column(column, overflow="fold")
        on_gpu = not all(math.isnan(row.ratio_half) for row in self.layers)
        for column in ("ms", "× dense", *["× half"] * on_gpu, "MB"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("why")
        for row in self.layers:
            ratios = [row.ratio, *[row.ratio_half] * on_gpu]
            numbers = (f"{row.ms:.3f}", *("" if math.isnan(r) else f"{r:.2f}" for r in ratios), f"{row.mb:.3f}")
            table.add_row(row.name, f"{row.layer} @ {row.shape}", row.pattern, row.kernel, *numbers, row.reason)
        for name, reason in self.kept.items():
            table.add_row(name, "", "", "torch", "", "", "", f"kept: {reason}")
        console = Console(file=io.StringIO(), width=150)
        console.print(table)
        out = console.file
        assert isinstance(out, io.StringIO)
        return out.getvalue()


Calls = dict[str, tuple[Tensor, ...]]


def _record_calls(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[dict[str, ConvertedLayer], Calls]:
    """Converted layers in the order of execution, and the tensors that each got."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ConvertedLayer)}
    calls: Calls = {}
    handles = []
    for name, layer in layers.items():

        def record(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            calls.setdefault(name, tuple(a.clone() for a in args))

        handles.append(layer.register_forward_pre_hook(record))
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: layers[name] for name in calls}, calls


def _float_call(layer: ConvertedLayer, call: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The layer's inputs as floats, images none of which lies in units."""
    call = tuple(t.images() if isinstance(t, Units) else t for t in call)
    if not isinstance(layer, (QuantConv2d, QuantLinear)):
        return call
    steps = (layer.input.scale, layer.residual_step)
    return tuple(t if t.is_floating_point() else t.float() * s for t, s in zip(call, steps, strict=False))


def _time(layer: ConvertedLayer, call: tuple[Tensor, ...], cuda: bool) -> tuple[float, float, float]:
    """Median seconds of the layer, of the best dense fp32 kernel on the same values, and on a GPU of the best in half
    precision.

    The layer gets its inputs as they come, so that converting them counts; its dense rivals get them in the layout that each
    likes best. Where the layer itself is dense fp32, its rivals there are the dense kernels that give the same layout, which
    the layers behind it were chosen for, and all get the inputs as they come.
    """
    fns: dict[str, Callable[[], object]] = {"layer": kernels_of(layer, call) or partial(layer, *call)}
    dense = layer.to_dense().to(call[0].device)
    assert isinstance(dense, (DenseConv2d, DenseLinear))
    floats = _float_call(layer, call)
    in_half = [dense.with_kernel(kernel) for kernel in HALF_KERNELS] if cuda else []
    for rival in in_half:
        rival.float_dtype = rival.half_dtype or torch.float32
        fns[rival.kernel] = partial(rival, *(to_format(t, rival.kernel.partition(".")[2], None) for t in floats))
    if dense.half_dtype:
        dense = dense.with_kernel(CONV_KERNELS[0] if isinstance(dense, DenseConv2d) else LINEAR_KERNELS[0])
    rivals = [dense]
    if isinstance(dense, DenseConv2d):
        rivals = [dense.with_kernel(k) for k in dense_kernels(dense.geometry, call[0].device.type)]
    for rival in rivals:
        other_layout = (rival.kernel in NCHW_KERNELS) != (layer.kernel in NCHW_KERNELS)
        if rival is layer or (layer is dense and (rival.kernel == layer.kernel or other_layout)):
            continue
        preferred = NCHW if rival.kernel in NCHW_KERNELS else NHWC
        fns[rival.kernel] = partial(rival, *(t if layer is dense else to_format(t, preferred, None) for t in floats))
    times = interleaved(fns, min_rounds=9, cuda=cuda)
    own = times.pop("layer")
    half = min((times.pop(rival.kernel) for rival in in_half), default=math.nan)
    return own, min([*times.values(), own] if layer is dense else times.values()), half


def profile(model: nn.Module, example_inputs: Any, *, progress: bool = True) -> ProfileReport:
    """Time a converted model layer by layer on ``example_inputs``, each against the best dense fp32 kernel, interleaved.

    Args:
        model: what :func:`cnncomp.convert` returned. A plain module is converted first, without measuring.
        example_inputs: as in :func:`cnncomp.convert`.

    Raises:
        ArgumentError: no tensor among the inputs, or no module.
    """
    from cnncomp.convert import convert

    inputs = as_inputs(example_inputs, model)
    if not isinstance(model, ConvertedModel):
        model = convert(model, inputs, measure=False, progress=progress)
    cuda = any(isinstance(x, Tensor) and x.is_cuda for x in tree_leaves(inputs))
    device = next(x.device for x in tree_leaves(inputs) if isinstance(x, Tensor))
    rows = []
    with torch.inference_mode():
        layers, calls = _record_calls(model, inputs)
        with track("profiling layers", len(layers), show=progress) as advance:
            for name, layer in layers.items():
                own, dense, half = _time(layer, calls[name], cuda)
                info = layer.info
                rows.append(
                    LayerProfile(
                        info.name or name,
                        str(getattr(layer, "geometry", layer.extra_repr().split(" ")[0])),
                        "×".join(map(str, calls[name][0].shape)),
                        info.pattern + (" int8" if isinstance(layer, (QuantConv2d, QuantLinear)) else ""),
                        layer.kernel,
                        own * 1e3,
                        dense / own,
                        half / own,
                        layer.weight_bytes() / 1e6,
                        info.reason,
                    )
                )
                advance(name)
        total = interleaved({"": lambda: model(*inputs)}, min_rounds=9, budget_s=1.0, cuda=cuda)[""]
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / 1e6
    return ProfileReport(device_key(device), rows, total * 1e3, size, dict(model.conversion.kept))
