"""Tensor-core instructions: mma, mma.sp, wgmma."""

from __future__ import annotations

import re

from tests.ptx.errors import UnsupportedInstruction
from tests.ptx.lower.registry import Lowered, Lowering, immediate, lowers
from tests.ptx.parser import Instruction, Vector

_ELEMENTS = {"s8": 0, "u8": 1, "f16": 2, "bf16": 3, "tf32": 4}
_BYTES = {"s8": 1, "u8": 1, "f16": 2, "bf16": 2, "tf32": 4}
_SUMS = {"s32": 0, "f32": 1, "f16": 2}
#: (m, k) by bytes of an element, dense and sparse. PTX ISA 9.7.14.5 and 9.7.14.6.
_DENSE = {1: {(8, 16), (16, 16), (16, 32)}, 2: {(16, 8), (16, 16)}, 4: {(16, 4), (16, 8)}}
_SPARSE = {1: {(16, 32), (16, 64)}, 2: {(16, 16), (16, 32)}, 4: {(16, 8), (16, 16)}}


@lowers("mma")
def matrix_multiply(low: Lowering, ins: Instruction) -> Lowered:
    parts = [p for p in ins.opcode if p != "satfinite"]
    sparse = parts[1].startswith("sp")
    ordered = int(parts[1] == "sp::ordered_metadata")
    if sparse:
        del parts[1]
    shape = re.fullmatch(r"m(\d+)n8k(\d+)", parts[3])
    if parts[1:3] != ["sync", "aligned"] or not shape or parts[4:6] != ["row", "col"] or len(parts) != 10:
        raise UnsupportedInstruction("kind of mma")
    kinds = parts[6:10]
    m, k, size = int(shape[1]), int(shape[2]), _BYTES.get(kinds[1], 0)
    if (
        (m, k) not in (_SPARSE if sparse else _DENSE).get(size, ())
        or _BYTES.get(kinds[2]) != size
        or kinds[0] != kinds[3]
    ):
        raise UnsupportedInstruction("shape or types of mma")
    if (kinds[0] == "s32") != (size == 1) or kinds[0] not in _SUMS or (size > 1 and kinds[1] != kinds[2]):
        raise UnsupportedInstruction("types of mma")
    d, a, b, c, *metadata = ins.operands
    groups = [low.registers(o, 32) for o in (d, a, b, c)]
    counts = [len(g) for g in groups]
    kept = k // 2 if sparse else k
    expected = [m * 8 * (2 if kinds[0] == "f16" else 4) // 128, m * kept * size // 128, 8 * k * size // 128]
    if counts[:3] != expected or counts[3] != counts[0]:
        raise UnsupportedInstruction(f"{counts} registers, expected {expected}")
    operands = [slot for group in groups for slot in group]
    selector = 0
    if sparse:
        operands.append(low.register(metadata[0], 32))
        selector = immediate(metadata[1])
        lanes = kept * (4 if size == 4 else 2) // 16  # of a quad that hold metadata
        if not 0 <= selector < 4 // lanes:
            raise UnsupportedInstruction(f"sparsity selector {selector}")
    ints = [m, 8, k, _ELEMENTS[kinds[1]], _ELEMENTS[kinds[2]], _SUMS[kinds[0]], int("satfinite" in ins.opcode), int(sparse),
            selector, ordered, counts[1], counts[2], counts[0]]  # fmt: skip
    return Lowered("mma", operands, ints)


@lowers("wgmma")
def warpgroup_multiply(low: Lowering, ins: Instruction) -> Lowered:
    kind = ins.opcode[1]
    if kind == "fence":
        return Lowered("nothing", [], [])
    if kind == "commit_group":
        return Lowered("wgmma.commit", [], [])
    if kind == "wait_group":
        return Lowered("wgmma.wait", [], [immediate(ins.operands[0])])
    parts = [p for p in ins.opcode[2:] if p not in ("satfinite", "sp", "sync", "aligned")]
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", parts[0])
    sparse = "sp" in ins.opcode
    if (
        kind != "mma_async"
        or not shape
        or len(parts) != 4
        or parts[1] not in _SUMS
        or not {*parts[2:]} <= _BYTES.keys()
    ):
        raise UnsupportedInstruction("kind of wgmma")
    n, k = int(shape[1]), int(shape[2])
    size = _BYTES[parts[2]]
    if k * size != (64 if sparse else 32) or (sparse and size == 4):
        raise UnsupportedInstruction("shape of wgmma")
    d, a, b, *rest = ins.operands
    metadata, selector = [], 0
    if sparse:
        metadata, selector, rest = [low.register(rest[0], 32)], immediate(rest[1]), rest[2:]
    scale, numbers = rest[0], [immediate(o) for o in rest[1:]]
    in_registers = isinstance(a, Vector)
    scale_a, scale_b = numbers[:2] if size > 1 else (1, 1)
    transposed = numbers[2:]
    trans_a, trans_b = (0, *transposed) if in_registers and transposed else tuple(transposed) or (0, 0)
    outputs, left = low.registers(d, 32), low.registers(a, 32 if in_registers else 64)
    operands = [*outputs, *left, low.register(b, 64), low.register(scale, 1), *metadata]
    ints = [n, k, _ELEMENTS[parts[2]], _ELEMENTS[parts[3]], _SUMS[parts[1]], int("satfinite" in ins.opcode), scale_a, scale_b,
            trans_a, trans_b, len(outputs), len(left) if in_registers else 0, int(sparse), selector]  # fmt: skip
    return Lowered("wgmma", operands, ints, touches_async=True)
