"""What a run did: counters per kernel, per class of instruction, per opcode and per source line."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.lower import Program
from tests.ptx.parser import Instruction

_CLASSES = {
    "tensor": ("mma", "wgmma"),
    "matrix load": ("ldmatrix", "stmatrix"),
    "asynchronous copy": ("cp",),
    "atomic": ("atom", "red"),
    "barrier": ("bar", "barrier", "mbarrier", "fence", "membar"),
    "control": ("bra", "brx", "ret", "exit", "call", "trap"),
    "warp": ("shfl", "vote", "match", "redux", "activemask", "elect"),
    "move": ("mov", "cvt", "cvta", "prmt", "selp"),
    "special function": ("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh"),
}
_CLASS_OF = {base: name for name, bases in _CLASSES.items() for base in bases}


def class_of(ins: Instruction) -> str:
    """Class of an instruction, for counting."""
    if ins.base in ("ld", "ldu", "st"):
        space = next(
            (s for s in ("global", "shared", "local", "param") if any(p.split("::")[0] == s for p in ins.opcode)),
            "generic",
        )
        return f"{'store' if ins.base == 'st' else 'load'} {space}"
    if ins.base in _CLASS_OF:
        return _CLASS_OF[ins.base]
    return "float" if ins.type[0] == "f" or ins.type.startswith("bf") else "integer"


class Result:
    """Counters of a run.

    Attributes:
        counters: One record per instruction of the kernel: ``warps`` executions by a warp, active ``lanes`` of them all
            together; of memory instructions ``requests``, 32-byte ``sectors`` and ``bytes`` asked for, ``l2_sectors`` that the
            L1 model did not hold, ``dram_sectors`` that the L2 model did not hold either, passes over the shared-memory banks
            (``wavefronts``) and the least there could be (``ideal``); multiplications and additions of tensor cores
            (``tensor_ops``).
        blocks: Blocks that ran.
        warps: Warps of a block.
        bytes_in_flight: The most that asynchronous copies of one block had under way at once, or that its plain loads read
            between two barriers, which is how far ahead a kernel without such copies can be.
        shared_bytes: Static and dynamic shared memory of a block.
    """

    def __init__(
        self, program: Program, counters: NDArray[Any], blocks: int, warps: int, bytes_in_flight: int, shared_bytes: int
    ) -> None:
        self.program, self.counters, self.blocks, self.warps = program, counters, blocks, warps
        self.bytes_in_flight, self.shared_bytes = bytes_in_flight, shared_bytes

    def _sum(self, what: str) -> int:
        return int(self.counters[what].sum())

    @property
    def instructions(self) -> Counter[str]:
        """Warp instructions by opcode."""
        found: Counter[str] = Counter()
        for ins, warps in zip(self.program.kernel.instructions, self.counters["warps"].tolist(), strict=True):
            if warps:
                found[".".join(ins.opcode)] += warps
        return found

    @property
    def classes(self) -> Counter[str]:
        """Warp instructions by class."""
        found: Counter[str] = Counter()
        for ins, warps in zip(self.program.kernel.instructions, self.counters["warps"].tolist(), strict=True):
            if warps:
                found[class_of(ins)] += warps
        return found

    @property
    def warp_instructions(self) -> int:
        return self._sum("warps")

    @property
    def divergence(self) -> float:
        """Fraction of lanes that instructions left idle, by predicate or branch."""
        warps = self._sum("warps")
        return 1 - self._sum("lanes") / (32 * warps) if warps else 0.0

    wavefronts = property(lambda self: self._sum("wavefronts"))
    ideal_wavefronts = property(lambda self: self._sum("ideal"))
    tensor_ops = property(lambda self: self._sum("tensor_ops"))
    sectors = property(lambda self: self._sum("sectors"))
    l2_bytes = property(lambda self: 32 * self._sum("l2_sectors"))
    dram_bytes = property(lambda self: 32 * self._sum("dram_sectors"))

    def lines(self, source: bool = False) -> dict[tuple[str, int], dict[str, int]]:
        """Counters by line: of the PTX text, or with ``source`` of the files that .loc names (compile with -lineinfo)."""
        found: dict[tuple[str, int], NDArray[Any]] = {}
        names = list(self.counters.dtype.names or ())
        table = np.stack([self.counters[n] for n in names], axis=1)
        for ins, row in zip(self.program.kernel.instructions, table, strict=True):
            if not row[0]:
                continue
            key = ("ptx", ins.line)
            if source:
                key = (self.program.kernel.files.get(ins.source[0], "?"), ins.source[1]) if ins.source else ("?", 0)
            found[key] = found.get(key, 0) + row
        return {key: dict(zip(names, row.tolist(), strict=True)) for key, row in found.items()}

    def summary(self) -> dict[str, Any]:
        """The totals as plain numbers, for JSON."""
        totals = {name: self._sum(name) for name in ("tensor_ops", "requests", "sectors", "bytes", "wavefronts")}
        return {
            **totals,
            "blocks": self.blocks,
            "warps": self.warps,
            "shared_bytes": self.shared_bytes,
            "instructions": self.warp_instructions,
            "classes": dict(self.classes),
            "l2_bytes": self.l2_bytes,
            "dram_bytes": self.dram_bytes,
            "ideal_wavefronts": self.ideal_wavefronts,
            "divergence": self.divergence,
            "bytes_in_flight": self.bytes_in_flight,
        }
