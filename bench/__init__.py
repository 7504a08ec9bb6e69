"""Benches of cnncomp's kernels; see conftest.py for how they are run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

# `tests` and `bench` are packages in the folder above, and so is the source of cnncomp, which may hold no compiled modules. At
# the end of the path, the first two are found there and cnncomp where it is installed.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p).resolve() != _ROOT] + [str(_ROOT)]

#: What times functions and notes the results: the fixtures ``compare`` and ``compare_layer``.
Compare = Callable[..., None]
