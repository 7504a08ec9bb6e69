"""What stands in the machine code of every shipped CUDA kernel: the static gate and its table.

``python -m tests.cuda_gate`` writes the table that test_cuda_gate.py compares with, for review.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.gpu_hardware import blocks_per_sm, gpu_of
from tests import cuda_emulated as emulated

ARCHS = ("75", "80", "86", "89", "90a", "120a")
SNAPSHOT = Path(__file__).parent / "cuda_gate.txt"
PRODUCTS = ("IMMA", "HMMA", "IGMMA", "HGMMA")
COLUMNS = ("MMA", "LDSM", "LDGSTS", "LDG", "STG", "PRMT", "LDL", "STL")


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture; ``loop`` counts the opcodes of the innermost loop with tensor-core instructions."""

    kernel: str
    arch: str
    registers: int
    stack: int
    shared: int
    threads: int
    blocks: int
    opcodes: Counter[str]
    loop: Counter[str]

    def __str__(self) -> str:
        shown = self.loop or self.opcodes
        sizes = (self.registers, self.stack, self.shared, self.threads, self.blocks, shown.total())
        return " ".join(
            [
                f"{self.kernel:40} {self.arch:>5}",
                *(f"{n:7d}" for n in sizes),
                *(f"{count(shown, c):6d}" for c in COLUMNS),
            ]
        )


def count(opcodes: Counter[str], column: str) -> int:
    """How often an opcode occurs; "MMA": products of tensor cores, of integers or halves."""
    return sum(opcodes[o] for o in PRODUCTS) if column == "MMA" else opcodes[column]


HEADER = " ".join(
    [f"{'kernel':40} {'arch':>5}"]
    + [f"{c:>7}" for c in ("regs", "stack", "shared", "threads", "blocks", "instr")]
    + [f"{c:>6}" for c in COLUMNS]
)


def _tool(name: str, *arguments: str) -> str:
    from tests.triton_aot import TOOLS

    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def short_name(mangled: str) -> str:
    """``conv2d_int8 64 64 32 32 2 4 16 0`` of a mangled template: the kernel's name, its numbers, its flags."""
    base = next(name for size, name in re.findall(r"(\d\d)([a-z]\w*?_kernel)", mangled) if len(name) == int(size))
    return " ".join([base.removesuffix("_kernel"), *re.findall(r"L[ib](\d+)E", mangled)])


