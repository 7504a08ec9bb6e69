"""What the tests of the fp32 CPU kernels share: every instruction set in turn, guarded memory, one tolerance.

Tolerance: each output within 1e-5 of the sum of the magnitudes that went into it, |w| * |x| + |bias| + |residual|.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from cnncomp.ops import _openmp

TOLERANCE = 1e-5
LANES = (4, 8, 16)

_openmp.attach()


@pytest.fixture(autouse=True, scope="module")
def one_thread_for_references() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def address(a: Tensor | np.ndarray | None) -> int:
    return 0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a.ctypes.data


def assert_within(got: Tensor, expected: Tensor, size: Tensor, what: object) -> None:
    excess = (got.double() - expected).abs() - TOLERANCE * size
    bad = ~(excess <= 0)
    if bad.any():
        i = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(f"{what}: {int(bad.sum())} wrong, first at {i}: got {got[i]}, expected {expected[i]}")


class Guarded:
    """Copies of arrays that end, or begin, where memory that cannot be touched begins, or ends."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.maps: list[mmap.mmap] = []

    def __call__(self, array: np.ndarray) -> np.ndarray:
        page = mmap.PAGESIZE
        inside = -(-max(array.nbytes, 1) // page) * page
        memory = mmap.mmap(-1, inside + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        mprotect = ctypes.CDLL(None, use_errno=True).mprotect
        mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for guard in (start, start + page + inside):
            assert mprotect(guard, page, 0) == 0
        self.maps.append(memory)
        offset = page + (inside - array.nbytes if self.at_end else 0)
        copy = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
        copy[...] = array
        return copy
