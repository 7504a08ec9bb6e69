"""Runs a parsed kernel: all lanes of all thread blocks at once, as numpy arrays.

While all lanes are at one instruction there is no mask. After a divergent branch every lane has its own program counter,
and the lowest is run first, which brings lanes together again where their paths meet. A lane at a barrier waits for all
living lanes of its block. Registers are held as bits (unsigned integers of the declared width) and viewed as what an
instruction asks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.errors import EmulatorError, UnsupportedInstruction
from tests.ptx.memory import GlobalMemory, SharedMemory
from tests.ptx.parser import Address, Immediate, Instruction, Kernel, Operand, Register, Sink, Special, Symbol, parse

Array = NDArray[Any]
Mask = NDArray[np.bool_] | None

WARP = 32
UNSIGNED: dict[int, np.dtype[Any]] = {
    8: np.dtype(np.uint8),
    16: np.dtype(np.uint16),
    32: np.dtype(np.uint32),
    64: np.dtype(np.uint64),
}
SIGNED: dict[int, np.dtype[Any]] = {
    8: np.dtype(np.int8),
    16: np.dtype(np.int16),
    32: np.dtype(np.int32),
    64: np.dtype(np.int64),
}
FLOAT: dict[int, np.dtype[Any]] = {16: np.dtype(np.float16), 32: np.dtype(np.float32), 64: np.dtype(np.float64)}
PREDICATE = np.dtype(np.bool_)


def dtype_of(kind: str) -> np.dtype[Any]:
    """numpy dtype of a PTX type such as "u32"."""
    if kind == "pred":
        return PREDICATE
    try:
        return {"u": UNSIGNED, "b": UNSIGNED, "s": SIGNED, "f": FLOAT}[kind[0]][int(kind[1:])]
    except (KeyError, ValueError):
        raise UnsupportedInstruction(f"type {kind}") from None


@dataclass
class Result:
    """What a run did. Counts are of warps; shared accesses also as 128-byte wavefronts, and as many as could be had without
    bank conflicts."""

    instructions: Counter[str] = field(default_factory=Counter)
    wavefronts: int = 0
    ideal_wavefronts: int = 0


class Machine:
    """The state of a running grid."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        grid: tuple[int, int, int],
        block: int,
        parameters: bytes,
        dynamic_shared: int,
        check_initialised: bool,
    ) -> None:
        if block % WARP:
            raise EmulatorError(f"block: got {block} threads, expected a multiple of {WARP}")
        self.kernel, self.memory, self.grid, self.block_size = kernel, memory, grid, block
        self.blocks = grid[0] * grid[1] * grid[2]
        self.lanes = self.blocks * block
        lane = np.arange(self.lanes)
        self.block, self.warp, self.thread = lane // block, lane // WARP, lane % block
        self.registers = {
            name: np.zeros(self.lanes, PREDICATE if kind == "pred" else UNSIGNED[int(kind[1:])])
            for name, kind in kernel.registers.items()
        }
        self.special = self._special()
        self.parameters = np.frombuffer(parameters, np.uint8)
        dynamic_start = -(-kernel.shared_bytes // 1024) * 1024 if dynamic_shared else kernel.shared_bytes
        self.shared = SharedMemory(self.blocks, dynamic_start + dynamic_shared, self.lanes, check_initialised)
        self.result = Result()
        self.waiting = np.zeros(self.lanes, bool)  # at a barrier

    def _special(self) -> dict[str, Array]:
        full = lambda value: np.full(self.lanes, value, np.uint32)  # noqa: E731
        x, y = self.grid[0], self.grid[1]
        values: dict[str, Any] = {
            "%tid.x": self.thread, "%tid.y": full(0), "%tid.z": full(0),
            "%ntid.x": full(self.block_size), "%ntid.y": full(1), "%ntid.z": full(1),
            "%ctaid.x": self.block % x, "%ctaid.y": self.block // x % y, "%ctaid.z": self.block // (x * y),
            "%nctaid.x": full(x), "%nctaid.y": full(y), "%nctaid.z": full(self.grid[2]),
            "%laneid": self.thread % WARP, "%warpid": self.thread // WARP,
        }  # fmt: skip
        return {name: value.astype(np.uint32) for name, value in values.items()}

    # Operands

    def active(self, mask: Mask) -> NDArray[np.int64]:
        """Numbers of the active lanes."""
        return np.arange(self.lanes) if mask is None else np.flatnonzero(mask)

    def read(self, operand: Operand, kind: str, mask: Mask) -> Array:
        """Value of an operand as PTX type ``kind``, one element per active lane. A wider register gives its low bits."""
        dtype = dtype_of(kind)
        if isinstance(operand, Register | Special):
            values = (self.registers if isinstance(operand, Register) else self.special)[operand.name]
            if mask is not None:
                values = values[mask]
            if dtype != PREDICATE and values.dtype.itemsize != dtype.itemsize:
                values = values.astype(UNSIGNED[8 * dtype.itemsize])
            return values.view(dtype)
        if isinstance(operand, Immediate):
            bits = operand.bits
        elif isinstance(operand, Symbol):
            bits = self.symbol(operand.name)
        else:
            raise UnsupportedInstruction(f"operand {operand}")
        count = self.lanes if mask is None else int(mask.sum())
        if dtype == PREDICATE:
            return np.full(count, bool(bits))
        width = 8 * dtype.itemsize
        return np.full(count, bits & ((1 << width) - 1), UNSIGNED[width]).view(dtype)

    def symbol(self, name: str) -> int:
        """Address of a parameter or shared variable within its space."""
        return self.kernel.shared[name] if name in self.kernel.shared else self.kernel.parameters[name][0]

    def write(self, operand: Operand, values: Array, mask: Mask) -> None:
        """Write a register; a narrower value is sign- or zero-extended by its dtype."""
        if isinstance(operand, Sink):
            return
        if not isinstance(operand, Register):
            raise UnsupportedInstruction(f"destination {operand}")
        register = self.registers[operand.name]
        if values.dtype != register.dtype:
            if values.dtype.itemsize < register.dtype.itemsize and values.dtype.kind == "i":
                values = values.astype(SIGNED[8 * register.dtype.itemsize]).view(register.dtype)
            elif values.dtype.itemsize < register.dtype.itemsize:
                values = values.view(UNSIGNED[8 * values.dtype.itemsize]).astype(register.dtype)
            else:
                values = values.view(register.dtype)  # raises where widths differ
        if mask is None:
            register[...] = values
        else:
            register[mask] = values

    def addresses(self, operand: Operand, kind: str, mask: Mask) -> NDArray[np.int64]:
        """Byte addresses that an address operand gives, its base read as ``kind``."""
        if not isinstance(operand, Address):
            raise UnsupportedInstruction(f"address {operand}")
        return self.read(operand.base, kind, mask).astype(np.int64) + operand.offset

    # Control

    def run(self, handlers: dict[str, Callable[[Machine, Instruction, Mask], None]]) -> None:
        """Run until all lanes have left the kernel."""
        instructions = self.kernel.instructions
        end = len(instructions)
        counter: int | None = 0  # where all lanes are, or None
        counters = np.zeros(self.lanes, np.int64)
        while True:
            active: Mask = None
            if counter is None:
                ready = (counters < end) & ~self.waiting
                if not ready.any():
                    return  # nobody can be waiting: lanes that have left don't hold a barrier up
                at = int(counters[ready].min())
                active = ready & (counters == at)
                if active.all():
                    counter, active = at, None
            if counter is not None:
                if counter >= end:
                    return
                at = counter
            instruction = instructions[at]
            mask = self._predicated(instruction, active)
            following = self._step(instruction, at, active, mask, handlers)
            if counter is not None and isinstance(following, int) and not self.waiting.any():
                counter = following
                continue
            if counter is not None:
                counters[...] = counter
                counter = None
            counters[... if active is None else active] = following
            if self.waiting.any():
                self._release(counters, end)

    def _predicated(self, instruction: Instruction, active: Mask) -> Mask:
        """Active lanes that the instruction's predicate lets through; None if all lanes."""
        if instruction.predicate is None:
            return active
        allowed = self.registers[instruction.predicate]
        allowed = ~allowed if instruction.negated else allowed
        mask = allowed if active is None else active & allowed
        return None if mask.all() else mask.copy()

    def _step(
        self,
        instruction: Instruction,
        at: int,
        active: Mask,
        mask: Mask,
        handlers: dict[str, Callable[[Machine, Instruction, Mask], None]],
    ) -> int | NDArray[np.int64]:
        """Execute one instruction; the next program counter of the active lanes, one number if it's the same for all."""
        self._count(instruction, mask)
        base = instruction.base
        if base in ("bra", "ret", "exit"):
            goal = self.kernel.labels[instruction.target] if instruction.target else len(self.kernel.instructions)
            taken = np.ones(self.lanes, bool) if mask is None else mask
            taken = taken if active is None else taken[active]
            if taken.all():
                return goal
            return np.where(taken, goal, at + 1) if taken.any() else at + 1
        if mask is not None and not mask.any():
            return at + 1
        handler = handlers.get(base)
        if handler is None:
            raise UnsupportedInstruction(str(instruction))
        try:
            handler(self, instruction, mask)
        except EmulatorError as error:
            raise type(error)(f"{error}; {instruction}") from error
        except Exception as error:
            raise UnsupportedInstruction(f"{type(error).__name__}: {error}; {instruction}") from error
        return at + 1

    def _count(self, instruction: Instruction, mask: Mask) -> None:
        warps = self.lanes // WARP if mask is None else int(mask.reshape(-1, WARP).any(1).sum())
        self.result.instructions[".".join(instruction.opcode)] += warps

    def wait_at_barrier(self, mask: Mask) -> None:
        """Hold the active lanes until all living lanes of their block are held; at once where they all are."""
        if mask is None:
            self.shared.epoch += 1
        else:
            self.waiting |= mask

    def _release(self, counters: NDArray[np.int64], end: int) -> None:
        """Let blocks go whose living lanes are all at the barrier."""
        by_block = (self.waiting | (counters >= end)).reshape(self.blocks, -1).all(1)
        released = by_block & self.waiting.reshape(self.blocks, -1).any(1)
        self.shared.epoch[released] += 1
        self.waiting &= ~released[self.block]


def _pack(kernel: Kernel, arguments: Sequence[int | float | bytes]) -> bytes:
    """Arguments as the kernel's parameter block; missing trailing ones are zero, as Triton's hidden scratch pointers may be."""
    parameters = list(kernel.parameters.values())
    if len(arguments) > len(parameters):
        raise EmulatorError(f"arguments: got {len(arguments)}, the kernel takes {len(parameters)}")
    block = bytearray(sum(parameters[-1]) if parameters else 0)
    for value, (offset, size) in zip(arguments, parameters, strict=False):
        if isinstance(value, bytes):
            raw = value
        elif isinstance(value, float):
            raw = np.float32(value).tobytes()
        else:
            raw = (int(value) % (1 << 8 * size)).to_bytes(size, "little")
        if len(raw) != size:
            raise EmulatorError(f"argument: got {len(raw)} bytes, the parameter has {size}")
        block[offset : offset + size] = raw
    return bytes(block)


def emulate(
    ptx: str,
    kernel: str | None,
    grid: tuple[int, int, int],
    block: int,
    arguments: Sequence[int | float | bytes],
    memory: GlobalMemory,
    *,
    shared_bytes: int = 0,
    check_initialised: bool = True,
) -> Result:
    """Run a kernel of a PTX file.

    Args:
        ptx: PTX text.
        kernel: Name of the entry; None if there is one only.
        grid: Thread blocks (x, y, z).
        block: Threads of a block, a multiple of 32.
        arguments: One per parameter: an integer or address, a float for .f32, or the bytes of a struct.
        memory: Device memory; addresses in the arguments come from its ``allocate``, results from its ``fetch``.
        shared_bytes: Dynamic shared memory.
        check_initialised: Reading shared memory that nothing was written to is a fault.

    Raises:
        EmulatorError: One of its subclasses; the message ends with the line and text of the instruction.
    """
    from tests.ptx.instructions import HANDLERS

    parsed = parse(ptx, kernel)
    machine = Machine(parsed, memory, grid, block, _pack(parsed, arguments), shared_bytes, check_initialised)
    with np.errstate(all="ignore"):
        machine.run(HANDLERS)
    return machine.result
