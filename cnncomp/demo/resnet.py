"""Part 3: what 90 % zeros are worth on a ResNet-50. Its weights are random: only the time is shown, no accuracy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

import cnncomp
from cnncomp.convert import ConvertedModel
from cnncomp.demo.common import (
    Column,
    Options,
    Report,
    compile_float,
    race,
    save_and_load,
    save_float,
    say,
)

SPARSITY = 0.9
COLUMNS = (
    Column("name", "model"),
    Column("mb", "MB on disk", ".1f"),
    Column("ms", "ms", ".1f"),
    Column("ratio", "× eager", ".2f"),
    Column("ratio_compile", "× compile", ".2f"),
)
LAYER_COLUMNS = (
    Column("kernel", "kernel"),
    Column("layers", "layers", "d"),
    Column("ms", "ms, sum", ".2f"),
    Column("dense_ms", "best dense, ms", ".2f"),
    Column("ratio", "ratio", ".2f"),
    Column("least", "least", ".2f"),
    Column("most", "most", ".2f"),
    Column("which", "which"),
)
EAGER, COMPILE, SPARSE = "torch eager, fp32", "torch.compile, fp32", "cnncomp, 90% zeros"


def run(options: Options) -> list[Report]:
    """Latency of a pruned ResNet-50 converted, against the same network in torch, and its layers by kernel."""
    torch.manual_seed(0)
    size = 64 if options.quick else 224
    model = cnncomp.models.resnet50().eval()
    cnncomp.remove_masks(cnncomp.prune(model, sparsity=SPARSITY, scope="layer"))
    x = torch.randn(1, 3, size, size)
    say("ResNet-50: choosing a kernel for each layer")
    converted = cnncomp.convert(model, x, measure=not options.quick, cache=False)
    loaded, mb = save_and_load(converted, options.out / "resnet50_sparse.cnncomp")
    fp32_mb = save_float(model, options.out / "resnet50.pt")
    report = Report("resnet50", f"ResNet-50, {SPARSITY:.0%} zeros in each layer but the first and the last", COLUMNS)
    rivals: dict[str, Callable[[Tensor], Tensor]] = {EAGER: model}
    if options.compile:
        fast = compile_float(model, x)
        if isinstance(fast, str):
            report.notes.append(fast)
        else:
            rivals[COMPILE] = fast
    ms = race({**rivals, SPARSE: loaded}, x, options)
    for name in ms:
        ratios = {"ratio": ms[EAGER] / ms[name], "ratio_compile": ms.get(COMPILE, float("nan")) / ms[name]}
        row = {"name": name, "mb": mb if name == SPARSE else fp32_mb, "ms": ms[name]}
        report.rows.append({**row, **(ratios if name == SPARSE else {})})
    report.notes += [
        f"ms: batch 1, {size}×{size}, median, timed in turn in one process. × above 1: faster.",
        "The weights are random: what a trained network's accuracy would be with so many zeros, this does not show.",
    ]
    if loaded.plan.reason:
        report.notes.append(loaded.plan.reason)
    return [report, layers(loaded)] if loaded.plan.measured else [report]


def layers(model: ConvertedModel) -> Report:
    """The layers by the kernel that was chosen for them, with the times that decided it."""
    groups: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for name, plan in model.plan.layers.items():
        dense = min(ms for kernel, ms in plan.ms.items() if kernel.startswith("dense."))
        groups[plan.kernel].append((name, plan.ms[plan.kernel], dense))
    report = Report("resnet50_layers", "Its layers, as they were timed one by one", LAYER_COLUMNS)
    for kernel, rows in sorted(groups.items(), key=lambda item: -len(item[1])):
        own, dense = sum(ms for _, ms, _ in rows), sum(ms for _, _, ms in rows)
        ratios = [d / ms for _, ms, d in rows if ms > 0]  # a layer with nothing to choose between was not timed
        which = ", ".join(name for name, _, _ in rows) if len(rows) <= 4 else f"{rows[0][0]} … {rows[-1][0]}"
        row = {"kernel": kernel, "layers": len(rows), "which": which}
        if ratios:
            row |= {"ms": own, "dense_ms": dense, "ratio": dense / own, "least": min(ratios), "most": max(ratios)}
        report.rows.append(row)
    return report
