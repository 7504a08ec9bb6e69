"""Benches of cnncomp's kernels; see conftest.py for how they are run."""

from __future__ import annotations

from collections.abc import Callable

#: What times functions and notes the results: the fixtures ``compare`` and ``compare_layer``.
Compare = Callable[..., None]
