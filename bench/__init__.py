"""Benches of cnncomp's kernels; see conftest.py for how they are run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

# Benches take the cnncomp that is installed: its source beside this folder, which python -m finds first, may hold no compiled
# modules.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p).resolve() != _ROOT] + [str(_ROOT)]

#: What times functions and notes the results: the fixtures ``compare`` and ``compare_layer``.
Compare = Callable[..., None]
