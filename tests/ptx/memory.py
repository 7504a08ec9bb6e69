"""Device memory: separate allocations with unmapped space between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.ptx.errors import EmulatorError

Bytes = NDArray[np.uint8]


@dataclass
class Allocation:
    """``host`` holds the bytes at ``base``; ``written`` tells of each whether it holds data, None that all do."""

    base: int
    host: Bytes
    written: NDArray[np.bool_] | None
    keep: Any = None  # what owns the host memory


class GlobalMemory:
    """Device memory; what lies outside of all allocations is a fault, byte for byte."""

    BASE = 0x7F00_0000_0000
    GUARD = 256  # alignment of an allocation, and least distance to the next

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.top = self.BASE
        self._storages: dict[int, tuple[int, Allocation]] = {}

    def _place(self, host: Bytes, offset: int, written: NDArray[np.bool_] | None, keep: Any) -> Allocation:
        one = Allocation(self.top + offset, host, written, keep)
        self.top = -(-(one.base + host.size + self.GUARD) // self.GUARD) * self.GUARD
        self.allocations.append(one)
        return one

    def allocate(self, array: NDArray[Any], misalign: int = 0) -> int:
        """Copy an array to the device, ``misalign`` bytes off an aligned place; its address."""
        raw = np.array(array, copy=True, order="C").reshape(-1).view(np.uint8)
        return self._place(raw, misalign, None, None).base

    def empty(self, size: int) -> int:
        """Memory that nothing was written to: reading it is a fault until the kernel has written it."""
        return self._place(np.full(size, 0xCD, np.uint8), 0, np.zeros(size, bool), None).base

    def pointer(self, tensor: torch.Tensor, written: bool = True) -> int:
        """Address of a CPU tensor, which the kernel then reads and writes in place.

        Tensors of one storage share an allocation, so views keep their distance and alignment.

        Args:
            tensor: On the CPU.
            written: False for an output whose content must not be read before the kernel has written it.
        """
        if tensor.device.type != "cpu":
            raise EmulatorError(f"tensor: got one on {tensor.device}, expected one on the CPU")
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start not in self._storages:
            raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[call-overload]
            one = self._place(raw, 0, None if written else np.zeros(raw.size, bool), tensor)
            self._storages[start] = (start, one)
        return self._storages[start][1].base + tensor.data_ptr() - start

    def fetch(self, address: int, like: NDArray[Any]) -> NDArray[Any]:
        """Copy back an array of ``like``'s shape and dtype."""
        one = next(a for a in self.allocations if a.base <= address < a.base + max(a.host.size, 1))
        start = address - one.base
        return one.host[start : start + like.nbytes].copy().view(like.dtype).reshape(like.shape)
