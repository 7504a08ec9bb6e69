"""Runs the package's CUDA kernels on the layers of a network in the emulator, for the model."""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.gpu_counts import Counted, counted
from bench.gpu_hardware import Gpu
from bench.gpu_model import L1, Launch, sample_of, touched
from bench.layers import ConvShape
from cnncomp import _cuda
from tests import cuda_emulated as emulated
from tests.ptx import Caches, Checks, GlobalMemory, Result, emulate, load
from tests.ptx.mutate import single_entry

BLOCKS = 16  # of a large grid that are run


@cache
def text_of(kernel: str, arch: str) -> str:
    """A planned kernel's own PTX, without the others of its file."""
    ptx = emulated.ptx_of(emulated.source_of(kernel), arch)
    return single_entry(ptx, emulated.entry_of(kernel, ptx))


@cache
def registers_of(kernel: str, arch: str) -> int:
    """Registers of a thread of a planned kernel: what ptxas says of this one alone, not of some dozens in its file."""
    assert emulated.NVCC
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(text_of(kernel, arch))
        command = [
            emulated.NVCC,
            f"-arch=sm_{arch}",
            "-cubin",
            "-Xptxas=-v",
            str(source),
            "-o",
            f"{folder}/kernel.cubin",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.findall(r"Used (\d+) registers", said)
    assert len(used) == 1, said
    return int(used[0])


@cache
def _digest(kernel: str, arch: str) -> str:
    """Of a planned kernel's own PTX: what is changed in others leaves its counts."""
    return hashlib.sha256(text_of(kernel, arch).encode()).hexdigest()


def out_size(shape: ConvShape) -> tuple[int, int]:
    """Rows and columns of a convolution's output."""
    g = shape.geometry
    p, q = (
        (size + 2 * pad - d * (kernel - 1) - 1) // stride + 1
        for size, pad, d, kernel, stride in zip(
            (shape.h, shape.w), g.padding, g.dilation, g.kernel_size, g.stride, strict=True
        )
    )
    return p, q


def planned(
    shape: ConvShape, batch: int, sms: int, memory: GlobalMemory, random: bool = False
) -> tuple[dict[str, Any], Launch]:
    """What would be launched, on tensors of zeros, since the values change no count, or of random numbers."""
    g = shape.geometry
    x = torch.zeros(batch * shape.h * shape.w * shape.c, dtype=torch.uint8)
    weight = torch.zeros(shape.k * g.reduction, dtype=torch.int8)
    out = torch.zeros(batch * math.prod(out_size(shape)) * shape.k, dtype=torch.uint8)
    if random:
        x.random_(256)
        weight.random_(-127, 128)
    constants = torch.ones(3, shape.k)
    workspace = torch.zeros(_cuda.WORKSPACE_BYTES // 4, dtype=torch.int32)
    place = memory.pointer
    plan = _cuda.plan_conv2d_int8(
        sms, place(x), False, batch, shape.h, shape.w, shape.c, place(weight), shape.k, shape.r, shape.s, *g.stride, *g.padding,
        *g.dilation, shape.groups, place(constants), 0, 0, 0.0, 0.0, place(out), 0,
        place(workspace), workspace.nbytes, "", 0, 0, 1.0,
    )  # fmt: skip
    share = math.prod(touched(v, r, shape.stride) for v, r in ((shape.h, shape.r), (shape.w, shape.s)))
    read = int(share * x.nbytes)
    grid = plan["grid"]
    least = read + weight.nbytes + out.nbytes + constants.nbytes + _sums(plan) * grid[2]
    return plan, Launch(math.prod(grid), plan["block"], 0, least, "int8", read, grid[1] * grid[2])


def _sums(plan: dict[str, Any]) -> int:
    """Bytes of a group's 32-bit sums of tiles whose reduction blocks share."""
    tile = re.search(r"_(\d+)x(\d+)_", plan["kernel"])
    shared = (plan["grid"][0] - plan["whole"]) // plan["parts"] if plan["parts"] > 1 else 0
    return 4 * shared * int(tile[1]) * int(tile[2]) if tile else 0


def _channel_tiles(plan: dict[str, Any], shape: ConvShape) -> int:
    """Neighbouring blocks of the same pixels, which have all channels of a group together; 1 of kernels without tiles."""
    tile = re.search(r"_\d+x(\d+)_", plan["kernel"])
    return math.ceil(shape.k / shape.groups / int(tile[1])) if tile else 1


def _blocks(plan: dict[str, Any], shape: ConvShape) -> list[int] | None:
    """The blocks to run.

    All where blocks share each tile's reduction, since the last of them does more than the others. Where they share that of the
    last tiles alone, all that share some of these, spread over them, and blocks of other tiles in proportion.
    """
    grid, whole, parts = math.prod(plan["grid"]), plan["whole"], plan["parts"]
    if parts == 1:
        return sample_of(grid, BLOCKS, _channel_tiles(plan, shape))
    if whole == 0:
        return None
    shared = (grid - whole) // parts
    some = max(1, round(BLOCKS * shared / whole))
    alone = sample_of(whole, max(BLOCKS, 8 * round(whole * some / shared / 8)))
    chosen = [(2 * i + 1) * shared // (2 * some) for i in range(some)]
    return [*(alone or range(whole)), *(whole + part * shared + tile for part in range(parts) for tile in chosen)]


def run_layer(shape: ConvShape, batch: int, arch: str, gpu: Gpu) -> tuple[Counted, str]:
    """Counts of a layer with u8 input and output, no residual; how it was launched; the kernel's name.

    Args:
        shape: The layer.
        batch: Images.
        arch: "75", "80" or "90a": whose code runs.
        gpu: Whose number of multiprocessors the plan is made for.
    """
    memory = GlobalMemory()
    plan, launch = planned(shape, batch, gpu.sms, memory)
    kernel = plan["kernel"]
    blocks = _blocks(plan, shape)

    def run() -> tuple[Result, Launch]:
        result = emulate(
            load(text_of(kernel, arch)), plan["grid"], plan["block"], [plan["params"]],
            shared=emulated.shared_of(plan, arch), memory=memory, blocks=blocks,
            checks=Checks(races=False, initialised=False, blocks=False), caches=Caches(l1=L1),
        )  # fmt: skip
        registers = registers_of(kernel, arch)
        return result, Launch(**{**vars(launch), "registers": registers})

    key = (_digest(kernel, arch), arch, kernel, plan["grid"], batch, shape, blocks, L1)
    return counted(key, run), kernel
