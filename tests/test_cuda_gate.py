"""The static gate: every shipped CUDA kernel, for every architecture, without a GPU."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import replace

import pytest

from tests import cuda_emulated as emulated
from tests import cuda_gate as gate

pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")


@pytest.mark.parametrize("kernel, arch", [(k, arch) for k in emulated.KERNELS for arch in gate.archs_of(k)])
def test_machine_code(kernel, arch):
    rows = gate.rows(kernel, arch)
    assert rows
    wrong = [f"{gate.HEADER}\n{row}\n{problem}" for row in rows for problem in gate.problems(row)]
    assert not wrong, "\n".join(wrong)


LOOP = Counter(IMMA=16, LDSM=8, LDGSTS=4, IADD3=40)
GOOD = gate.Row("gemm_int8 64 64 32 32 2 3 0", "80", 80, 0, 49152, 128, 3, LOOP, LOOP)
BAD = {
    "spills": dict(stack=16),
    "2 STL": dict(opcodes=LOOP + Counter(STL=2)),
    "four parts": dict(threads=32),
    "0 MMA": dict(loop=LOOP - Counter(IMMA=16)),
    "plain loads": dict(loop=LOOP + Counter(LDG=4)),
    "asynchronous": dict(loop=LOOP - Counter(LDGSTS=4)),
    "PRMT": dict(loop=LOOP + Counter(PRMT=64)),
    "0 IGMMA, 16 other": dict(arch="90a"),
    "8 LDSM": dict(arch="90a", loop=LOOP - Counter(IMMA=16) + Counter(IGMMA=4)),
}


@pytest.mark.parametrize("pattern", BAD)
def test_gate_can_fail(pattern):
    assert not gate.problems(GOOD)
    assert any(pattern in problem for problem in gate.problems(replace(GOOD, **BAD[pattern])))


def test_main_loop_is_the_innermost_one_with_tensor_cores():
    line = "        /*{:04x}*/                   {} ;\n"
    sass = (
        ".L_x_0:\n"
        + line.format(0, "IADD3 R1, R1, R2, RZ")
        + ".L_x_1:\n"
        + line.format(16, "@P0 IMMA.16832.S8.S8 R0, R1")
    )
    sass += line.format(32, "@!P0 BRA `(.L_x_1)") + ".L_x_2:\n" + line.format(48, "LDL R0, [R1]")
    sass += line.format(64, "BRA `(.L_x_2)") + line.format(80, "BRA `(.L_x_0)")
    assert gate.main_loop(sass) == Counter(IMMA=1, BRA=1)


def test_table_is_the_reviewed_one():
    """``python -m tests.cuda_gate`` writes it again; look at the difference before it is committed."""
    reviewed = gate.SNAPSHOT.read_text()
    if reviewed.splitlines()[0] != gate.compiler():
        pytest.skip(f"the table is of another compiler: {reviewed.splitlines()[0]}")
    now = gate.table()
    difference = difflib.unified_diff(reviewed.splitlines(), now.splitlines(), "reviewed", "now", lineterm="", n=0)
    assert now == reviewed, "\n".join(difference)
