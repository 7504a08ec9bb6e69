"""Runs the package's CUDA kernels on the layers of a network in the emulator, for the model."""

from __future__ import annotations

from functools import cache

import torch

from bench.gpu_hardware import Gpu
from bench.gpu_model import Launch, sample_of
from bench.layers import ConvShape
from cnncomp import _cuda
from tests import cuda_emulated as emulated
from tests import cuda_gate
from tests.ptx import Checks, GlobalMemory, Result, emulate, load


def _registers(kernel: str, arch: str) -> int:
    """Of a planned kernel, from its machine code."""
    source = kernel.split("_int8")[0] + "_int8"
    wanted = cuda_gate.short_name(emulated.entry_of(kernel, emulated.ptx_of(source, arch)))
    return next(row.registers for row in cuda_gate.rows(source, arch) if row.kernel == wanted)


@cache
def _run(shape: ConvShape, batch: int, arch: str, sms: int) -> tuple[Result, int, int, int, str]:
    g = shape.geometry
    out_sizes = [
        (size + 2 * pad - d * (kernel - 1) - 1) // stride + 1
        for size, pad, d, kernel, stride in zip(
            (shape.h, shape.w), g.padding, g.dilation, g.kernel_size, g.stride, strict=True
        )
    ]
    x = torch.randint(0, 256, (batch * shape.h * shape.w * shape.c,), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (shape.k * g.reduction,), dtype=torch.int8)
    out = torch.empty(batch * out_sizes[0] * out_sizes[1] * shape.k, dtype=torch.uint8)
    constants = torch.ones(3, shape.k)
    memory = GlobalMemory()
    place = memory.pointer
    plan = _cuda.plan_conv2d_int8(
        sms, place(x), False, batch, shape.h, shape.w, shape.c, place(weight), shape.k, shape.r, shape.s, *g.stride, *g.padding,
        *g.dilation, shape.groups, place(constants), 0, 0, 0.0, 0.0, place(out), 0,
    )  # fmt: skip
    source = plan["kernel"].split("_int8")[0] + "_int8"
    ptx = emulated.ptx_of(source, arch)
    blocks = plan["grid"][0] * plan["grid"][1] * plan["grid"][2]
    result = emulate(
        load(ptx, emulated.entry_of(plan["kernel"], ptx)), plan["grid"], plan["block"], [plan["params"]], memory=memory,
        blocks=sample_of(blocks), checks=Checks(races=False, initialised=False, blocks=False),
    )  # fmt: skip
    least = sum(t.numel() * t.element_size() for t in (x, weight, out, constants))
    return result, blocks, plan["block"], least, plan["kernel"]


def run_layer(shape: ConvShape, batch: int, arch: str, gpu: Gpu) -> tuple[Result, Launch, str]:
    """Counts of a layer with u8 input and output, no residual; how it was launched; the kernel's name.

    Args:
        shape: The layer.
        batch: Images.
        arch: "75" or "80": whose code runs.
        gpu: Whose number of multiprocessors the plan is made for.
    """
    result, blocks, threads, least, kernel = _run(shape, batch, arch, gpu.sms)
    return result, Launch(blocks, threads, _registers(kernel, arch), least), kernel
