"""The model against published times: ``python -m bench.gpu_validation [--fit] [--recount]``.

The kernels of bench/published were compiled by nvcc 13 and counted in the emulator, which counts.json there keeps. Every second
layer of the convolutions and every second GEMM is for fitting; the error and the ranking of tiles are reported on the others,
which the fit has not seen. The form of the model was settled with the int8 points in view, before the fp16 ones were counted.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu_hardware import RTX_3070, Gpu, gpu_of
from bench.gpu_model import CALIBRATION, LABEL, Calibration, Launch, model

FOLDER = Path(__file__).parent / "published"
COUNTS = FOLDER / "counts.json"
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


def _rows(name: str) -> Iterator[dict[str, Any]]:
    with (FOLDER / name).open(newline="") as f:
        for row in csv.DictReader(line for line in f if not line.startswith("#")):
            yield {k: v if k == "dtype" else float(v) if k == "us" else int(v) for k, v in row.items()}


def points() -> list[Point]:
    """All published times."""
    found: list[Point] = []
    for gpu, name in ((RTX_3070, "conv_rtx3070.csv"), (gpu_of("80"), "gemm_a100.csv")):
        seen: dict[tuple[int, ...], int] = {}
        for row in _rows(name):
            us, dtype = row.pop("us"), row.pop("dtype", "int8")
            kernel = {"dtype": dtype} | {part: row.pop(part) for part in TILE if part in row}
            problem = tuple(row.values())
            place = seen.setdefault(problem, len(seen))
            found.append(Point(gpu, kernel, problem, us, place % 2 == 0))
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
    lines.append(
        f"tiles of a held-out layer: Spearman, mean {np.mean(found):.2f}, over {len(found)} layers whose tiles differ by 5 %;"
    )
    lines.append(
        f"the model's choice costs {np.exp(np.mean(np.log(loss))) - 1:.1%} in the geometric mean, at most {max(loss) - 1:.1%}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="fit the constants anew, and report with them")
    parser.add_argument("--recount", action="store_true", help="compile and count the kernels anew: some minutes")
    arguments = parser.parse_args()
    all_points = points()
    if arguments.recount:
        recount(all_points)
    counts = counted(all_points)
    calibration = fit(all_points, counts) if arguments.fit else CALIBRATION
    print(calibration)
    print(report(all_points, modelled(all_points, counts, calibration)))


if __name__ == "__main__":
    main()
