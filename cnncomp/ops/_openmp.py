"""Finds torch's OpenMP runtime, so that our kernels run on its threads and bring no pool of their own."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

_ENTRY_POINTS = ("GOMP_parallel", "omp_in_parallel", "omp_get_thread_num")
_LIBRARIES = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}


def attach() -> bool:
    """Hand the runtime's entry points to cnncomp._cpu. False if torch has none; kernels then run on one thread."""
    from cnncomp import _cpu

    library = Path(torch.__file__).parent / "lib" / _LIBRARIES.get(sys.platform, "libtorch_cpu.so")
    try:
        # Symbols are looked up in the library's dependencies too, and there is the runtime that torch itself uses.
        # (LLVM's runtime offers GOMP_parallel as well.)
        handle = ctypes.CDLL(str(library))
        entry_points = [getattr(handle, name) for name in _ENTRY_POINTS]
    except (OSError, AttributeError):
        return False
    addresses = [ctypes.cast(f, ctypes.c_void_p).value or 0 for f in entry_points]
    if not all(addresses):
        return False
    _cpu.set_openmp(*addresses)
    return True
