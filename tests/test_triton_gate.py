"""The static gate of the Triton kernels: compiled ahead of time, without a GPU."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests import triton_gate as gate

FULL = bool(os.environ.get("CNNCOMP_GPU_FULL"))
#: All kernels for sm_80; for the other ways that Triton takes (wgmma, Blackwell) those that come nearest to the limits.
CHECKED = [
    (variant, arch)
    for variant in gate.variants()
    for arch in gate.ARCHS
    if FULL
    or arch == 80
    or (arch in (90, 120) and ("128x" in variant.name or "flat" in variant.name) and "i8" not in variant.name[-2:])
]


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    """Compile into a folder of this run, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton_gate"))
        yield


@pytest.mark.parametrize("variant, arch", CHECKED, ids=[f"{v.name}-{a}" for v, a in CHECKED])
def test_machine_code(variant, arch):
    row = gate.row(variant.name, arch)
    wrong = gate.problems(variant, arch, row)
    assert not wrong, "\n".join([gate.HEADER, gate.line(row), *wrong])


def test_table_is_the_reviewed_one():
    """``python -m tests.triton_gate`` writes it again; look at the difference before it is committed."""
    reviewed = gate.SNAPSHOT.read_text().splitlines()
    if reviewed[0] != gate.compiler():
        pytest.skip(f"the table is of another compiler: {reviewed[0]}")
    names = {(variant.name, str(arch)) for variant, arch in CHECKED}
    kept = [line for line in reviewed[2:] if tuple(line.split()[:2]) in names]
    now = [gate.line(gate.row(variant.name, arch)) for variant, arch in CHECKED]
    difference = difflib.unified_diff(kept, now, "reviewed", "now", lineterm="", n=0)
    assert now == kept, "\n".join([gate.HEADER, *difference])


LOOP = Counter(IMMA=16, LDSM=8, LDGSTS=4, IADD3=40)
GOOD = gate.Row("gemm_int8_64x64x64_3_u8", "80", 80, 0, 24576, 128, 6, LOOP, LOOP)
BAD = {
    "spills": dict(stack=16),
    "2 STL": dict(opcodes=LOOP + Counter(STL=2)),
    "shared memory": dict(shared=200 << 10),
    "threads on": dict(blocks=1),
    "products": dict(loop=LOOP - Counter(IMMA=16)),
    "plain loads": dict(loop=LOOP + Counter(LDG=4)),
    "asynchronous": dict(loop=LOOP - Counter(LDGSTS=4)),
    "PRMT": dict(loop=LOOP + Counter(PRMT=64)),
    "contracted": dict(opcodes=LOOP + Counter(FFMA=64)),
}


@pytest.mark.parametrize("pattern", BAD)
def test_gate_can_fail(pattern):
    variant = next(v for v in gate.variants() if v.name == GOOD.kernel)
    assert not gate.problems(variant, 80, GOOD)
    assert any(pattern in problem for problem in gate.problems(variant, 80, replace(GOOD, **BAD[pattern])))
