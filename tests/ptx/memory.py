"""Global and shared memory with checks of bounds, alignment and races."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.errors import MemoryFault, RaceError

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]


def byte_offsets(addresses: Ints, size: int) -> Ints:
    """(lanes, size) offsets of the bytes of accesses of ``size`` bytes."""
    return addresses[:, None] + np.arange(size)


class GlobalMemory:
    """Device memory of separate allocations with unmapped space between them: what lies outside of all is a fault."""

    BASE = 0x7F00_0000_0000
    GUARD = 256  # alignment of an allocation, and least distance to the next

    def __init__(self, capacity: int = 1 << 24) -> None:
        self.data = np.zeros(capacity, np.uint8)
        self.mapped = np.zeros(capacity, bool)
        self.top = self.GUARD

    def allocate(self, array: NDArray[Any], misalign: int = 0) -> int:
        """Copy an array to the device, ``misalign`` bytes off an aligned place; its address."""
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start = self.top + misalign
        end = start + raw.size
        if end > self.data.size:
            raise MemoryFault(f"{end} bytes of device memory wanted, there are {self.data.size}")
        self.data[start:end] = raw
        self.mapped[start:end] = True
        self.top = -(-(end + self.GUARD) // self.GUARD) * self.GUARD
        return self.BASE + start

    def fetch(self, address: int, like: NDArray[Any]) -> NDArray[Any]:
        """Copy back an array of ``like``'s shape and dtype."""
        start = address - self.BASE
        return self.data[start : start + like.nbytes].copy().view(like.dtype).reshape(like.shape)

    def _offsets(self, addresses: Ints, size: int) -> Ints:
        at = addresses - self.BASE
        if at.size == 0:
            return byte_offsets(at, size)
        if at.min() < 0 or at.max() + size > self.data.size:
            raise MemoryFault(f"global access of {size} bytes far outside of all allocations")
        if (addresses % size).any():
            raise MemoryFault(f"global access of {size} bytes at a misaligned address")
        offsets = byte_offsets(at, size)
        if not self.mapped[offsets].all():
            lane = int(np.flatnonzero(~self.mapped[offsets].all(1))[0])
            raise MemoryFault(f"global access of {size} bytes out of bounds (active lane {lane})")
        return offsets

    def load(self, addresses: Ints, size: int) -> Bytes:
        """(lanes, size) bytes."""
        return self.data[self._offsets(addresses, size)]

    def store(self, addresses: Ints, values: Bytes) -> None:
        self.data[self._offsets(addresses, values.shape[1])] = values


@dataclass
class _AsyncCopy:
    """A cp.async under way: one entry per lane that issued it."""

    lanes: Ints
    group: Ints
    words: Ints
    offsets: Ints
    values: Bytes


