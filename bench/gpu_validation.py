"""The model against published times: ``python -m bench.gpu_validation [--conv DIR] [--fit] [--recount]``.

GEMMs on an A100 stand in bench/published. CUTLASS's convolutions of ResNet-50 on an RTX 3070 are read from the files of
:data:`CONV_FILES` in ``DIR``, which is to be had from :data:`CONV_SOURCE`. All kernels were compiled by nvcc 13 and counted in
the emulator, which bench/published/counts.json keeps. Every second layer of the convolutions and every second GEMM is for
fitting; the error and the ranking of tiles are reported on the others, which the fit has not seen. The form of the model was
settled with the int8 points in view, before the fp16 ones were counted.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu_hardware import RTX_3070, Gpu, gpu_of
from bench.gpu_model import CALIBRATION, LABEL, Calibration, Launch, model

FOLDER = Path(__file__).parent / "published"
COUNTS = FOLDER / "counts.json"
#: Of the profiler of CUTLASS 2.8, clocks not locked: batch 256, outputs in the accumulator's type.
CONV_SOURCE = "https://github.com/masahi/tvm-cutlass-eval/tree/63d5ee62e1345302333aef5b5c4a4181b3405d8a/conv2d"
CONV_FILES = {
    "int8": "resnet50_cutlass_profiler_result_int8.csv",
    "fp16": "resnet50_cutlass_profiler_result_fp16_fp32_accum.csv",
}
BLOCKS = 16  # of a grid that are run
#: What the model takes of a summary.
USED = ("tensor_ops", "instructions", "wavefronts", "l2_bytes", "dram_bytes", "bytes_in_flight", "blocks", "warps",
        "shared_bytes", "classes")  # fmt: skip
SPREAD = 1.05  # tiles whose slowest takes less than so many times the fastest can't be ranked: the clock varies as much
TILE = ("m", "n", "k", "stages", "warp_m", "warp_n", "warp_k")


@dataclass(frozen=True)
class Point:
    """A published time in microseconds of one kernel on one problem."""

    gpu: Gpu
    kernel: dict[str, Any]
    problem: tuple[int, ...]
    us: float
    fitted: bool

    @property
    def key(self) -> str:
        """Of the kernel and the problem, for the cache of counts."""
        return json.dumps([self.kernel, self.problem])


def _gemms() -> Iterator[tuple[dict[str, Any], tuple[int, ...], float]]:
    """Kernel, problem and microseconds of each row of the table here."""
    with (FOLDER / "gemm_a100.csv").open(newline="") as f:
        for row in csv.DictReader(line for line in f if not line.startswith("#")):
            us = float(row.pop("us"))
            kernel = {"dtype": "int8"} | {part: int(row.pop(part)) for part in TILE}
            yield kernel, tuple(int(size) for size in row.values()), us


def _convs(folder: Path) -> Iterator[tuple[dict[str, Any], tuple[int, ...], float]]:
    """The same of the rows of the profiler's files whose kernels are for sm_80 and read 16 bytes at a time."""
    for dtype, name in CONV_FILES.items():
        with (folder / name).open(newline="") as f:
            for row in csv.DictReader(f):
                wide = row["Operation"].endswith("align16" if dtype == "int8" else "align8")
                if row["min_cc"] != "80" or row["iterator_algorithm"] != "optimized" or not wide:
                    continue
                tile = {part: int(row[f"cta_{part}"]) for part in "mnk"} | {"stages": int(row["stages"])}
                warps = {f"warp_{part}": tile[part] // int(row[f"warps_{part}"]) for part in "mn"}
                sizes = tuple(int(row[size]) for size in ("n", "h", "c", "k", "r", "stride_h", "pad_h"))
                yield {"dtype": dtype} | tile | warps, sizes, 1e3 * float(row["Runtime"])


def points(conv: Path | None = None) -> list[Point]:
    """All published times of kernels that were counted; those of convolutions if their files are in the folder ``conv``."""
    found: list[Point] = []
    known = json.loads(COUNTS.read_text())
    for gpu, rows in ((RTX_3070, _convs(conv) if conv else ()), (gpu_of("80"), _gemms())):
        seen: dict[tuple[int, ...], int] = {}
        for kernel, problem, us in rows:
            point = Point(gpu, kernel, problem, us, False)
            if point.key in known:
                found.append(replace(point, fitted=seen.setdefault(problem, len(seen)) % 2 == 0))
    return found


def count(point: Point) -> dict[str, Any]:
    """Counts of a point's kernel and how it is launched, from the emulator."""
    from bench.cutlass_kernels import Tile, Variant
    from bench.peers_cutlass import run_conv, run_gemm

    dtype = point.kernel["dtype"]
    tile = Tile(*(point.kernel[part] for part in TILE if part in point.kernel))
    if len(point.problem) == 3:
        result, launch = run_gemm(
            Variant("gemm", "int8", tile, "fp16", "int32", relu=False), *point.problem, most=BLOCKS
        )
    else:
        batch, size, c, k, r, stride, padding = point.problem
        sums, alignment = ("int32", 16) if dtype == "int8" else ("fp32", 8)
        variant = Variant("conv", dtype, tile, sums, sums, relu=False, alignment=alignment)
        result, launch = run_conv(variant, batch, (size, size), c, k, (r, r), padding, stride, most=BLOCKS)
    kept = {name: value for name, value in result.summary().items() if name in USED}
    kept["classes"] = {"barrier": kept["classes"].get("barrier", 0)}
    return {"counts": kept, "launch": asdict(launch)}


def counted(all_points: list[Point]) -> list[dict[str, Any]]:
    """Counts of all points, as bench/published keeps them."""
    known = json.loads(COUNTS.read_text())
    return [known[point.key] for point in all_points]


def recount(all_points: list[Point]) -> None:
    """Compile and run all kernels again, and keep the counts."""
    lines = [f"{json.dumps(point.key)}: {json.dumps(count(point))}" for point in all_points]
    COUNTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def modelled(all_points: list[Point], counts: list[dict[str, Any]], calibration: Calibration) -> np.ndarray[Any, Any]:
    """Microseconds of each point."""
    return np.array(
        [
            model(c["counts"], Launch(**c["launch"]), p.gpu, calibration)["us"]
            for p, c in zip(all_points, counts, strict=True)
        ]
    )


def fit(all_points: list[Point], counts: list[dict[str, Any]]) -> Calibration:
    """Constants with the least sum of absolute logarithms of modelled to published times, over the points for fitting.

    By the simplex method from several starts: five numbers only, each within bounds.
    """
    from scipy.optimize import minimize  # type: ignore[import-untyped]

    used = [(p, c) for p, c in zip(all_points, counts, strict=True) if p.fitted]
    mine, theirs = [p for p, _ in used], [c for _, c in used]
    us = np.array([p.us for p in mine])

    def constants(v: np.ndarray[Any, Any]) -> Calibration:
        v = v.clip(-6, 4)
        chip, l2, dram = (1 / (1 + math.exp(-x)) for x in v[:3])
        return Calibration(chip, l2, dram, 1 + math.exp(v[3]), 1e-6 * math.exp(v[4]))

    def loss(v: np.ndarray[Any, Any]) -> float:
        return float(np.abs(np.log(modelled(mine, theirs, constants(v)) / us)).mean())

    best = None
    for norm in (0.0, 1.0, 2.0):
        for delay in (-2.0, 0.0):
            start = np.array([2.0, 2.0, 2.0, norm, delay])
            answer = minimize(
                loss, start, method="Nelder-Mead", options={"maxiter": 1500, "xatol": 1e-3, "fatol": 1e-5}
            )
            if best is None or answer.fun < best.fun:
                best = answer
    assert best is not None
    return constants(best.x)


def ranks(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Ranks of distinct values, 0 for the least; equal ones share their mean."""
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def spearman(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Rank correlation; 0 where one side is constant."""
    x, y = ranks(a) - (len(a) - 1) / 2, ranks(b) - (len(b) - 1) / 2
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else 0.0


def within_layers(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], layers: Sequence[list[int]]) -> tuple[float, float]:
    """How two lists of times order the tiles of one layer, over all layers together.

    Args:
        a, b: Times.
        layers: Places of each layer's tiles.

    Returns:
        Rank correlation of the times, each over its layer's geometric mean; of pairs of a layer's tiles that differ by more
        than SPREAD in ``b``, the fraction that ``a`` orders alike.
    """
    x, y = (np.concatenate([np.log(t[where]) - np.log(t[where]).mean() for where in layers]) for t in (a, b))
    pairs = [
        pair
        for where in layers
        for pair in combinations(where, 2)
        if abs(math.log(b[pair[0]] / b[pair[1]])) > math.log(SPREAD)
    ]
    alike = [(a[i] < a[j]) == (b[i] < b[j]) for i, j in pairs]
    return spearman(x, y), sum(alike) / len(alike) if alike else 1.0


def report(all_points: list[Point], us: np.ndarray[Any, Any]) -> str:
    """Errors on fitted and held-out points per GPU and dtype; ranking of tiles per held-out layer."""
    published = np.array([p.us for p in all_points])
    error = np.abs(us / published - 1)
    lines = [f"{'points':34} {'number':>6} {'median':>7} {'worst':>7}   ({LABEL}; error against published times)"]
    groups: dict[tuple[str, str, bool], list[int]] = defaultdict(list)
    for i, p in enumerate(all_points):
        groups[p.gpu.name, p.kernel["dtype"], p.fitted].append(i)
        groups["all", "", p.fitted].append(i)
    for (name, dtype, fitted), where in sorted(groups.items(), key=lambda item: (item[0][2], item[0])):
        title = f"{name} {dtype}, {'fitted' if fitted else 'held out'}"
        lines.append(f"{title:34} {len(where):6d} {np.median(error[where]):6.1%} {error[where].max():6.1%}")
    held = [i for i, p in enumerate(all_points) if not p.fitted]
    lines.append(f"rank correlation (Spearman) over all held-out points: {spearman(us[held], published[held]):.3f}")
    layers: dict[Any, list[int]] = defaultdict(list)
    for i in held:
        if len(all_points[i].problem) > 3:
            layers[all_points[i].kernel["dtype"], all_points[i].problem].append(i)
    found, loss = [], []
    for (dtype, problem), where in layers.items():
        spread = published[where].max() / published[where].min()
        picked = published[where][us[where].argmin()] / published[where].min()
        loss.append(picked)
        text = f"  {dtype} batch, size, c, k, r, stride, padding {problem}: spread {spread:.2f}, "
        if spread > SPREAD:
            found.append(spearman(us[where], published[where]))
            text += f"Spearman {found[-1]:.2f}, "
        lines.append(text + f"the tile that the model takes is {picked - 1:.1%} slower than the best")
    if not loss:
        return "\n".join([*lines, "tiles of one layer are not ranked without the convolutions (--conv)"])
    lines.append(
        f"tiles of a held-out layer: Spearman, mean {np.mean(found):.2f}, over {len(found)} layers whose tiles differ by 5 %;"
    )
    for name in (*CONV_FILES, "both"):
        tiles = [where for (dtype, _), where in layers.items() if name in (dtype, "both")]
        pooled, alike = within_layers(us, published, tiles)
        lines.append(
            f"held-out layers of the profile {name} together, times over their layer's mean: Spearman {pooled:.2f}; "
            f"{alike:.0%} of pairs that differ by 5 % right;"
        )
    lines.append(
        f"the model's choice costs {np.exp(np.mean(np.log(loss))) - 1:.1%} in the geometric mean, at most {max(loss) - 1:.1%}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--conv", type=Path, metavar="DIR", help=f"folder with the files from {CONV_SOURCE}")
    parser.add_argument("--fit", action="store_true", help="fit the constants anew, and report with them")
    parser.add_argument("--recount", action="store_true", help="compile and count the kernels anew: some minutes")
    arguments = parser.parse_args()
    all_points = points(arguments.conv)
    if arguments.recount:
        recount(all_points)
    counts = counted(all_points)
    calibration = fit(all_points, counts) if arguments.fit else CALIBRATION
    print(calibration)
    print(report(all_points, modelled(all_points, counts, calibration)))


if __name__ == "__main__":
    main()
