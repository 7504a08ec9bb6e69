"""Triton kernels. Importing this package never imports Triton; ask :func:`available` first, then import the kernel's module."""

from __future__ import annotations

import functools
import importlib.util
import re

#: Oldest Triton whose language these kernels are written in.
MINIMUM_VERSION = (3, 0)


@functools.cache
def available() -> bool:
    """Whether a Triton new enough for these kernels can be imported. Looked at when called, never at build time."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        import triton
    except ImportError:
        return False
    numbers = re.findall(r"\d+", triton.__version__)[:2]
    return tuple(map(int, numbers)) >= MINIMUM_VERSION
