"""torch inductor's own Triton templates for convolutions and matrix products, as the installed torch carries them: peers.

Inductor renders them only for a device that it sees. Here their text is rendered with its hooks (``def_kernel``, ``size``,
``stride``, ``load_input``, ``store_output``) filled in as inductor does for static shapes and channels last: all sizes are
constants, and bias, ReLU and, for int8, scale and rounding are fused into the store. As in inductor's lowering, a 1x1
convolution of stride 1 is a matrix product, the convolution has no int8, and the tiles are those of its heuristics for CUDA; of
them only a few are compiled, which an estimate puts first (:func:`tiles`), where inductor measures all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from bench.gpu_hardware import GPUS, Gpu
from bench.gpu_model import CALIBRATION, FILL, L1, Launch, sample_of, touched
from bench.layers import ConvShape
from tests.ptx import Caches, Checks, GlobalMemory, Result, emulate, load
from tests.triton_aot import compile_kernel, registers_and_stack

CACHE = Path(__file__).parent.parent / "build" / "inductor"
CANDIDATES = 4  # tiles that are compiled for a layer, of those that the bound puts first on each GPU
SHARED = 99 << 10  # bytes that a block may have on all architectures with asynchronous copies
ELEMENT = {"int8": 1, "fp16": 2}


class Tile(NamedTuple):
    """A configuration of inductor's heuristics."""

    m: int
    n: int
    k: int
    stages: int
    warps: int

    def shared(self, dtype: str) -> int:
        """Bytes of the operands' stages."""
        return (self.m + self.n) * self.k * self.stages * ELEMENT[dtype]