class SharedMemory:
    """Shared memory of all thread blocks, and a record per 4-byte word of who touched it since the block's last barrier.

    A race is a word that two warps touch in one interval between barriers, one of them writing. Lanes of one warp are taken to
    run in step. A narrower store counts for its whole word, so neighbours' bytes in one word would be reported too.
    An asynchronous copy lands as late as it may, when its thread waits for it; touching its words before is a race.
    """

    def __init__(self, blocks: int, size: int, lanes: int, check_initialised: bool = True) -> None:
        self.size = -(-size // 16) * 16
        self.data = np.zeros(blocks * self.size, np.uint8)
        words = self.data.size // 4
        self.initialised = np.full(words, not check_initialised)
        self.epoch = np.ones(blocks, np.int64)  # barriers passed by each block
        self.write_epoch, self.writer = np.zeros(words, np.int64), np.zeros(words, np.int64)
        self.read_epoch, self.reader = np.zeros(words, np.int64), np.zeros(words, np.int64)
        self.pending = np.zeros(words, np.int64)
        self.copies: list[_AsyncCopy] = []
        self.committed = np.zeros(lanes, np.int64)

    def _offsets(self, addresses: Ints, blocks: Ints, size: int) -> Ints:
        if addresses.size and (addresses.min() < 0 or addresses.max() + size > self.size):
            raise MemoryFault(f"shared access of {size} bytes out of bounds: {addresses.max()} of {self.size}")
        if (addresses % size).any():
            raise MemoryFault(f"shared access of {size} bytes at a misaligned address")
        return byte_offsets(addresses + blocks * self.size, size)

    def _words(self, offsets: Ints, warps: Ints) -> tuple[Ints, Ints, Ints]:
        """Words touched, and the warp and the epoch of each."""
        words = offsets[:, ::4] // 4
        epochs = self.epoch[words * 4 // self.size]
        return words.ravel(), np.repeat(warps, words.shape[1]), epochs.ravel()

    def load(self, addresses: Ints, blocks: Ints, warps: Ints, size: int) -> Bytes:
        """(lanes, size) bytes. ``blocks`` and ``warps`` number each lane's thread block and warp."""
        offsets = self._offsets(addresses, blocks, size)
        words, by, epochs = self._words(offsets, warps)
        if self.pending[words].any():
            raise RaceError("shared memory read while an asynchronous copy to it is under way")
        if ((self.write_epoch[words] == epochs) & (self.writer[words] != by)).any():
            raise RaceError("shared memory read that another warp has written since the last barrier")
        if not self.initialised[words].all():
            raise MemoryFault("shared memory read that nothing was written to")
        others = (self.read_epoch[words] == epochs) & (self.reader[words] != by)
        self.reader[words] = np.where(others, -1, by)
        self.reader[words[self.reader[words] != np.where(others, -1, by)]] = -1  # several warps in this very access
        self.read_epoch[words] = epochs
        return self.data[offsets]

    def _claim(self, words: Ints, by: Ints, epochs: Ints) -> None:
        """Check that warps ``by`` may write ``words``."""
        if self.pending[words].any():
            raise RaceError("shared memory written while an asynchronous copy to it is under way")
        if ((self.write_epoch[words] == epochs) & (self.writer[words] != by)).any():
            raise RaceError("shared memory written by two warps with no barrier between")
        if ((self.read_epoch[words] == epochs) & (self.reader[words] != by)).any():
            raise RaceError("shared memory overwritten that another warp has read since the last barrier")

    def store(self, addresses: Ints, blocks: Ints, warps: Ints, values: Bytes) -> None:
        offsets = self._offsets(addresses, blocks, values.shape[1])
        words, by, epochs = self._words(offsets, warps)
        self._claim(words, by, epochs)
        self.write_epoch[words], self.writer[words], self.initialised[words] = epochs, by, True
        self.data[offsets] = values

    def copy_async(self, addresses: Ints, blocks: Ints, warps: Ints, lanes: Ints, values: Bytes) -> None:
        """Start a copy that lands when its lanes wait for it."""
        offsets = self._offsets(addresses, blocks, values.shape[1])
        words, by, epochs = self._words(offsets, warps)
        self._claim(words, by, epochs)
        self.pending[words] += 1
        # Counts as written by its warp from here on, so that another's access before the barrier is a race as well.
        self.write_epoch[words], self.writer[words] = epochs, by
        per_lane = words.reshape(len(lanes), -1)
        self.copies.append(_AsyncCopy(lanes, self.committed[lanes], per_lane, offsets, values))

    def commit(self, lanes: Ints) -> None:
        """Close the current group of copies of these lanes."""
        self.committed[lanes] += 1

    def wait(self, lanes: Ints, keep: int) -> None:
        """Land all but the ``keep`` latest committed groups of these lanes."""
        waiting = np.zeros(self.committed.size, bool)
        waiting[lanes] = True
        remaining = []
        for copy in self.copies:
            done = waiting[copy.lanes] & (copy.group < self.committed[copy.lanes] - keep)
            self.data[copy.offsets[done]] = copy.values[done]
            words = copy.words[done]
            self.pending[words] -= 1
            self.initialised[words] = True
            self.write_epoch[words] = self.epoch[words * 4 // self.size]
            if not done.all():
                left = ~done
                kept = (copy.lanes[left], copy.group[left], copy.words[left], copy.offsets[left], copy.values[left])
                remaining.append(_AsyncCopy(*kept))
        self.copies = remaining
