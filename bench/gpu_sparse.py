"""Modelled times of the CUDA kernels with sparse weights, beside dense ones: ``python -m bench.gpu_sparse``.

Adds its records to those that ``python -m bench.gpu_model`` has written.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu_counts import Counted, counted
from bench.gpu_hardware import GPUS, Gpu
from bench.gpu_layers import BLOCKS, out_size, registers_of, run_layer, text_of
from bench.gpu_model import (
    CALIBRATION,
    L1,
    LABEL,
    LAUNCH,
    OUT,
    Launch,
    _record,
    model,
    resident,
    sample_of,
    save,
    touched,
    varied,
)
from bench.gpu_peers import conv_candidates
from bench.layers import GPU_NETWORKS, ConvShape, gpu_shapes
from cnncomp import _cuda
from cnncomp.ops.cuda_sparse import GATHERED, units_fit
from cnncomp.sparsity import pack_2to4, pack_gathered, pack_vectors, pack_vnm, vnm
from cnncomp.sparsity.blocks import as_blocks
from cnncomp.sparsity.vectors import RUN, columns
from cnncomp.sparsity.weights import CHUNK_BYTES, SLICE, round_up, too_many_taps, why_not
from tests import cuda_emulated as emulated
from tests.ptx import Caches, Checks, GlobalMemory, Result, emulate, load
from tests.ptx.cute import headers

DTYPES = ("int8", "fp16")


class Mask(NamedTuple):
    """Which weights of a layer are zero, and the format and kernels that leave them out."""

    format: str
    sparsity: float

    def pattern(self, dtype: str) -> str:
        if self.format == "vnm":
            return f"{vnm.RUN}:2:{self.m}"
        if self.format == "vectors":
            return f"{4 if dtype == 'int8' else 1}x{RUN}"
        return "2:4" if self.format == "sparse24" else f"block64x{16 if dtype == 'int8' else 8}"

    @property
    def m(self) -> int:
        """Input channels of which an output has two."""
        return round(2 / (1 - self.sparsity))

    @property
    def sparse_tensor_cores(self) -> bool:
        return self.format in ("sparse24", "vnm")

    def packed(self, shape: tuple[int, ...], dtype: torch.dtype, groups: int) -> Tensor:
        """A packed weight (K, C/G, R, S) of ones and zeros: the values change no count. 2:4: the first and the third of four
        input channels; blocks: as many in each slice of 64 outputs, at random; runs: at random; V:2:M: of
        four random input channels of each M the first and the third, or the others, in turn."""
        if self.format == "sparse24":
            weight = torch.zeros(shape, dtype=dtype)
            weight[:, ::2] = 1
            return pack_2to4(weight, groups)
        if self.format == "vnm":
            return pack_vnm(_vnm(shape, self.m, groups).to(dtype), self.m, groups)
        vectors = self.format == "vectors"
        rows, chunk = (RUN, columns(dtype)) if vectors else (SLICE, CHUNK_BYTES // dtype.itemsize)
        slices, chunks = groups * -(-shape[0] // groups // rows), -(-shape[1] // chunk)
        score = torch.rand(slices, chunks * math.prod(shape[2:]), generator=torch.Generator().manual_seed(0))
        score = score.flatten()[None] if vectors else score
        kept = (score.argsort(1).argsort(1) < round((1 - self.sparsity) * score.shape[1])).to(dtype)
        kept = kept.reshape(groups, -1, chunks, *shape[2:]).repeat_interleave(rows, 1)[:, : shape[0] // groups]
        kept = kept.flatten(0, 1).repeat_interleave(chunk, 1)[:, : shape[1]]
        return pack_vectors(kept, groups) if vectors else pack_gathered(kept, groups)


def _vnm(shape: tuple[int, ...], m: int, groups: int) -> Tensor:
    """V:2:M ones and zeros (K, C/G, R, S)."""
    k, c, r, s = shape
    blocks = as_blocks(torch.zeros(shape), vnm.RUN, m, groups)
    score = torch.rand(len(blocks), 1, *blocks.shape[2:], generator=torch.Generator().manual_seed(0))
    rank = score.argsort(3).argsort(3)
    turn = torch.arange(vnm.RUN)[:, None, None, None] % 2
    kept = ((rank < vnm.COLUMNS) & (rank % 2 == turn)).reshape(groups, -1, *blocks.shape[2:])
    return kept[:, : k // groups].reshape(k, -1, r, s)[:, :c].contiguous()


MASKS = (
    Mask("sparse24", 0.5),
    *(Mask("blocks", zeros) for zeros in (0.5, 0.75, 0.9, 0.95)),
    *(Mask("vectors", zeros) for zeros in (0.5, 0.65, 0.75, 0.85, 0.9, 0.95)),
    *(Mask("vnm", 1 - 2 / m) for m in (8, 16, 20, 40)),
)


class Image(NamedTuple):
    """The activations that a kernel reads, as it is told."""

    n: int
    h: int
    w: int
    c: int

    def elements(self) -> int:
        return math.prod(self)


def image_of(shape: ConvShape, batch: int, mask: Mask, dtype: torch.dtype, chained: bool = False) -> Image:
    """Those of a layer; of formats that gather channel by channel as :func:`cnncomp.ops.cuda_sparse.conv2d` makes them, or,
    with ``chained``, finds them."""
    if mask.format not in GATHERED:
        return Image(batch, shape.h, shape.w, shape.c)
    channels = shape.groups * round_up(shape.c // shape.groups, GATHERED[mask.format].columns(dtype))
    if not chained and shape.r == shape.s == shape.stride == 1 and shape.padding == 0:
        return Image(batch * shape.h * shape.w, 1, 1, channels)
    return Image(batch, shape.h, shape.w, channels)


def _run(plan: dict[str, Any], arch: str, memory: GlobalMemory, launch: Launch) -> tuple[Result, Launch]:
    result = emulate(
        load(text_of(plan["kernel"], arch)), plan["grid"], plan["block"], [plan["params"]],
        shared=plan["shared"], memory=memory, blocks=sample_of(launch.grid, BLOCKS),
        checks=Checks(races=False, initialised=False, blocks=False), caches=Caches(l1=L1),
    )  # fmt: skip
    return result, Launch(**{**vars(launch), "registers": registers_of(plan["kernel"], arch)})


def units_pass(image: Image, gpu: Gpu, dtype: torch.dtype, format: str = "vectors") -> float:
    """Microseconds of the copy of activations into units of images: of its kernel, or, where the channels are no whole pieces
    of 16 bytes and torch copies them, at the memory's speed."""
    unit = GATHERED[format].unit(dtype, image.n)
    each, moved = dtype.itemsize, 2 * image.elements() * dtype.itemsize
    if image.c * each % CHUNK_BYTES:
        return (moved / (CALIBRATION.dram * gpu.dram) + LAUNCH) * 1e6
    memory, code = GlobalMemory(), emulated.DTYPE_CODE[dtype]
    x, out = (torch.zeros(n * image.h * image.w * image.c, dtype=dtype) for n in (image.n, round_up(image.n, unit)))
    copy = _cuda.plan_to_byte_units if format == "vnm" and each == 1 else _cuda.plan_to_units
    plan = copy(memory.pointer(x), code, *image, memory.pointer(out))
    launch = Launch(math.prod(plan["grid"]), plan["block"], 0, moved, input_bytes=x.nbytes)
    key = (emulated.digest(emulated.source_of(plan["kernel"])), plan["kernel"], image, BLOCKS, L1)
    return float(model(*counted(key, lambda: _run(plan, "80", memory, launch)), gpu)["us"])


