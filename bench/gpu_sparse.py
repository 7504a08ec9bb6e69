"""Modelled times of the CUDA kernels with sparse weights, beside dense ones: ``python -m bench.gpu_sparse``.

Adds its records to those that ``python -m bench.gpu_model`` has written.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu_counts import Counted, counted
from bench.gpu_hardware import GPUS, Gpu
from bench.gpu_layers import BLOCKS, out_size, registers_of, run_layer
from bench.gpu_model import L1, LABEL, OUT, Launch, _record, model, resident, sample_of, touched, varied
from bench.gpu_peers import conv_candidates
from bench.layers import GPU_NETWORKS, ConvShape, gpu_shapes
from cnncomp import _cuda
from cnncomp.sparsity import pack_2to4
from cnncomp.sparsity.two_four import why_not_2to4
from tests import cuda_emulated as emulated
from tests.ptx import Caches, Checks, GlobalMemory, Result, emulate, load
from tests.ptx.cute import headers

DTYPES = ("int8", "fp16")


class SparseRun(NamedTuple):
    """A sparse kernel on a layer."""

    kernel: str
    dtype: str
    pattern: str
    sparsity: float
    counted: Counted


def two_to_four(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A weight of ones and zeros: the first and the third of four input channels. The values change no count."""
    weight = torch.zeros(shape, dtype=dtype)
    weight[:, ::2] = 1
    return weight


def _run(plan: dict[str, Any], arch: str, memory: GlobalMemory, launch: Launch) -> tuple[Result, Launch]:
    ptx = emulated.ptx_of(emulated.source_of(plan["kernel"]), arch)
    result = emulate(
        load(ptx, emulated.entry_of(plan["kernel"], ptx)), plan["grid"], plan["block"], [plan["params"]],
        shared=plan["shared"], memory=memory, blocks=sample_of(launch.grid, BLOCKS),
        checks=Checks(races=False, initialised=False, blocks=False), caches=Caches(l1=L1),
    )  # fmt: skip
    return result, Launch(**{**vars(launch), "registers": registers_of(plan["kernel"], arch)})


