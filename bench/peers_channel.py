"""Channel pruning against torch-pruning (``pip install torch-pruning``): same trained network, same data, same budget.

``python -m bench.peers_channel [--seeds 3] [--json FILE]``; one thread. DigitsNet is trained on scikit-learn's digits and then
pruned to the multiply-accumulates that are left when every layer loses a half, three quarters or seven eighths of its channels:
by both packages with the same criterion, uniformly and ranked globally (there by the least whole percentage of channels that is
within the budget), and trained on for the same epochs. Accuracies are means over seeds and their
standard error; milliseconds are medians, all networks of a budget timed in turn, for the last seed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import cnncomp
from cnncomp import data
from cnncomp._modules import LAYER_TYPES, reduction_length
from cnncomp.demo.common import correct, forward, machine, machine_line
from cnncomp.demo.digits import TIMED_BATCH, train
from cnncomp.dispatch import interleaved
from cnncomp.models import DigitsNet
from cnncomp.progress import track

RATIOS = (0.5, 0.75, 0.875)
TRAIN_EPOCHS, TUNE_EPOCHS = 15, 3

#: From a network (changed in place), a fraction of channels and training batches to the pruned network.
Prune = Callable[[nn.Module, float, list[tuple[Tensor, Tensor]]], nn.Module]


def ours(scope: str, criterion: str) -> Prune:
    def prune(model: nn.Module, ratio: float, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
        taylor = dict(data=batches) if criterion == "taylor" else {}
        return cnncomp.prune_channels(model, ratio, batches[0][0][:1], scope=scope, criterion=criterion, **taylor)

    return prune


def theirs(scope: str, criterion: str) -> Prune:
    def prune(model: nn.Module, ratio: float, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
        import torch_pruning as tp

        kinds = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
        pruner = tp.pruner.BasePruner(
            model,
            batches[0][0][:1],
            importance=kinds[criterion](),
            pruning_ratio=ratio,
            max_pruning_ratio=max(0.9, ratio),  # what cnncomp allows a group to lose
            global_pruning=scope == "global",
            ignored_layers=[model.fc],
        )
        if criterion == "taylor":
            model.zero_grad()
            for images, labels in batches:
                F.cross_entropy(model(images), labels).backward()
        pruner.step()
        model.zero_grad()
        return model

    return prune


METHODS: dict[tuple[str, str, str], Prune] = {
    (package, scope, criterion): make(scope, criterion)
    for scope in ("layer", "global")
    for criterion in ("magnitude", "taylor")
    for package, make in (("cnncomp", ours), ("torch-pruning", theirs))
}


def macs_of(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of the convolutions and linear layers."""
    total = 0

    def count(module: Any, args: Any, out: Tensor) -> None:
        nonlocal total
        total += out.numel() * reduction_length(module)

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, LAYER_TYPES)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return total


def within(prune: Prune, model: nn.Module, budget: int, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy of ``model``, pruned by the least fraction that leaves at most ``budget`` multiply-accumulates."""
    x = batches[0][0][:1]
    low, high = 0, 99  # per cent; more channels out, fewer operations
    best = prune(copy.deepcopy(model), high / 100, batches)
    while high - low > 1:
        middle = (low + high) // 2
        pruned = prune(copy.deepcopy(model), middle / 100, batches)
        if macs_of(pruned, x) <= budget:
            best, high = pruned, middle
        else:
            low = middle
    return best


@dataclass
class Row:
    """One method at one budget: accuracies by seed, before and after training on; the rest for the last seed."""

    ratio: float
    package: str
    scope: str
    criterion: str
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    parameters: int = 0
    macs: int = 0
    ms: float = math.nan
    ms_converted: float = math.nan


def run(seeds: int) -> list[Row]:
    """All methods at all budgets."""
    split = data.digits()
    batches = list(zip(split.train_images.split(64), split.train_labels.split(64), strict=True))
    x = split.test_images[:TIMED_BATCH]

    def accuracy(model: nn.Module) -> float:
        model.eval()
        return correct(forward(model, split.test_images, batch=64), split.test_labels) / len(split.test_labels)

    rows = {("dense",): Row(0.0, "dense", "", "")}
    rows.update({(r, *m): Row(r, *m) for r in RATIOS for m in METHODS})
    with track("pruning and training", seeds * len(rows)) as advance:
        for seed in range(seeds):
            torch.manual_seed(seed)
            dense = DigitsNet()
            train(dense, split, TRAIN_EPOCHS, 2e-3, "training")
            last: dict[tuple[Any, ...], nn.Module] = {("dense",): dense}
            rows["dense",].after.append(accuracy(dense))
            advance("dense")
            for ratio in RATIOS:
                model = ours("layer", "magnitude")(copy.deepcopy(dense), ratio, batches)
                budget = macs_of(model, x[:1])
                for method, prune in METHODS.items():
                    if method[1] == "layer":
                        model = prune(copy.deepcopy(dense), ratio, batches)
                    else:
                        model = within(prune, dense, budget, batches[:8])
                    row = rows[(ratio, *method)]
                    row.before.append(accuracy(model))
                    train(model, split, TUNE_EPOCHS, 1e-3, "training on")
                    row.after.append(accuracy(model))
                    last[(ratio, *method)] = model
                    advance(" ".join(method))
    time_all(rows, last, x)
    return list(rows.values())


def time_all(rows: dict[tuple[Any, ...], Row], models: dict[tuple[Any, ...], nn.Module], x: Tensor) -> None:
    """Sizes and times of the last seed's networks, those of a budget and the dense one in turn."""
    for key, model in models.items():
        rows[key].parameters = sum(p.numel() for p in model.parameters())
        rows[key].macs = macs_of(model, x[:1])
    for ratio in RATIOS:
        some = {key: m for key, m in models.items() if key[0] in (ratio, "dense")}
        fast = {key: cnncomp.convert(m, x, cache=False) for key, m in some.items()}
        fns = {key: (lambda m=m: m(x)) for key, m in some.items()}
        fns.update({("fast", *key): (lambda m=m: m(x)) for key, m in fast.items()})
        with torch.inference_mode():
            seconds = interleaved(fns, min_rounds=25, budget_s=6.0)
        for key in some:
            rows[key].ms, rows[key].ms_converted = 1e3 * seconds[key], 1e3 * seconds[("fast", *key)]


def percent(values: list[float]) -> str:
    """ "98.1 ± 0.2": mean and standard error."""
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if importlib.util.find_spec("torch_pruning") is None:
        print("skipped: torch-pruning is not installed (pip install torch-pruning)")
        return
    torch.set_num_threads(1)
    rows = run(options.seeds)
    table = Table()
    for column in (
        "channels out",
        "package",
        "scope",
        "criterion",
        "accuracy pruned, %",
        "trained on, %",
        "parameters",
    ):
        table.add_column(column)
    for column in ("MACs", "ms eager", "ms converted"):
        table.add_column(column, justify="right")
    for r in rows:
        names = (f"{r.ratio:.1%}" if r.ratio else "none", r.package, r.scope, r.criterion)
        numbers = (f"{r.parameters:,}", f"{r.macs:,}", f"{r.ms:.3f}", f"{r.ms_converted:.3f}")
        table.add_row(*names, percent(r.before), percent(r.after), *numbers)
    console = Console(width=150)
    console.print(table)
    import torch_pruning

    console.print(
        f"{machine_line()}; torch-pruning {torch_pruning.__version__}; {TIMED_BATCH} images a call", highlight=False
    )
    if options.json is not None:
        found = {"machine": machine(), "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
