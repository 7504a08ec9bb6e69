"""Runs a few lines of PTX on small inputs."""

from __future__ import annotations

import numpy as np

from tests.ptx import GlobalMemory, emulate

HEADER = """
.version 8.8
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 d)
{
  .reg .pred %p<8>;
  .reg .b16 %h<8>;
  .reg .b32 %r<100>;
  .reg .f32 %f<8>;
  .reg .f64 %fd<8>;
  .reg .b64 %rd<20>;
  .shared .align 1024 .b8 tile[32768];
  mov.u32 %r0, %tid.x;
  ld.param.u64 %rd0, [a]; ld.param.u64 %rd1, [b]; ld.param.u64 %rd2, [c]; ld.param.u64 %rd3, [d];
  mul.wide.u32 %rd4, %r0, 4;
  add.s64 %rd5, %rd0, %rd4; add.s64 %rd6, %rd1, %rd4; add.s64 %rd7, %rd2, %rd4; add.s64 %rd8, %rd3, %rd4;
"""
N = 64


def run(body, *arrays, block=N, grid=1, outputs=None, **options):
    """Run ``body`` on up to three inputs (at %rd0 to %rd2; this thread's words at %rd5 to %rd7), its output at %rd3 and %rd8.

    Args:
        body: PTX statements.
        arrays: The inputs.
        block, grid: Threads of a block, and blocks.
        outputs: Words of the output; a word of each thread by default.
        options: Of ``emulate``.

    Returns:
        The output as int32, and what was counted.
    """
    memory = GlobalMemory()
    out = np.zeros(outputs or block * grid, np.int32)
    inputs = [*arrays, *[np.zeros(N, np.int32)] * (3 - len(arrays))]
    arguments = [memory.allocate(np.asarray(i)) for i in inputs]
    arguments.append(memory.allocate(out))
    result = emulate(HEADER + body + "\n ret;\n}", grid, block, arguments, memory=memory, **options)
    return memory.fetch(arguments[3], out), result