@dataclass(frozen=True)
class Problem:
    """A convolution that becomes a kernel: sizes n, h, w, c, k, r, s, stride, padding."""

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    stride: int
    padding: int
    dtype: str

    @classmethod
    def of(cls, shape: ConvShape, batch: int, dtype: str) -> Problem:
        return cls(
            batch, shape.h, shape.w, shape.c, shape.k, shape.r, shape.s, shape.stride, shape.padding, dtype
        )  # fmt: skip

    @property
    def product(self) -> bool:
        """Inductor makes it a matrix product."""
        return (self.r, self.s, self.stride, self.padding) == (1, 1, 1, 0)

    @property
    def out(self) -> tuple[int, int]:
        p, q = ((v + 2 * self.padding - r) // self.stride + 1 for v, r in ((self.h, self.r), (self.w, self.s)))
        return p, q

    @property
    def rows(self) -> int:
        return self.n * math.prod(self.out)


@cache
def _configurations(kind: str) -> tuple[Tile, ...]:
    """Inductor's for "conv", "fp16" or "int8" products."""
    from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

    heuristics = CUDAConfigHeuristic()
    listed = {"conv": heuristics.conv_configs, "fp16": heuristics.mm_configs, "int8": heuristics.int8_mm_configs}
    return tuple(Tile(c.block_m, c.block_n, c.block_k, c.num_stages, c.num_warps) for c in listed[kind])


def scaled(problem: Problem) -> list[Tile]:
    """Inductor's tiles for a problem: no larger than it, each once."""
    kind = problem.dtype if problem.product else "conv"
    reduction = problem.c  # of one tap
    least = 32 if problem.dtype == "int8" else 16
    m, n = (max(triton.next_power_of_2(v), 16) for v in (_hint(problem), problem.k))
    found = {}
    for tile in _configurations(kind):
        tile = tile._replace(
            m=max(min(tile.m, m), 16), n=max(min(tile.n, n), 16),
            k=max(min(tile.k, triton.next_power_of_2(reduction)), least),
        )  # fmt: skip
        warps = min(tile.warps, tile.m * tile.n // 256)
        if not problem.product and problem.r * problem.s > 1:
            warps = min(warps, 4)  # as inductor does: it had wrong results with 8
        found[tile._replace(warps=warps)] = None
    return [tile for tile in found if tile.shared(problem.dtype) <= SHARED]


def _hint(problem: Problem) -> int:
    """Rows as the heuristics take them: of a convolution those of the input."""
    return problem.rows if problem.product else problem.n * problem.h * problem.w


def tiles(problem: Problem) -> list[Tile]:
    """CANDIDATES that may be the fastest, by an estimate, each GPU's first before the seconds."""
    orders = [sorted(scaled(problem), key=lambda tile: _estimate(problem, tile, gpu)) for gpu in GPUS[1:]]
    ranked = dict.fromkeys(tile for place in zip(*orders, strict=True) for tile in place)
    return list(ranked)[:CANDIDATES]


def _estimate(problem: Problem, tile: Tile, gpu: Gpu) -> float:
    """Clocks of the busiest multiprocessor: tensor cores, loads and the time from one step to the next."""
    blocks = math.ceil(problem.rows / tile.m) * math.ceil(problem.k / tile.n)
    load = math.ceil(blocks / gpu.sms)
    steps = load * problem.r * problem.s * math.ceil(problem.c / tile.k)
    rate = gpu.int8_ops if problem.dtype == "int8" else gpu.fp16_ops
    read = (tile.m + tile.n) * tile.k * ELEMENT[problem.dtype]
    together = max(1, min(load, gpu.shared // tile.shared(problem.dtype)))
    waiting = CALIBRATION.step * gpu.clock * 1e9 / together
    return steps * (2 * tile.m * tile.n * tile.k / rate + read / FILL + waiting)


class _Hooks:
    """What inductor gives a template's text: arguments, sizes, strides, loads and the fused store."""

    def __init__(self, problem: Problem, name: str) -> None:
        self.problem, self.name = problem, name
        (p, q), v = problem.out, problem
        if v.product:
            self.sizes = {"A": (v.rows, v.c), "B": (v.c, v.k), None: (v.rows, v.k)}
            self.strides = {"A": (v.c, 1), "B": (1, v.c)}
        else:
            self.sizes = {"X": (v.n, v.c, v.h, v.w), "W": (v.k, v.c, v.r, v.s), None: (v.n, v.k, p, q)}
            self.strides = {"X": (v.h * v.w * v.c, 1, v.w * v.c, v.c), "W": (v.r * v.s * v.c, 1, v.s * v.c, v.c)}
        self.defines: dict[str, object] = {}

    def def_kernel(self, *names: str) -> str:
        arguments = ", ".join([*(f"arg_{n}" for n in names), "scale_ptr", "bias_ptr", "out_ptr0"])
        body = [f"    {k} : tl.constexpr = {v}" for k, v in self.defines.items()]
        body += [f"    {n} = arg_{n}" for n in names]
        return "\n".join([f"@triton.jit\ndef {self.name}({arguments}):", *body])

    def size(self, name: str | None, index: int) -> str:
        return str(self.sizes[name][index])

    def stride(self, name: str, index: int) -> str:
        return str(self.strides[name][index])

    def load_input(
        self, name: str, into: str, indices: tuple[str, str], mask: str | None = None, indent_width: int = 4, **_: Any
    ) -> str:
        rows, columns = self.strides[name]
        at = " + ".join(i if step == 1 else f"{step}*({i})" for i, step in zip(indices, (rows, columns), strict=True))
        masked = f", mask={mask}, other=0.0" if mask else ""
        return f"{into} = tl.load({name} + ({at}){masked})"

    def store_output(self, indices: tuple[str, ...], value: str, mask: str, **_: Any) -> str:
        v, shape = self.problem, "[BLOCK_M, BLOCK_N]"
        (p, q) = v.out
        steps = (v.k, 1) if v.product else (p * q * v.k, 1, q * v.k, v.k)
        at = " + ".join(i if step == 1 else f"{step}*({i})" for i, step in zip(indices, steps, strict=True))
        channel = f"tl.broadcast_to({indices[1]}, {shape})"
        lines = [f"xindex = {at}"]
        lines.append(f"tmp0 = tl.load(bias_ptr + {channel}, {mask}, eviction_policy='evict_last').to(tl.float32)")
        if v.dtype == "int8":
            lines.append(f"tmp1 = tl.load(scale_ptr + {channel}, {mask}, eviction_policy='evict_last')")
            lines.append(f"tmp2 = {value}.to(tl.float32) * tmp1 + tmp0")
            lines.append("tmp3 = libdevice.nearbyint(tl.minimum(tl.maximum(tmp2, 0.0), 127.0)).to(tl.int8)")
        else:
            lines.append(f"tmp3 = tl.maximum({value} + tmp0, 0.0)")
        lines.append(f"tl.store(out_ptr0 + tl.broadcast_to(xindex, {shape}), tmp3, {mask})")
        return "\n    ".join(lines)


def rendered(problem: Problem, tile: Tile) -> tuple[str, str]:
    """Name and text of the kernel."""
    from torch._inductor.kernel.conv import conv2d_template
    from torch._inductor.kernel.mm import mm_template

    template = mm_template if problem.product else conv2d_template
    name = "triton_tem_fused_" + template.name
    hooks = _Hooks(problem, name)
    options: dict[str, object] = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "ALLOW_TF32": False}
    if problem.product:
        sums = "tl.int32" if problem.dtype == "int8" else "tl.float32"
        options |= {"EVEN_K": problem.c % tile.k == 0, "USE_FAST_ACCUM": False, "ACC_TYPE": sums, "GROUP_M": 8}
    else:
        for axis, kernel in (("H", problem.r), ("W", problem.s)):
            options |= {f"KERNEL_{axis}": kernel, f"STRIDE_{axis}": problem.stride, f"PADDING_{axis}": problem.padding}
        options |= {"GROUPS": 1, "UNROLL": problem.r * problem.s == 1}
    hooks.defines = {**options, "INDEX_DTYPE": "tl.int32"}
    names = ("def_kernel", "size", "stride", "load_input", "store_output")
    text = template.template.render(**{n: getattr(hooks, n) for n in names}, **options)
    head = "import triton\nimport triton.language as tl\nfrom triton.language.extra import libdevice\n\n\n"
    return name, head + text


class Built(NamedTuple):
    ptx: str
    shared: int
    registers: int


@cache
def build(problem: Problem, tile: Tile) -> Built:
    """Compile for sm_80. The text goes through a file, from which Triton reads it."""
    name, text = rendered(problem, tile)
    path = CACHE / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = getattr(module, name)
    element = {"int8": "i8", "fp16": "fp16"}[problem.dtype]
    pointers: dict[str, str | None] = dict.fromkeys(kernel.arg_names, element)
    pointers |= {"scale_ptr": "fp32", "bias_ptr": "fp32" if problem.dtype == "int8" else element}
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    compiled = compile_kernel(kernel, pointers, {}, (), {}, 80, options)
    return Built(compiled.asm["ptx"], compiled.metadata.shared, registers_and_stack(compiled)[0])


def run(
    problem: Problem, tile: Tile, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor,
    most: int | None = None,
) -> tuple[torch.Tensor, Result, Launch]:  # fmt: skip
    """Run in the emulator.

    Args:
        problem: The convolution.
        tile: One of :func:`scaled`.
        x: (n, h, w, c), int8 or fp16.
        weight: (k, r, s, c).
        scale: (k,) in fp32; read for int8 only.
        bias: (k,) in fp32 for int8, else fp16.
        most: Blocks that run of a large grid, without checks; None runs all with all checks.

    Returns:
        The output (n, p, q, k), counts, and the launch.
    """
    built = build(problem, tile)
    out = torch.zeros(problem.n, *problem.out, problem.k, dtype=x.dtype)
    blocks = math.ceil(problem.rows / tile.m), math.ceil(problem.k / tile.n)
    grid = (math.prod(blocks), 1) if problem.product else blocks
    options: dict[str, Any] = {}
    if most is not None:
        checks = Checks(races=False, initialised=False, blocks=False)
        options = {"blocks": sample_of(math.prod(grid), most), "checks": checks, "caches": Caches(l1=L1)}
    arguments = [x, weight, scale, bias, out]
    result = emulate(
        load(built.ptx), grid, 32 * tile.warps, arguments, shared=built.shared, memory=GlobalMemory(), **options
    )
    axes = ((problem.h, problem.r), (problem.w, problem.s))
    read = int(math.prod(touched(size, taps, problem.stride) for size, taps in axes) * x.nbytes)
    least = read + weight.nbytes + out.nbytes
    sweeps = 1 if problem.product else grid[1]  # products go over the columns within groups of eight tiles of rows
    return out, result, Launch(math.prod(grid), 32 * tile.warps, built.registers, least, problem.dtype, read, sweeps)


def name_of(problem: Problem, tile: Tile) -> str:
    """Of the kernel, for records."""
    kind = "mm" if problem.product else "conv"
    return "inductor_{}_{}_{}x{}x{}_{}".format(kind, problem.dtype, *tile[:4])
