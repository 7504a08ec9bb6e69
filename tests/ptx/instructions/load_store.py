"""Loads, stores, asynchronous copies, barriers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.ptx.errors import UnsupportedInstruction
from tests.ptx.instructions.registry import instruction
from tests.ptx.machine import WARP, Machine, Mask, dtype_of
from tests.ptx.parser import Immediate, Instruction, Operand, Vector

_KNOWN = {"global", "shared", "shared::cta", "param", "nc", "v2", "v4", "volatile"}


def count_wavefronts(m: Machine, addresses: NDArray[np.int64], size: int, lanes: NDArray[np.int64]) -> None:
    """Count passes over the banks: 128 bytes of a warp go together, a bank gives one word a pass."""
    words_each = max(1, size // 4)
    phase = lanes // WARP * words_each + lanes % WARP * words_each // WARP
    words = (addresses // 4)[:, None] + np.arange(words_each)
    unique = np.unique(np.stack([np.repeat(phase, words_each), words.ravel()]), axis=1)
    _, per_bank = np.unique(unique[0] * WARP + unique[1] % WARP, return_counts=True)
    banks = np.unique(unique[0] * WARP + unique[1] % WARP) // WARP
    starts = np.flatnonzero(np.r_[True, banks[1:] != banks[:-1]])
    m.result.wavefronts += int(np.maximum.reduceat(per_bank, starts).sum())
    m.result.ideal_wavefronts += starts.size


def _items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _space(ins: Instruction) -> str:
    if set(ins.opcode[1:-1]) - _KNOWN:
        raise UnsupportedInstruction(f"modifiers of {ins.base}")
    for space in ("global", "param"):
        if space in ins.opcode:
            return space
    if "shared" in ins.opcode or "shared::cta" in ins.opcode:
        return "shared"
    raise UnsupportedInstruction("generic address")


@instruction("ld")
def load(m: Machine, ins: Instruction, mask: Mask) -> None:
    items, space, dtype = _items(ins.operands[0]), _space(ins), dtype_of(ins.type)
    size = dtype.itemsize * len(items)
    if space == "param":
        addresses = m.addresses(ins.operands[1], "u64", mask)
        if addresses.min() < 0 or addresses.max() + size > m.parameters.size:
            raise UnsupportedInstruction("parameter out of bounds")
        raw = m.parameters[addresses[:, None] + np.arange(size)]
    elif space == "global":
        raw = m.memory.load(m.addresses(ins.operands[1], "u64", mask), size)
    else:
        addresses, lanes = m.addresses(ins.operands[1], "u32", mask), m.active(mask)
        count_wavefronts(m, addresses, size, lanes)
        raw = m.shared.load(addresses, m.block[lanes], m.warp[lanes], size)
    values = np.ascontiguousarray(raw).view(dtype)
    for i, item in enumerate(items):
        m.write(item, values[:, i], mask)


@instruction("st")
def store(m: Machine, ins: Instruction, mask: Mask) -> None:
    items, space = _items(ins.operands[1]), _space(ins)
    bits = f"b{ins.type[1:]}"
    values = np.stack([m.read(item, bits, mask) for item in items], axis=1).view(np.uint8)
    if space == "global":
        m.memory.store(m.addresses(ins.operands[0], "u64", mask), values)
    elif space == "shared":
        addresses, lanes = m.addresses(ins.operands[0], "u32", mask), m.active(mask)
        count_wavefronts(m, addresses, values.shape[1], lanes)
        m.shared.store(addresses, m.block[lanes], m.warp[lanes], values)
    else:
        raise UnsupportedInstruction("store to parameters")


@instruction("cp")
def copy_async(m: Machine, ins: Instruction, mask: Mask) -> None:
    """cp.async in all its parts. Of fewer source bytes the rest is zero; of none, nothing is read."""
    lanes = m.active(mask)
    if ins.opcode[:3] == ("cp", "async", "commit_group"):
        m.shared.commit(lanes)
    elif ins.opcode[:3] == ("cp", "async", "wait_group"):
        keep = ins.operands[0]
        assert isinstance(keep, Immediate)
        m.shared.wait(lanes, keep.bits)
    elif ins.opcode[:3] == ("cp", "async", "wait_all"):
        m.shared.commit(lanes)
        m.shared.wait(lanes, 0)
    elif ins.opcode[1] == "async" and ins.opcode[2] in ("cg", "ca"):
        size = ins.operands[2]
        assert isinstance(size, Immediate)
        target, source = m.addresses(ins.operands[0], "u32", mask), m.addresses(ins.operands[1], "u64", mask)
        real = np.full(lanes.size, size.bits) if len(ins.operands) < 4 else m.read(ins.operands[3], "u32", mask)
        values = np.zeros((lanes.size, size.bits), np.uint8)
        if not np.isin(real, (0, size.bits)).all():
            raise UnsupportedInstruction("cp.async of a part")
        values[real > 0] = m.memory.load(source[real > 0], size.bits)
        count_wavefronts(m, target, size.bits, lanes)
        m.shared.copy_async(target, m.block[lanes], m.warp[lanes], lanes, values)
    else:
        raise UnsupportedInstruction("copy")


@instruction("bar", "barrier")
def barrier(m: Machine, ins: Instruction, mask: Mask) -> None:
    if "sync" not in ins.opcode or len(ins.operands) != 1 or ins.operands[0] != Immediate(0):
        raise UnsupportedInstruction("barrier other than bar.sync 0")
    whole_warps(m, mask)
    m.wait_at_barrier(mask)


@instruction("ldmatrix")
def load_matrix(m: Machine, ins: Instruction, mask: Mask) -> None:
    """Matrices of 8 rows of 16 bytes; lanes 8 * i and on address matrix i, lane l gets word l % 4 of row l / 4 of each."""
    if ins.opcode[:4] != ("ldmatrix", "sync", "aligned", "m8n8") or "trans" in ins.opcode or ins.type != "b16":
        raise UnsupportedInstruction("kind of ldmatrix")
    lanes = whole_warps(m, mask)
    count = len(_items(ins.operands[0]))
    addressing = lanes.reshape(-1, WARP)[:, : 8 * count].ravel()
    chosen = np.zeros(m.lanes, bool)
    chosen[addressing] = True
    addresses = m.addresses(ins.operands[1], "u32", chosen)
    count_wavefronts_of_rows(m, addresses)
    raw = m.shared.load(addresses, m.block[addressing], m.warp[addressing], 16)
    matrices = raw.view(np.uint32).reshape(-1, count, WARP)
    for i, item in enumerate(_items(ins.operands[0])):
        m.write(item, matrices[:, i].ravel(), mask)


def count_wavefronts_of_rows(m: Machine, addresses: NDArray[np.int64]) -> None:
    """ldmatrix: each 8 x 16-byte matrix is one pass unless rows fall into the same banks."""
    banks = addresses.reshape(-1, 8) // 16 % 8
    rows = (banks[:, :, None] == np.arange(8)).sum(1)
    m.result.wavefronts += int(rows.max(1).sum())
    m.result.ideal_wavefronts += len(banks)


def whole_warps(m: Machine, mask: Mask) -> NDArray[np.int64]:
    """Active lanes, which must be whole warps."""
    if mask is not None:
        warps = mask.reshape(-1, WARP)
        if (warps.any(1) != warps.all(1)).any():
            raise UnsupportedInstruction("a warp-wide instruction in a warp that has diverged")
    return m.active(mask)
