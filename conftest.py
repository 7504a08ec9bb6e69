"""For tests and benches: they test the cnncomp that is installed, and the quick ones come first."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# `tests` and `bench` are found here; that cnncomp is still found where it is installed is seen to by `bench`.
sys.path.append(str(Path(__file__).resolve().parent))
import bench  # noqa: F401

#: Files that take long, the longest last; a failure elsewhere shows before them.
SLOW = (
    "test_conv2d_sparse_cpu_kernels",
    "test_demo",
    "test_cli",
    "test_bench",
    "test_cuda_launch",
    "test_triton_kernels",
    "test_cuda_kernels",
)


def pytest_report_header() -> str:
    import cnncomp

    return f"cnncomp {cnncomp.__version__} from {Path(cnncomp.__file__).parent}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.stem) + 1 if item.path.stem in SLOW else 0)
