"""Giving memory back to the system, where it is known how (Linux). Nothing else depends on it."""

from __future__ import annotations

import ctypes
import mmap
import sys

_MADV_DONTNEED = 4
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def trim_heap() -> None:
    """Give back what has been freed: glibc keeps it, after unpacking a file more than the model itself takes."""
    if _LIBC is not None and hasattr(_LIBC, "malloc_trim"):  # musl has none
        _LIBC.malloc_trim(0)


def forget(begin: int, end: int) -> None:
    """Give back the whole pages in [begin, end), private memory whose contents nobody reads again. The addresses stay taken;
    what is written there later stays, too."""
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if _LIBC is not None and first < last:
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)
