"""Where the tensors of a recorded network lie: their lives, their places in one arena, and room between their channels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cnncomp._cpu import Program

ALIGN = 64
_LANES = 16  # floats of the widest vector


@dataclass
class Buffer:
    """A stretch of memory that tensors of the network lie in. ``begin``, ``end``: its addresses while recording; ``born``,
    ``dies``: positions of the nodes that fill it and that read it last; ``slot`` and ``offset``: where it lies when run."""

    begin: int
    end: int
    born: int
    dies: int
    ours: bool
    image: tuple[int, ...] | None = None  # shape (N, C, H, W), of float32 images without gaps
    slot: int = -1
    offset: int = 0
    pitch: int = 0  # floats from one channel to the next when run; 0: as while recording
    holders: int = 0  # nodes with a value in it that is still to be read
    over: Buffer | None = None  # where it may lie, if that one dies when this one is born

    def root(self) -> Buffer:
        return self if self.over is None else self.over.root()

    @property
    def nbytes(self) -> int:
        """What it takes when run."""
        if not self.pitch:
            return self.end - self.begin
        assert self.image is not None
        return math.prod(self.image[:2]) * self.pitch * 4


class Pointer(NamedTuple):
    """An operand of a step of the program: ``offset`` bytes from where a buffer begins."""

    step: int
    which: int
    buffer: Buffer
    offset: int


def _wide(buffer: Buffer) -> int:
    """Floats from channel to channel that let each begin on a cache line; 0 where they do so already, or where it would take
    more than half as much again."""
    if buffer.image is None or buffer.image[0] != 1:
        return 0
    pixels = buffer.image[2] * buffer.image[3]
    pitch = -(-pixels // _LANES) * _LANES
    return pitch if pixels < pitch <= 3 * pixels // 2 else 0


def widen(program: Program, pointers: Sequence[Pointer], seen: Iterable[Buffer]) -> None:
    """Leave room behind the channels of images whose size is no multiple of a vector's, such as 14 x 14.

    Their kernels then read pixels where they lie, without a copy that is aligned, and write whole vectors.

    Args:
        program: The recorded kernels. Those that allow it are told how far channels lie apart.
        pointers: All their operands that lie in buffers.
        seen: Buffers that others than the kernels look into: they stay as they are.
    """
    fixed = {id(b) for b in seen}
    # A kernel has its residual, the operand before its output, laid out like that one.
    outputs = {p.step: p for p in pointers if p.which == len(program.addresses(p.step)) - 1}
    pairs = [(p.buffer, outputs[p.step].buffer) for p in pointers if p.which and p.which + 1 == outputs[p.step].which]
    fixed.update(id(p.buffer) for p in pointers if p.offset or not program.takes_pitch(p.step, p.which))
    buffers = {id(p.buffer): p.buffer for p in pointers}
    fixed.update(key for key, b in buffers.items() if not _wide(b))
    while more := {id(b) for pair in pairs for b in pair if fixed & set(map(id, pair))} - fixed:
        fixed |= more
    for key, buffer in buffers.items():
        buffer.pitch = 0 if key in fixed else _wide(buffer)
    for p in pointers:
        if p.buffer.pitch:
            program.set_pitch(p.step, p.which, p.buffer.pitch)


def merged(buffers: list[Buffer]) -> list[Buffer]:
    """The buffers that need places of their own: others lie where one lies that they succeed."""
    for b in buffers:
        if (over := b.over) is None:
            continue
        if over.dies != b.born or over.nbytes != b.nbytes or not any(over is other for other in buffers):
            b.over = None
    for b in buffers:
        root = b.root()
        root.dies = max(root.dies, b.dies)
    return [b for b in buffers if b.over is None]


def place(buffers: Iterable[Buffer]) -> int:
    """Give buffers offsets such that those that live at the same time don't overlap; the bytes needed in all."""
    placed: list[Buffer] = []
    total = 0
    for buffer in sorted(buffers, key=lambda b: -b.nbytes):
        size, offset = buffer.nbytes, 0
        for other in sorted(placed, key=lambda b: b.offset):
            if other.born > buffer.dies or buffer.born > other.dies:
                continue
            if other.offset >= offset + size:
                break
            offset = max(offset, -(-(other.offset + other.nbytes) // ALIGN) * ALIGN)
        buffer.offset = offset
        placed.append(buffer)
        total = max(total, offset + size)
    return total
