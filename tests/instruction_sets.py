"""The instruction sets that the CPU kernels are compiled for, in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from cnncomp import _cpu

#: Those of this machine; of the fp32 kernels there are fewer.
ISAS = _cpu.isa_available()
FLOAT_ISAS = [name for name in ISAS if name in ("baseline", "avx2", "avx512")]


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[str]:
    """Kernels run on this one."""
    before = _cpu.isa()
    _cpu.set_isa(name)
    try:
        yield name
    finally:
        _cpu.set_isa(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with instruction_set(request.param) as name:
        yield name


@pytest.fixture(params=FLOAT_ISAS, name="isa")
def float_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with instruction_set(request.param) as name:
        yield name
