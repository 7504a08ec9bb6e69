"""The C++ core between guard pages: no kernel reads or writes outside of its buffers. ``make sanitize`` does more."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cpp.build import build, compiler


@pytest.fixture(scope="module")
def driver() -> Path:
    if compiler() is None:
        pytest.skip("no C++ compiler")
    return build("plain")


@pytest.mark.parametrize("guard", ["after", "before"])
def test_kernels_stay_inside_their_buffers(driver: Path, guard: str) -> None:
    done = subprocess.run([driver, guard, "15", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "checks passed" in done.stdout


def test_a_guard_page_is_noticed(driver: Path) -> None:
    done = subprocess.run([driver, "after", "1", "0", "overrun"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "memory outside of a buffer was touched: overrun" in done.stderr
