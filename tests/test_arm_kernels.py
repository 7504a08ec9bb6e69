"""The int8 kernels for 64-bit ARM, cross-compiled and emulated: bit for bit the reference."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.int8_convs import CODE, F32, GEOMETRIES, S8, U8, Conv, Operands, ending, nhwc, random_operands, reference
from tests.test_conv2d_int8_cpu_kernels import pack

pytest.importorskip("ziglang", reason="cross-compiles with the package ziglang")
pytest.importorskip("unicorn", reason="emulates with the package unicorn")

from tests.arm_emulated import Machine, build


@pytest.fixture(scope="module")
def program() -> Path:
    return build()


def run(program: Path, isa: str, conv: Conv, o: Operands) -> Tensor:
    machine = Machine(program)
    n, k, p, q = conv.out_shape
    before = torch.full((n, p, q, k), 77, dtype=conv.out)
    out, x, constants = machine.put(before), machine.put(nhwc(o.x)), machine.put(o.constants)
    weight = machine.put(pack(o.weight, conv.groups, conv.depthwise))
    residual = 0 if o.residual is None else machine.put(nhwc(o.residual))
    # Conv2dInt8Args of csrc/cpu/conv2d_int8.h.
    arguments = struct.pack(
        "<Q?7x4qQ10q?7xQQiffxxxxQii?3xif4x",
        x, conv.x == S8, conv.n, conv.h, conv.w, conv.c, weight, k, *conv.kernel, *conv.stride, *conv.pad, *conv.dil,
        conv.groups, conv.depthwise, constants, residual, CODE[conv.residual or U8], o.residual_scale, o.lo, out,
        CODE[conv.out], 1, conv.shift, *ending(conv),
    )  # fmt: skip
    machine.call(isa, arguments)
    return machine.read(out, before).permute(0, 3, 1, 2)


CONVS = (
    *GEOMETRIES[1:],
    Conv(3, 20, 1, 11, 9, (7, 7), (2, 2), (3, 3)),
    Conv(40, 35, 1, 5, 5, out=S8, residual=S8),
    Conv(37, 32, 1, 4, 7, x=S8, residual=U8),
    Conv(16, 16, 1, 5, 5, (3, 3), pad=(1, 1), shift=True),
    Conv(17, 40, 1, 3, 5, out=F32, residual=F32),
    *(
        Conv(40, 40, 1, 9, 8, (r, r), (t, t), (r // 2, r // 2), groups=40, x=x)
        for r in (3, 5)
        for t in (1, 2)
        for x in (U8, S8)
    ),
    *(
        Conv(24, 24, 1, 5, 5, (3, 3), pad=(1, 1), groups=groups, out=out, activation=activation)
        for groups in (1, 24)
        for out in (U8, F32)
        for activation in ("silu", "hardswish")
    ),
    Conv(24, 24, 1, 5, 5, (3, 3), pad=(1, 1), groups=24, shift=True, x=S8),
    Conv(24, 24, 1, 5, 5, (3, 3), pad=(1, 1), groups=24, residual=S8, out=S8),
)


@pytest.mark.parametrize("isa", ["baseline", "dotprod"])
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_convolutions_equal_the_reference(program: Path, isa: str, conv: Conv) -> None:
    torch.manual_seed(0)
    operands = random_operands(conv)
    assert torch.equal(run(program, isa, conv, operands), reference(conv, operands))


@pytest.mark.parametrize("isa", ["baseline", "dotprod"])
@pytest.mark.parametrize(("dtype", "value"), [(U8, 255), (U8, 0), (S8, -128), (S8, 127)])
def test_extremes(program: Path, isa: str, dtype: torch.dtype, value: int) -> None:
    conv = Conv(64, 32, 1, 3, 3, (3, 3), pad=(1, 1), x=dtype, out=F32)
    operands = random_operands(conv)
    operands.x.fill_(value)
    operands.weight.copy_(torch.tensor([-128, 127] * 16, dtype=S8).reshape(-1, 1, 1, 1).expand_as(operands.weight))
    operands.constants.copy_(torch.tensor([1.0, 0.0, torch.inf])[:, None].expand(3, 32))
    operands.lo = -torch.inf
    assert torch.equal(run(program, isa, conv, operands), reference(conv, operands))


@pytest.mark.parametrize(("isa", "instruction"), [("dotprod", "\tsdot\t"), ("i8mm", "\tusdot\t")])
def test_kernels_have_the_intended_instructions(program: Path, isa: str, instruction: str) -> None:
    if shutil.which("llvm-objdump") is None:
        pytest.skip("no llvm-objdump")
    command = [
        "llvm-objdump",
        "-d",
        "--no-show-raw-insn",
        "--mattr=+dotprod,+i8mm",
        str(program.parent / f"int8_{isa}.o"),
    ]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text.count(instruction) > 500
