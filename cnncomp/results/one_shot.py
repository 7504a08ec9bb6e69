"""MobileNetV2 pruned in one shot, without training and without labels: ``python -m cnncomp.results.one_shot``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import cnncomp
from cnncomp import data
from cnncomp.demo.common import correct, forward, machine_line, say
from cnncomp.demo.mobilenet import pretrained, scored_photos, varied

CROPS = 16  # of each photograph that is scored
COLUMNS = ("", "as fp32", "95 % interval", "logit cosine", "KL", "top-1 of 20", "zeros", "s")


@dataclass(frozen=True)
class Case:
    """A row: the arguments of :func:`cnncomp.prune` that differ."""

    name: str
    pattern: str = "unstructured"
    scope: str = "layer"
    reconstruct: bool = False
    permute: bool = False


CASES = (
    Case("50 % unstructured, magnitude, per layer"),
    Case("50 % unstructured, magnitude, global", scope="global"),
    Case("50 % unstructured, reconstructed", reconstruct=True),
    Case("2:4, magnitude", "2:4"),
    Case("2:4, magnitude, channels permuted", "2:4", permute=True),
    Case("2:4, reconstructed", "2:4", reconstruct=True),
    Case("2:4, channels permuted, reconstructed", "2:4", reconstruct=True, permute=True),
)


@dataclass(frozen=True)
class Row:
    """What came out. ``low`` and ``high`` bound ``agreement``; ``zeros`` is their fraction of all weights."""

    name: str
    agreement: float
    low: float
    high: float
    cosine: float
    kl: float
    top1: int
    zeros: float
    seconds: float


def calibration(crops_per_photo: int) -> list[Tensor]:
    """Images to calibrate on, none of which is scored, in batches of eight: random crops of twelve photographs, and as many
    again, but for rounding, of forty small pictures, enlarged. What is in them counts more than how sharp they are."""
    photos, pictures = data.calibration_photos(), data.cifar_pictures()
    of_each = max(1, crops_per_photo * len(photos) // len(pictures))
    crops = [data.augment(p.image, crops_per_photo, seed=i) for i, p in enumerate(photos)]
    crops += [data.augment(p.image, of_each, seed=1000 + i) for i, p in enumerate(pictures)]
    joined = torch.cat(crops)
    order = torch.randperm(len(joined), generator=torch.Generator().manual_seed(0))
    return list(joined[order].split(8))


def interval(hits: Tensor, samples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of ``hits`` (photographs, crops), drawing photographs, whose crops are alike."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(hits), (samples, len(hits)), generator=generator)
    means = hits.float().mean(1)[drawn].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def score(case: Case, model: nn.Module, seconds: float, seen: Scored) -> Row:
    """Compare a pruned model with fp32."""
    logits = forward(model, seen.crops)
    hits = (logits.argmax(1) == seen.crop_logits.argmax(1)).view(-1, CROPS)
    low, high = interval(hits)
    p, q = (x.log_softmax(1) for x in (seen.crop_logits, logits))
    return Row(
        name=case.name,
        agreement=float(hits.float().mean()),
        low=low,
        high=high,
        cosine=float(torch.cosine_similarity(logits, seen.crop_logits).mean()),
        kl=float((p.exp() * (p - q)).sum(1).mean()),
        top1=correct(forward(model, seen.images), seen.labels),
        zeros=cnncomp.sparsity_of(model).sparsity,
        seconds=seconds,
    )


@dataclass(frozen=True)
class Scored:
    """What is scored on, and what fp32 says to the crops."""

    crops: Tensor
    crop_logits: Tensor
    images: Tensor
    labels: Tensor


def run(cases: Sequence[Case], crops_per_photo: int, out: Path) -> list[Row]:
    """One row per case. Rows that ``out`` holds already are not made anew."""
    done = {r["name"]: Row(**r) for r in json.loads(out.read_text())} if out.is_file() else {}
    photos, images, labels = scored_photos()
    crops = varied(photos, CROPS)
    seen = Scored(crops, forward(pretrained(), crops, "fp32"), images, labels)
    say(f"fp32: {correct(forward(pretrained(), images), labels)} of {len(labels)} right")
    batches = calibration(crops_per_photo)
    for case in cases:
        if case.name in done:
            continue
        say(f"{case.name} …")
        model, start = pretrained(), time.perf_counter()
        options = {"scope": case.scope, "reconstruct": case.reconstruct, "permute": case.permute}
        cnncomp.prune(model, 0.5, case.pattern, data=batches, **options)  # type: ignore[arg-type]
        done[case.name] = score(case, model, time.perf_counter() - start, seen)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps([asdict(r) for r in done.values()], indent=1))
    return [done[case.name] for case in cases]


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 1)}"]
    for r in rows:
        cells = (f"{r.agreement:.1%}", f"{r.low:.0%}–{r.high:.0%}", f"{r.cosine:.3f}", f"{r.kl:.2f}", f"{r.top1}")
        lines.append(f"| {r.name} | {' | '.join(cells)} | {r.zeros:.1%} | {r.seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crops", type=int, default=10, help="crops of each photograph to calibrate on")
    parser.add_argument("--out", type=Path, default=Path("build/results/one_shot.json"), help="where rows are kept")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = run([c for c in CASES if options.only in c.name], options.crops, options.out)
    print(table(rows))
    print(f"\n{machine_line()}")


if __name__ == "__main__":
    main()