def run_sparse(
    shape: ConvShape, batch: int, arch: str, gpu: Gpu, dtype: str = "int8", mask: Mask = MASKS[0], chained: bool = False
) -> tuple[Counted, str] | None:
    """Counts and launch of a layer's convolution, no residual, and the kernel's name; None for a layer that it can't run.
    ``dtype``: "int8", with u8 input and output, or "fp16". ``chained``: its output too lies in units of images; None where it
    can't."""
    g, half = shape.geometry, dtype == "fp16"
    kind, of_weight = (torch.float16, torch.float16) if half else (torch.uint8, torch.int8)
    gathered = GATHERED.get(mask.format)
    if too_many_taps(g.kernel_size) if gathered else why_not(shape.c, g.kernel_size, shape.groups, kind.itemsize):
        return None
    if chained and not (gathered and units_fit(mask.format, kind, batch, shape.k, shape.groups)):
        return None
    memory, image = GlobalMemory(), image_of(shape, batch, mask, kind, chained)
    images = round_up(image.n, gathered.unit(kind, image.n)) if gathered else image.n
    x = torch.zeros(image._replace(n=images).elements(), dtype=kind)
    weight = mask.packed((shape.k, shape.c // shape.groups, shape.r, shape.s), of_weight, shape.groups)
    out = torch.zeros(batch * math.prod(out_size(shape)) * shape.k, dtype=kind)
    constants, place, code = torch.ones(3, shape.k), memory.pointer, emulated.DTYPE_CODE[kind]
    planned = getattr(_cuda, f"plan_conv2d_{mask.format}_{'f16' if half else 'int8'}")
    plan = planned(
        gpu.sms, gpu.shared, place(x), code, *image, place(weight), shape.k, shape.r, shape.s,
        *g.stride, *g.padding, *g.dilation, shape.groups, place(constants), 0, 0, 0.0, 0.0, place(out), code,
        *[chained] * (gathered is not None),
    )  # fmt: skip
    share = math.prod(touched(v, r, shape.stride) for v, r in ((shape.h, shape.r), (shape.w, shape.s)))
    read, grid = int(share * x.nbytes), plan["grid"]
    least = read + weight.nbytes + out.nbytes + constants.nbytes
    sweeps = 1 if gathered else grid[1] * grid[2]
    launch = Launch(math.prod(grid), plan["block"], 0, least, dtype, read, sweeps, sparse=mask.sparse_tensor_cores)
    source = emulated.source_of(plan["kernel"])
    key = (emulated.digest(source), arch, plan["kernel"], grid, batch, shape, BLOCKS, L1, mask, *["chained"] * chained)
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
            kind = torch.uint8 if dtype == "int8" else torch.float16
            gathered, image = GATHERED.get(mask.format), image_of(shape, batch, mask, kind)
            about |= {
                "us_varied": varied(counts, launch, gpu),
                "pass_us": units_pass(image, gpu, kind, mask.format) if gathered else 0.0,
            }
            chain = run_sparse(shape, batch, "80", gpu, dtype, mask, chained=True)
            about["chained_us"] = model(*chain[0], gpu)["us"] if chain else None
            about["dense_us"] = dense_us(shape, batch, gpu, dtype)
            found.append(_record(shape, batch, gpu, **about, **model(counts, launch, gpu), counters=counts))
    return found


DEEP = 256  # input channels from which on the reduction is long enough to tell


def report(rows: list[dict[str, Any]]) -> str:
    """A table: how many times as fast as dense, for each pattern, network, GPU and batch: the geometric means over all layers
    and over those of many channels, the worst layer, and how many layers gain; where the format has a copy into units, the
    means with it ("copied"), and how many layers gain still; the same within a chain of such layers ("chained"), without a copy
    and with the output in units, but for batches and layers that don't fit into them."""
    head = (
        f"{'pattern':10} {'zeros':>5} {'dtype':6} {'network':14} {'GPU':10} {'batch':>5} {'dense':8} {'layers':>6} {'all':>6} "
        f"{f'C>={DEEP}':>7} {'worst':>6} {'gain':>5}"
    )
    head += f" {'copied':>6} {f'C>={DEEP}':>7} {'gain':>5} {'chained':>7} {f'C>={DEEP}':>7} {'gain':>5}"
    lines = [f"{head}  ({LABEL})"]
    groups: dict[tuple[Any, ...], list[tuple[float, ...]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("pattern", "sparsity", "dtype", "network", "gpu", "batch"))
        for than, us in row["dense_us"].items():
            copied = row["us"] + row["pass_us"]
            ratios = us / row["us"], us / copied, us / (row["chained_us"] or copied)
            groups.setdefault((*key, than), []).append((row["shape"]["c"], *ratios))
    for (pattern, zeros, dtype, network, gpu, batch, than), found in sorted(groups.items()):
        means = [_mean([row[which] for row in found if row[0] >= least]) for which in (1, 2, 3) for least in (0, DEEP)]
        gains = [sum(row[which] > 1 for row in found) for which in (1, 2, 3)]
        worst = min(row[1] for row in found)
        lines.append(
            f"{pattern:10} {zeros:5.0%} {dtype:6} {network:14} {gpu:10} {batch:5d} {than:8} {len(found):6d} {means[0]:6.2f}"
            f" {means[1]:7.2f} {worst:6.2f} {gains[0]:5d} {means[2]:6.2f} {means[3]:7.2f} {gains[1]:5d}"
            f" {means[4]:7.2f} {means[5]:7.2f} {gains[2]:5d}"
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
    parser.add_argument("--format", action="append", choices=sorted({m.format for m in MASKS}), help="all by default")
    parser.add_argument("--zeros", action="append", type=float, help="of a mask, as 0.9; all by default")
    parser.add_argument("--layer", action="append", help="part of a layer's name; all by default")
    arguments = parser.parse_args()
    masks = [m for m in MASKS if m.format in (arguments.format or [m.format])]
    masks = [m for m in masks if any(abs(m.sparsity - z) < 1e-6 for z in arguments.zeros or [m.sparsity])]
    gpus = [g for g in GPUS[1:] if not arguments.gpu or g.name in arguments.gpu]
    rows: list[dict[str, Any]] = []
    for network in arguments.network or GPU_NETWORKS:
        for batch in arguments.batch or (1, 8, 64):
            shapes = [s for s in gpu_shapes(network) if any(part in s.name for part in arguments.layer or [""])]
            rows += records(shapes, batch, gpus, arguments.dtype or DTYPES, masks)
    print(report(rows))
    save(rows, keep=True)
    print(f"{OUT}: {len(rows)} records")


if __name__ == "__main__":
    main()
