"""Runs a kernel: :func:`load` parses and lowers PTX, :func:`emulate` launches it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from tests.ptx.engine import Config, Engine, knows
from tests.ptx.errors import FAULTS, EmulatorError
from tests.ptx.lower import Program, lower_kernel
from tests.ptx.memory import GlobalMemory
from tests.ptx.parser import CONSTANTS_BASE, parse
from tests.ptx.result import Result

Argument = int | float | bool | bytes | torch.Tensor
WARP = 32


@dataclass(frozen=True)
class Checks:
    """What is looked for, besides bounds and alignment, which always are.

    Attributes:
        races: Accesses to shared memory that conflict without anything that orders them.
        initialised: Reads of shared, local and output memory that nothing was written to.
        blocks: Conflicting accesses to global memory by blocks that nothing orders.
    """

    races: bool = True
    initialised: bool = True
    blocks: bool = True


@dataclass(frozen=True)
class Caches:
    """Sizes of the cache model in bytes: the L1 that each block starts with empty, and the L2 that all share."""

    l1: int = 64 << 10
    l2: int = 40 << 20


@lru_cache(maxsize=256)
def load(ptx: str, name: str | None = None) -> Program:
    """Parse and lower the kernel ``name`` of a PTX file, or its only one."""
    return lower_kernel(parse(ptx, name), knows)


def _pack(program: Program, arguments: Sequence[Argument], memory: GlobalMemory) -> bytes:
    """Arguments as the kernel's parameter block; missing trailing ones are zero, as Triton's hidden scratch pointers may be."""
    parameters = list(program.kernel.parameters.values())
    if len(arguments) > len(parameters):
        raise EmulatorError(f"arguments: got {len(arguments)}, the kernel takes {len(parameters)}")
    block = bytearray(sum(parameters[-1]) if parameters else 0)
    for number, (value, (offset, size)) in enumerate(zip(arguments, parameters, strict=False)):
        if isinstance(value, bytes):
            raw = value
        elif isinstance(value, torch.Tensor):
            raw = memory.pointer(value).to_bytes(8, "little")
        elif isinstance(value, float):
            raw = (np.float64 if size == 8 else np.float32)(value).tobytes()
        else:
            raw = (int(value) % (1 << 8 * size)).to_bytes(size, "little")
        if len(raw) != size:
            raise EmulatorError(f"argument {number}: got {len(raw)} bytes, the parameter has {size}")
        block[offset : offset + size] = raw
    return bytes(block)


def _triple(sizes: int | Sequence[int]) -> tuple[int, int, int]:
    given = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    x, y, z = (*given, 1, 1, 1)[:3]
    return x, y, z


def _fail(program: Program, code: int, message: str, place: tuple[int, ...], grid: tuple[int, int, int]) -> None:
    at, block, warp, lane = place
    if at in program.problems and code == 1:
        message = program.problems[at]
    where = f"block {(block % grid[0], block // grid[0] % grid[1], block // (grid[0] * grid[1]))}"
    where += f" warp {warp}" * (warp >= 0) + f" lane {lane}" * (lane >= 0)
    instruction = f"; {program.kernel.instructions[at]}" if 0 <= at < len(program.lowered) else "; line unknown"
    raise FAULTS[code](f"{message}; {where}{instruction}")


def emulate(
    kernel: Program | str,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    args: Sequence[Argument],
    *,
    shared: int = 0,
    memory: GlobalMemory | None = None,
    blocks: Iterable[int] | None = None,
    checks: Checks = Checks(),
    caches: Caches = Caches(),
    count: bool = True,
    max_instructions: int = 20_000_000,
) -> Result:
    """Launch a kernel, as ``kernel<<<grid, block, shared>>>(*args)``.

    Args:
        kernel: From :func:`load`, or the text of a PTX file of one kernel.
        grid: Blocks (x, y, z), or of x alone.
        block: Threads (x, y, z) of a block, or of x alone.
        args: One per parameter: a CPU tensor, which the kernel reads and writes in place; an integer or address; a float;
            or the bytes of a struct.
        shared: Bytes of dynamic shared memory.
        memory: Where addresses in ``args`` come from; needed with those only.
        blocks: Numbers (x fastest) of the blocks to run, all by default: a sample of a large grid.
        checks: What is looked for.
        caches: Of the traffic model.
        count: Count requests, sectors, bank conflicts and cache traffic too. Instructions are always counted.
        max_instructions: Warp instructions of a block after which it counts as endless.

    Raises:
        EmulatorError: One of its subclasses; the message names block, warp and lane, and the line and text of the instruction.
    """
    program = load(kernel) if isinstance(kernel, str) else kernel
    memory = memory or GlobalMemory()
    parameters = _pack(program, args, memory)
    parsed = program.kernel
    static = -(-parsed.shared_bytes // 1024) * 1024 if shared else parsed.shared_bytes
    full_grid, threads = _triple(grid), _triple(block)
    config = Config(
        full_grid, threads, static + shared, parsed.local_bytes, len(parameters), checks.races, checks.initialised,
        checks.blocks, count, program.bytewise, program.initial.size, max_instructions, caches.l1, caches.l2,
    )  # fmt: skip
    engine = Engine(program)
    for one in memory.allocations:
        engine.add_region(one.base, one.host, one.written)
    constants = np.frombuffer(bytes(parsed.constants), np.uint8).copy()
    if constants.size:
        engine.add_region(CONSTANTS_BASE, constants, None)
    numbers = np.arange(np.prod(full_grid), dtype=np.int32) if blocks is None else np.fromiter(blocks, np.int32)
    code, message, place, counters, in_flight = engine.run(config, parameters, numbers)
    if code:
        _fail(program, code, message, place, full_grid)
    return Result(program, counters, numbers.size, -(-int(np.prod(threads)) // WARP), in_flight, static + shared)
