"""CUTLASS's kernels for the emulator, compiled from the wheel nvidia-cutlass; a host program says how to launch them.

No driver is needed: the host program only computes the kernel's parameters and the grid. Compiled once by content.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from bench import files
from tests.cuda_emulated import NVCC, ROOT
from tests.ptx import GlobalMemory, Result, emulate, load
from tests.ptx.cute import headers
from tests.ptx.lower import Program

SOURCES = Path(__file__).parent / "cutlass"
CACHE = ROOT / "build" / "cutlass"
TYPES = {"int8": "int8_t", "int32": "int32_t", "fp16": "cutlass::half_t", "fp32": "float"}


@dataclass(frozen=True)
class Tile:
    """A thread block's tile and a warp's, in elements of the output; ``k`` elements of the reduction per stage.

    With ``warp_k`` less than ``k``, warps share the reduction.
    """

    m: int
    n: int
    k: int
    stages: int
    warp_m: int
    warp_n: int
    warp_k: int = 0

    def __str__(self) -> str:
        return f"{self.m}x{self.n}_{self.k}x{self.stages}"


@dataclass(frozen=True)
class Variant:
    """A kernel of CUTLASS.

    Attributes:
        source: "conv" or "gemm".
        dtype: Of the operands, "int8" or "fp16".
        tile: Its ``k`` is of dense elements.
        output: "int8", "int32", "fp16" or "fp32".
        accumulator: "int32", "fp32" or "fp16".
        relu: Scale, bias per channel and ReLU in the epilogue; without it only the scale.
        sparse: GEMM with a 2:4 sparse left side.
        iterator: How a conv reads its input; "kFixedChannels" for as many channels as ``alignment``.
        alignment: Elements that an operand's rows are multiples of.
        alpha: The epilogue's scale.
        arch: "75" or "80".
    """

    source: str
    dtype: str
    tile: Tile
    output: str
    accumulator: str
    relu: bool = True
    sparse: bool = False
    iterator: str = "kOptimized"
    alignment: int = 16
    alpha: float = 1.0
    arch: str = "80"

    @property
    def name(self) -> str:
        kind = "spgemm" if self.sparse else self.source
        return f"cutlass_{kind}_{self.dtype}_{self.tile}" + ("" if self.iterator == "kOptimized" else "_few")

    @property
    def vector(self) -> int:
        """Elements that a thread writes at once; channels are a multiple of it. A narrow int8 tile has no rows for 16."""
        return {"int8": 16 if self.tile.n >= 128 else 8, "fp16": 8}.get(self.output, 4)

    def text(self) -> str:
        """The program that nvcc compiles."""
        old, int8 = self.arch == "75", self.dtype == "int8"
        instruction = (
            ((8, 8, 16) if int8 else (16, 8, 8)) if old else (16, 8, (32 if int8 else 16) * (2 if self.sparse else 1))
        )
        tile = self.tile
        values = {
            "TILE": f"{tile.m},{tile.n},{tile.k}", "WARP": f"{tile.warp_m},{tile.warp_n},{tile.warp_k or tile.k}",
            "INSTRUCTION": ",".join(map(str, instruction)), "ARCH": f"Sm{self.arch}", "STAGES": tile.stages,
            "ELEMENT": TYPES[self.dtype], "OUTPUT": TYPES[self.output], "ACCUMULATOR": TYPES[self.accumulator],
            "OPERATION": "OpMultiplyAddSaturate" if int8 else "OpMultiplyAdd", "ITERATOR": self.iterator,
            "ALIGNMENT": self.alignment, "VECTOR": self.vector, "RELU": int(self.relu), "SPARSE": int(self.sparse),
            "ALPHA": f"ACCUMULATOR({self.alpha})" if not self.relu else f"{float(self.alpha)}f",
        }  # fmt: skip
        return "".join(f"#define {k} {v}\n" for k, v in values.items()) + f'#include "{self.source}.cu"\n'


class Built(NamedTuple):
    """A compiled variant: the host program, the kernel as text and for the emulator, registers of a thread."""

    host: Path
    ptx: Path
    program: Program
    registers: int


@cache
def _digest() -> str:
    assert NVCC
    h = hashlib.sha256(subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout)
    folder = headers()
    assert folder
    for path in [*sorted(SOURCES.iterdir()), folder / "cutlass" / "version.h"]:
        h.update(path.read_bytes())
    return h.hexdigest()


@cache
def build(variant: Variant) -> Built:
    """Compile, or take from the cache.

    Raises:
        RuntimeError: nvcc refused; its message. CUTLASS has tiles that don't fit together.
    """
    from tests.triton_aot import TOOLS

    assert NVCC
    text = variant.text()
    key = hashlib.sha256((_digest() + variant.arch + text).encode()).hexdigest()[:16]
    host = CACHE / f"{variant.name}.{key}"
    ptx, usage = host.with_suffix(f".{key}.ptx"), host.with_suffix(f".{key}.txt")
    if not usage.exists():
        source = host.with_suffix(f".{key}.cu")
        files.write(source, text)
        with files.replaced(host) as partial:
            generate = f"arch=compute_{variant.arch},code=[sm_{variant.arch},compute_{variant.arch}]"
            options = ["-std=c++17", "-w", f"-I{headers()}", f"-I{SOURCES}", "-gencode", generate]
            command = [NVCC, *options, str(source), "-o", str(partial)]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(run.stderr)
            dump = [str(TOOLS / "cuobjdump"), str(partial)]
            shown = [
                subprocess.run([*dump, how], capture_output=True, text=True, check=True).stdout
                for how in ("-ptx", "--dump-resource-usage")
            ]
            partial.chmod(0o755)
        files.write(ptx, shown[0][shown[0].index(".version") :])
        files.write(usage, shown[1])  # the last: where it is, all is
    registers = re.findall(r"Function \S+:\s+REG:(\d+)", usage.read_text())
    assert len(registers) == 1, usage
    return Built(host, ptx, load(ptx.read_text()), int(registers[0]))


class Planned(NamedTuple):
    """A launch: grid, threads of a block, bytes of shared memory, the kernel's parameter."""

    grid: tuple[int, int, int]
    threads: int
    shared: int
    parameter: bytes


def plan(variant: Variant, sizes: Sequence[int], pointers: Sequence[int]) -> Planned:
    """What CUTLASS would launch.

    Args:
        variant: The kernel.
        sizes: n, h, w, c, k, r, s, padding, stride, dilation of a conv; m, n, k of a GEMM.
        pointers: x, weight, bias, out of a conv; a, b, bias, out and the metadata (0 where dense) of a GEMM.
    """
    run = subprocess.run([str(build(variant).host), *map(str, (*sizes, *pointers))], capture_output=True, check=True)
    x, y, z, threads, shared = map(int, run.stderr.split())
    return Planned((x, y, z), threads, shared, run.stdout)


def launch(
    variant: Variant, planned: Planned, memory: GlobalMemory, blocks: list[int] | None = None, **options: Any
) -> Result:  # fmt: skip
    """Run a planned launch in the emulator; ``options`` are those of ``emulate``."""
    return emulate(
        build(variant).program, planned.grid, planned.threads, [planned.parameter], shared=planned.shared, memory=memory,
        blocks=blocks, **options,
    )  # fmt: skip
