"""Modelled times of the CUDA kernels with sparse weights, beside dense ones: ``python -m bench.gpu_sparse``.

Adds its records to those that ``python -m bench.gpu_model`` has written.
"""

from __future__ import annotations

import argparse
import itertools
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
from cnncomp.sparsity import pack_2to4, pack_gathered
from cnncomp.sparsity.weights import CHUNK_BYTES, SLICE, why_not
from tests import cuda_emulated as emulated
from tests.ptx import Caches, Checks, GlobalMemory, Result, emulate, load
from tests.ptx.cute import headers

DTYPES = ("int8", "fp16")


class Mask(NamedTuple):
    """Which weights of a layer are zero, and the format and kernels that leave them out."""

    format: str
    sparsity: float

    def pattern(self, dtype: str) -> str:
        return "2:4" if self.format == "sparse24" else f"block64x{16 if dtype == 'int8' else 8}"

    def packed(self, shape: tuple[int, ...], dtype: torch.dtype, groups: int) -> Tensor:
        """A packed weight (K, C/G, R, S) of ones and zeros: the values change no count. 2:4: the first and the third of four
        input channels; blocks: as many in each slice of 64 outputs, at random."""
        if self.format == "sparse24":
            weight = torch.zeros(shape, dtype=dtype)
            weight[:, ::2] = 1
            return pack_2to4(weight, groups)
        chunk = CHUNK_BYTES // dtype.itemsize
        slices, chunks = groups * -(-shape[0] // groups // SLICE), -(-shape[1] // chunk)
        score = torch.rand(slices, chunks * math.prod(shape[2:]), generator=torch.Generator().manual_seed(0))
        kept = (score.argsort(1).argsort(1) < round((1 - self.sparsity) * score.shape[1])).to(dtype)
        kept = kept.reshape(groups, -1, chunks, *shape[2:]).repeat_interleave(SLICE, 1)[:, : shape[0] // groups]
        return pack_gathered(kept.flatten(0, 1).repeat_interleave(chunk, 1)[:, : shape[1]], groups)


MASKS = (Mask("sparse24", 0.5), *(Mask("blocks", zeros) for zeros in (0.5, 0.75, 0.9, 0.95)))


def _run(plan: dict[str, Any], arch: str, memory: GlobalMemory, launch: Launch) -> tuple[Result, Launch]:
    ptx = emulated.ptx_of(emulated.source_of(plan["kernel"]), arch)
    result = emulate(
        load(ptx, emulated.entry_of(plan["kernel"], ptx)), plan["grid"], plan["block"], [plan["params"]],
        shared=plan["shared"], memory=memory, blocks=sample_of(launch.grid, BLOCKS),
        checks=Checks(races=False, initialised=False, blocks=False), caches=Caches(l1=L1),
    )  # fmt: skip
    return result, Launch(**{**vars(launch), "registers": registers_of(plan["kernel"], arch)})


def run_sparse(
    shape: ConvShape, batch: int, arch: str, gpu: Gpu, dtype: str = "int8", mask: Mask = MASKS[0]
) -> tuple[Counted, str] | None:
    """Counts and launch of a layer's convolution, no residual, and the kernel's name; None for a layer that it can't run.
    ``dtype``: "int8", with u8 input and output, or "fp16"."""
    g, half = shape.geometry, dtype == "fp16"
    kind, of_weight = (torch.float16, torch.float16) if half else (torch.uint8, torch.int8)
    if why_not(shape.c, g.kernel_size, shape.groups, kind.itemsize):
        return None
    memory = GlobalMemory()
    x = torch.zeros(batch * shape.h * shape.w * shape.c, dtype=kind)
    weight = mask.packed((shape.k, shape.c // shape.groups, shape.r, shape.s), of_weight, shape.groups)
    out = torch.zeros(batch * math.prod(out_size(shape)) * shape.k, dtype=kind)
    constants, place, code = torch.ones(3, shape.k), memory.pointer, emulated.DTYPE_CODE[kind]
    planned = getattr(_cuda, f"plan_conv2d_{mask.format}_{'f16' if half else 'int8'}")
    plan = planned(
        gpu.sms, gpu.shared, place(x), code, batch, shape.h, shape.w, shape.c, place(weight), shape.k, shape.r, shape.s,
        *g.stride, *g.padding, *g.dilation, shape.groups, place(constants), 0, 0, 0.0, 0.0, place(out), code,
    )  # fmt: skip
    share = math.prod(touched(v, r, shape.stride) for v, r in ((shape.h, shape.r), (shape.w, shape.s)))
    read, grid = int(share * x.nbytes), plan["grid"]
    least = read + weight.nbytes + out.nbytes + constants.nbytes
    sparse = mask.format == "sparse24"
    launch = Launch(math.prod(grid), plan["block"], 0, least, dtype, read, grid[1] * grid[2], sparse=sparse)
    source = emulated.source_of(plan["kernel"])
    key = (emulated.digest(source), arch, plan["kernel"], grid, batch, shape, BLOCKS, L1, mask)
    return counted(key, lambda: _run(plan, arch, memory, launch)), plan["kernel"]


def dense_us(shape: ConvShape, batch: int, gpu: Gpu, dtype: str) -> dict[str, float]:
    """Microseconds of the dense kernels of a layer: "own", int8 alone, and "cutlass", the best tile, where it is installed."""
    found = {}
    if dtype == "int8":
        counted_run, _ = run_layer(shape, batch, gpu.code, gpu)
        found["own"] = model(*counted_run, gpu)["us"]
    if headers():
        fitting = (c.counted for c in conv_candidates(shape, batch, "80", dtype))
        times = [model(*run, gpu)["us"] for run in fitting if resident(run[1], gpu, run[0]["shared_bytes"])]
        if times:
            found["cutlass"] = min(times)
    return found


def records(
    shapes: Iterable[ConvShape],
    batch: int,
    gpus: Iterable[Gpu],
    dtypes: Sequence[str] = DTYPES,
    masks: Sequence[Mask] = MASKS,
) -> list[dict[str, Any]]:
    """One record per layer, GPU and sparse kernel, with ``dense_us``: the times of the dense kernels. ``gpus``: of sm_80 and
    later."""
    found = []
    for shape, gpu, dtype in itertools.product(shapes, gpus, dtypes):
        for mask in masks:
            run = run_sparse(shape, batch, "80", gpu, dtype, mask)
            if run is None:
                continue
            (counts, launch), kernel = run
            about = {
                "kernel": kernel,
                "peer": None,
                "dtype": dtype,
                "pattern": mask.pattern(dtype),
                "sparsity": mask.sparsity,
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
        key = tuple(row[name] for name in ("pattern", "sparsity", "dtype", "network", "gpu", "batch"))
        for than, us in row["dense_us"].items():
            groups.setdefault((*key, than), []).append((row["shape"]["c"], us / row["us"]))
    for (pattern, zeros, dtype, network, gpu, batch, than), found in sorted(groups.items()):
        means = [_mean([ratio for c, ratio in found if c >= least]) for least in (0, DEEP)]
        worst, gain = min(ratio for _, ratio in found), sum(ratio > 1 for _, ratio in found)
        lines.append(
            f"{pattern:10} {zeros:5.0%} {dtype:6} {network:14} {gpu:10} {batch:5d} {than:8} {len(found):6d} {means[0]:6.2f}"
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