def run_2to4(shape: ConvShape, batch: int, arch: str, gpu: Gpu, dtype: str = "int8") -> SparseRun | None:
    """The 2:4 convolution, no residual; None for a layer that it can't run. ``dtype``: "int8", with u8 input and output, or
    "fp16"."""
    g, half = shape.geometry, dtype == "fp16"
    kind, of_weight = (torch.float16, torch.float16) if half else (torch.uint8, torch.int8)
    if why_not_2to4(shape.c, g.kernel_size, shape.groups, kind.itemsize):
        return None
    memory = GlobalMemory()
    x = torch.zeros(batch * shape.h * shape.w * shape.c, dtype=kind)
    weight = pack_2to4(two_to_four((shape.k, shape.c // shape.groups, shape.r, shape.s), of_weight), shape.groups)
    out = torch.zeros(batch * math.prod(out_size(shape)) * shape.k, dtype=kind)
    constants, place, code = torch.ones(3, shape.k), memory.pointer, emulated.DTYPE_CODE[kind]
    planned = _cuda.plan_conv2d_sparse24_f16 if half else _cuda.plan_conv2d_sparse24_int8
    plan = planned(
        gpu.sms, gpu.shared, place(x), code, batch, shape.h, shape.w, shape.c, place(weight), shape.k, shape.r, shape.s,
        *g.stride, *g.padding, *g.dilation, shape.groups, place(constants), 0, 0, 0.0, 0.0, place(out), code,
    )  # fmt: skip
    share = math.prod(touched(v, r, shape.stride) for v, r in ((shape.h, shape.r), (shape.w, shape.s)))
    read, grid = int(share * x.nbytes), plan["grid"]
    least = read + weight.nbytes + out.nbytes + constants.nbytes
    launch = Launch(math.prod(grid), plan["block"], 0, least, dtype, read, grid[1] * grid[2], sparse=True)
    key = (emulated.digest(emulated.source_of(plan["kernel"])), arch, plan["kernel"], grid, batch, shape, BLOCKS, L1)
    found = counted(key, lambda: _run(plan, arch, memory, launch))
    return SparseRun(plan["kernel"], dtype, "2:4", 0.5, found)


def dense_us(shape: ConvShape, batch: int, gpu: Gpu, dtype: str) -> dict[str, float]:
    """Microseconds of the dense kernels of a layer: "own", int8 alone, and "cutlass", the best tile, where it is installed."""
    found = {}
    if dtype == "int8":
        counted_run, _ = run_layer(shape, batch, "80", gpu)
        found["own"] = model(*counted_run, gpu)["us"]
    if headers():
        fitting = (c.counted for c in conv_candidates(shape, batch, "80", dtype))
        times = [model(*run, gpu)["us"] for run in fitting if resident(run[1], gpu, run[0]["shared_bytes"])]
        if times:
            found["cutlass"] = min(times)
    return found


def records(
    shapes: Iterable[ConvShape], batch: int, gpus: Iterable[Gpu], dtypes: Sequence[str] = DTYPES
) -> list[dict[str, Any]]:
    """One record per layer, GPU and sparse kernel, with ``dense_us``: the times of the dense kernels. ``gpus``: of sm_80 and
    later."""
    found = []
    for shape in shapes:
        for gpu in gpus:
            for dtype in dtypes:
                run = run_2to4(shape, batch, "80", gpu, dtype)
                if run is None:
                    continue
                counts, launch = run.counted
                about = {
                    "kernel": run.kernel,
                    "peer": None,
                    "dtype": dtype,
                    "pattern": run.pattern,
                    "sparsity": run.sparsity,
                }
                about |= {"us_varied": varied(counts, launch, gpu), "pass_us": 0.0}
                about["dense_us"] = dense_us(shape, batch, gpu, dtype)
                found.append(_record(shape, batch, gpu, **about, **model(counts, launch, gpu), counters=counts))
    return found


DEEP = 256  # input channels from which on the reduction is long enough to tell


def report(rows: list[dict[str, Any]]) -> str:
    """A table: how many times as fast as dense int8, for each pattern, network, GPU and batch: the geometric means over all
    layers and over those of many channels, the worst layer, and how many layers gain."""
    head = (
        f"{'pattern':8} {'dtype':6} {'network':14} {'GPU':10} {'batch':>5} {'layers':>6} {'all':>6} {f'C>={DEEP}':>7}"
    )
    lines = [f"{head} {'worst':>6} {'gain':>5}  ({LABEL})"]
    groups: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("pattern", "dtype", "network", "gpu", "batch"))
        for than, us in row["dense_us"].items():
            groups.setdefault((*key, than), []).append((row["shape"]["c"], us / row["us"]))
    for (pattern, dtype, network, gpu, batch, than), found in sorted(groups.items()):
        means = [_mean([ratio for c, ratio in found if c >= least]) for least in (0, DEEP)]
        worst, gain = min(ratio for _, ratio in found), sum(ratio > 1 for _, ratio in found)
        lines.append(
            f"{pattern:8} {dtype:6} {network:14} {gpu:10} {batch:5d} {than:8} {len(found):6d} {means[0]:6.2f}"
            f" {means[1]:7.2f} {worst:6.2f} {gain:5d}"
        )
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    """The geometric mean; NaN of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", action="append", choices=GPU_NETWORKS, help="all by default")
    parser.add_argument("--batch", action="append", type=int, help="1, 8, 64 by default")
    parser.add_argument(
        "--gpu", action="append", choices=[g.name for g in GPUS[1:]], help="all of sm_80 and later by default"
    )
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="all by default")
    arguments = parser.parse_args()
    gpus = [g for g in GPUS[1:] if not arguments.gpu or g.name in arguments.gpu]
    rows: list[dict[str, Any]] = []
    for network in arguments.network or GPU_NETWORKS:
        for batch in arguments.batch or (1, 8, 64):
            rows += records(gpu_shapes(network), batch, gpus, arguments.dtype or DTYPES)
    print(report(rows))
    others = [row for row in json.loads(OUT.read_text()) if "dense_us" not in row] if OUT.exists() else []
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(others + rows, indent=1))
    print(f"{OUT}: {len(rows)} records")


if __name__ == "__main__":
    main()