def main_loop(sass: str) -> Counter[str]:
    """Opcodes of the shortest loop that has tensor-core instructions; empty where none has."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    best: list[str] = []
    for line in sass.splitlines():
        label = re.match(r"(\.L_\w+):", line)
        if label:
            labels[label[1]] = len(opcodes)
            continue
        instruction = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(.*)", line)
        if not instruction:
            continue
        opcodes.append(instruction[1])
        target = re.search(r"\((\.L_\w+)\)", instruction[2]) if instruction[1] == "BRA" else None
        if target and target[1] in labels:
            body = opcodes[labels[target[1]] :]
            if any(o in PRODUCTS for o in body) and (not best or len(body) < len(best)):
                best = body
    return Counter(best)


def _sections(sass: str) -> dict[str, str]:
    parts = re.split(r"^//-+\s+\.text\.(\S+)\s+-+$|^\.section\s+\.text\.([\w$]+).*$", sass, flags=re.M)
    found: dict[str, str] = {}
    for i in range(1, len(parts) - 2, 3):
        name = parts[i] or parts[i + 1]
        found[name] = found.get(name, "") + parts[i + 2]
    return found


#: Parts of the names of kernels that gather activations.
GATHERING = ("_blocks_", "_vectors_", "_vnm_")
#: Passes over activations: no products, and the same code on all architectures.
PASSES = (
    "to_units",
    "to_byte_units",
    "quantize",
    "max_pool2d_int8",
    "mean_pool2d",
    "mean_shift_int8",
    "mean_shift_depthwise_int8",
)


def archs_of(kernel: str) -> tuple[str, ...]:
    """Architectures that a kernel is looked at on: not on Turing, whose tensor cores have no sparse operand; of kernels that
    gather activations and passes, whose code is the same from sm_80 on, the first alone."""
    if kernel in PASSES or any(part in kernel for part in GATHERING):
        return ("80",)
    return ARCHS[1:] if "_sparse24_" in kernel else ARCHS


def dynamic_shared(name: str, arch: str) -> int:
    """Bytes that a launch of the kernel of this short name asks for on sm_<arch>, besides the static ones."""
    kernel, *numbers = name.split()
    if kernel.startswith("depthwise"):
        return 0
    if "_blocks_" in kernel:
        pixels, _, stages = map(int, numbers[:3])
        return stages * (8192 + 128 * pixels)
    if "_vectors_" in kernel:
        pixels, _, pieces, stages, element = map(int, numbers[:5])
        return stages * pieces * (1024 + 32 * pixels + 64 * element)
    if "_vnm_" in kernel:
        pixels, _, pieces, stages, _, element = map(int, numbers[:6])
        return stages * pieces * (2048 + 512 // element + 64 * pixels + 512 // element)
    if kernel in PASSES:
        return 0
    if "_sparse24_" in kernel:
        channels, pixels, _, _, stages, element = map(int, numbers[:6])
        return stages * (channels // 64 * (4096 + 1024 // element) + 128 * pixels)
    pixels, channels, _, _, slices, stages = map(int, numbers[:6])
    return (2 if arch == "75" else stages) * slices * (pixels + channels) * 64


#: Tiles for multiprocessors of much shared memory, and those in their place where there is little.
MUCH_OR_LITTLE = {
    "_sparse24_": (("128 128 64 1 3", "128 64 32 1 3"), ("128 128 32 1 3", "128 64 32 1 2")),
    "_blocks_": (("128 32 3",), ("128 32 2",)),
    "_vectors_": (("128 64 2 3",), ("128 64 2 2",)),
    "_vnm_": (("128 32 2 3",), ("128 32 2 2",)),
}


def shipped(name: str, arch: str) -> bool:
    """Whether a plan takes the kernel of this short name on this architecture."""
    numbers = name.partition(" ")[2]
    for part, (much, little) in MUCH_OR_LITTLE.items():
        if part in name:
            others = little if gpu_of(arch).shared >= 160 << 10 else much
            return not numbers.startswith(tuple(f"{tile} " for tile in others))
    return True


def rows(kernel: str, arch: str) -> tuple[Row, ...]:
    """All variants in csrc/cuda/<kernel>.cu that are taken on sm_<arch>, compiled for it."""
    return tuple(row for row in all_rows(kernel, arch) if shipped(row.kernel, arch))


@cache
def all_rows(kernel: str, arch: str) -> tuple[Row, ...]:
    """The same and those that are taken on other architectures alone."""
    with TemporaryDirectory() as folder:
        cubin = str(emulated.machine_code(kernel, arch, Path(folder)))
        usage = re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
            _tool("cuobjdump", "--dump-resource-usage", cubin),
        )
        info = _tool("cuobjdump", "-elf", cubin)
        sections = _sections(_tool("nvdisasm", "-c", cubin))
    found = []
    for mangled, registers, stack, shared, local in usage:
        about = info.partition(f"\n.nv.info.{mangled}\n")[2]
        most = re.search(r"EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s+0x([0-9a-f]+) 0x([0-9a-f]+)", about)
        threads = int(most[1], 16) if most else 1024
        sass = sections[mangled]
        opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", sass, re.M))
        name = short_name(mangled)
        memory = int(shared) + dynamic_shared(name, arch)
        blocks = blocks_per_sm(gpu_of(arch), threads, int(registers), memory)
        found.append(
            Row(
                name,
                arch,
                int(registers),
                int(stack) + int(local),
                memory,
                threads,
                blocks,
                opcodes,
                main_loop(sass),
            )
        )
    return tuple(sorted(found, key=lambda row: row.kernel))


#: Kernels whose tiles of a multiple of 64 pixels a warpgroup multiplies on sm_90a.
WARPGROUP = ("conv2d_int8", "conv2d_runs_int8", "gemm_int8")


def problems(row: Row) -> list[str]:
    """What is wrong with a kernel's machine code; nothing if all is well."""
    found = []
    if row.stack or row.opcodes["LDL"] or row.opcodes["STL"]:
        found.append(f"spills: {row.stack} bytes of stack, {row.opcodes['LDL']} LDL, {row.opcodes['STL']} STL")
    if row.blocks * row.threads < 128:
        found.append(f"{row.blocks * row.threads} threads on a multiprocessor: each of its four parts needs a warp")
    if row.kernel.startswith(("depthwise", *PASSES)):
        return found
    name, *numbers = row.kernel.split()
    products, group = count(row.loop, "MMA"), row.loop["IGMMA"]
    # Pixels of runs of bytes are not loaded as matrices.
    loads = "LDS" if name in ("conv2d_vectors_int8", "conv2d_vnm_int8") else "LDSM"
    if row.arch == "90a" and name in WARPGROUP and int(numbers[0]) % 64 == 0:
        others = products - group  # ptxas ends a group behind a branch by an HGMMA of nothing
        if group < 2 or others > 1 or row.loop["LDSM"]:
            found.append(f"the main loop has {group} IGMMA, {others} other MMA and {row.loop['LDSM']} LDSM")
    elif products < 8 or row.loop[loads] < 2:
        found.append(f"the main loop has {products} MMA and {row.loop[loads]} {loads}")
    bytewise = name == "conv2d_runs_int8" or (name == "conv2d_int8" and numbers[6] == "1")
    if not bytewise:
        # Where the next step's activations are.
        places = 1 if any(part in row.kernel for part in GATHERING) else 0
        if row.arch != "75" and (row.loop["LDGSTS"] < 2 or row.loop["LDG"] > places):
            found.append(
                f"the main loop has {row.loop['LDGSTS']} asynchronous copies and {row.loop['LDG']} plain loads"
            )
        # Bytes of four channels that are gathered one by one are turned, two for each word.
        turned = row.loop["IMMA"] * 2 if name == "conv2d_vnm_int8" else 0
        if row.loop["PRMT"] > turned:
            found.append(f"the main loop has {row.loop['PRMT']} PRMT")
    return found


def compiler() -> str:
    """The version line of nvcc: other compilers make other code."""
    assert emulated.NVCC
    return subprocess.run([emulated.NVCC, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[
        -1
    ]


def table() -> str:
    """The whole table: loop counts where there is a tensor-core loop, else counts of the kernel."""
    lines = [str(row) for kernel in emulated.KERNELS for arch in archs_of(kernel) for row in rows(kernel, arch)]
    return "\n".join([compiler(), HEADER, *lines]) + "\n"


if __name__ == "__main__":
    SNAPSHOT.write_text(table())
