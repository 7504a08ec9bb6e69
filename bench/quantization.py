"""int8 after training on a pretrained MobileNetV2: each method against fp32, as a Markdown table.

    python -m bench.quantization [--quick] [--only ROW] [--json FILE]

Calibrated on crops of nine photographs. Scored on twenty others and their crops, and, to choose between methods without
looking at those, on crops of three more ("validation").
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import cnncomp
from bench.torchao_int8 import torchao_int8
from cnncomp import data
from cnncomp.demo.common import batches, forward, machine_line
from cnncomp.demo.mobilenet import pretrained

Arguments = dict[str, Any]

#: Photographs kept from calibration, to choose between methods.
VALIDATION = ("chelsea", "coffee", "rocket")

#: Name and arguments of cnncomp.quantize. "Equalised": by activations; "adaptive": rounding; "biases": corrected.
_EQUAL: Arguments = {"equalize": "activations"}
_ADAPTIVE: Arguments = {"rounding": "adaptive"}
_BIAS: Arguments = {"correct_bias": True}
VARIANTS: dict[str, Arguments] = {
    "mse": {},
    "mse, equalised": _EQUAL,
    "percentile, equalised": {**_EQUAL, "method": "percentile"},
    "mse, equalised, 5 % float": {**_EQUAL, "float_budget": 0.05},
    "min-max": {"method": "minmax"},
    "percentile": {"method": "percentile"},
    "entropy": {"method": "entropy"},
    "mse, equalised by weights": {"equalize": "weights"},
    "mse, biases": _BIAS,
    "mse, mean-shift": {"scheme": "mean-shift"},
    "mse, equalised, biases": {**_EQUAL, **_BIAS},
    "mse, equalised, adaptive": {**_EQUAL, **_ADAPTIVE},
    "mse, adaptive": _ADAPTIVE,
    "mse, equalised, adaptive, biases": {**_EQUAL, **_ADAPTIVE, **_BIAS},
}


def crops_of(photos: list[data.Photo], count: int, seed: int) -> Tensor:
    """``count`` random crops of each photograph, those of one photograph together."""
    return torch.cat([data.augment(p.image, count, seed=seed + i) for i, p in enumerate(photos)])


def scores(expected: Tensor, got: Tensor, groups: int) -> dict[str, float]:
    """Means over all rows, and a 95 % interval of the agreement by bootstrap over photographs, whose crops are not
    independent.

    Args:
        expected, got: (N, classes) logits; N / ``groups`` consecutive rows belong to one photograph.
    """
    agree = (expected.argmax(1) == got.argmax(1)).double()
    by_photo = agree.view(groups, -1).mean(1)
    picks = torch.randint(groups, (10_000, groups), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(by_photo[picks].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    kl = F.kl_div(got.log_softmax(1), expected.log_softmax(1), log_target=True, reduction="none").sum(1)
    return {
        "cosine": F.cosine_similarity(expected, got).mean().item(),
        "kl": kl.mean().item(),
        "agreement": agree.mean().item(),
        "low": low,
        "high": high,
    }


def _nncf(model: nn.Module, batches: list[Tensor]) -> Callable[[Tensor], Tensor] | None:
    """NNCF's post-training int8 (its fake-quantised model), or None where it is not installed."""
    os.environ.setdefault(
        "NNCF_EXTENSION_LOAD_TIMEOUT", "0"
    )  # its first call compiles C++, for minutes on a slow machine
    try:
        import nncf
    except ImportError:
        print("NNCF is not installed: its row is left out (pip install nncf)")
        return None
    return nncf.quantize(copy.deepcopy(model), nncf.Dataset(batches), subset_size=len(batches))


def _torchao(model: nn.Module, batches: list[Tensor]) -> Callable[[Tensor], Tensor] | None:
    """torchao's static int8, or None where it is not installed."""
    try:
        return torchao_int8(model, batches)
    except ImportError:
        print("torchao is not installed: its row is left out (pip install torchao)")
        return None


#: Other packages, by the names of their rows.
PEERS = {"NNCF, default": _nncf, "torchao, default": _torchao}


def _variants(
    model: nn.Module, batches: list[Tensor], names: list[str]
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    for name in names:
        if name in VARIANTS:
            changed = cnncomp.quantize(copy.deepcopy(model), batches, **VARIANTS[name])
            yield name, cnncomp.convert(changed, batches[0][:1], measure=False)
        elif (other := PEERS[name](model, batches)) is not None:
            yield name, other


def main(
    quick: Annotated[bool, typer.Option(help="Two methods on a few crops.")] = False,
    crops: Annotated[int, typer.Option(help="Crops of each photograph.")] = 16,
    only: Annotated[list[str] | None, typer.Option(metavar="ROW", help="Rows to make; all by default.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Print the table."""
    known = [*VARIANTS, *PEERS]
    names = only or known[: 2 if quick else None]
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"no row {unknown[0]!r}; there are {', '.join(known)}", param_hint="--only")
    torch.set_num_threads(1)
    crops = 2 if quick else crops
    model, photos, others = pretrained(), data.imagenet_photos(), data.calibration_photos()
    held_out = [p for p in others if p.name in VALIDATION]
    others = [p for p in others if p.name not in VALIDATION]
    calibration = crops_of(others, 1 if quick else 8, seed=1)
    calibration = calibration[torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0))]
    whole = torch.stack([data.preprocess(p.image) for p in photos])
    random = crops_of(photos, crops, seed=100).view(len(photos), crops, *whole.shape[1:])
    images = torch.cat([whole[:, None], random], 1).flatten(0, 1)  # a photograph, then its crops
    validation = crops_of(held_out, 2 * crops, seed=10_000)
    expected, expected_validation = forward(model, images), forward(model, validation)
    print(machine_line())
    counts = f"{len(validation)} of {len(held_out)} for validation, {len(calibration)} to calibrate"
    print(f"{len(images)} images of {len(photos)} photographs scored, {counts}\n")
    print("| | logit cosine | KL | top-1 as fp32 | 95 % | KL, validation | calibration s |")
    print("|---|---:|---:|---:|---|---:|---:|")
    rows, start = [], time.monotonic()
    for name, changed in _variants(model, batches(calibration, 8), names):
        seconds = time.monotonic() - start
        row = scores(expected, forward(changed, images), len(photos))
        row["kl_validation"] = scores(expected_validation, forward(changed, validation), len(held_out))["kl"]
        rows.append({"name": name, **row, "seconds": seconds})
        interval = f"{row['low']:.1%} to {row['high']:.1%}"
        cells = (f"{row['cosine']:.5f}", f"{row['kl']:.4f}", f"{row['agreement']:.1%}", interval)
        print(f"| {name} | {' | '.join(cells)} | {row['kl_validation']:.4f} | {seconds:.0f} |", flush=True)
        start = time.monotonic()
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
