"""``cnncomp::conv2d_blocks_int8``, ``linear_blocks_int8`` and ``conv2d_blocks_f16``: weights in gathered blocks of 64 outputs
by 16 bytes of inputs, packed by :func:`cnncomp.sparsity.pack_gathered`; and the same with ``_triton`` behind the names, for
Triton's kernels, packed by :func:`cnncomp.sparsity.steps.pack_steps`."""

from __future__ import annotations

from cnncomp.ops.packed import Format, define_conv, define_linear_int8, triton_format
from cnncomp.sparsity.gathered import check_packed, unpack_gathered
from cnncomp.sparsity.weights import CHUNK_BYTES, SLICE

BLOCKS = Format("blocks", check_packed, unpack_gathered)
BLOCKS_TRITON = triton_format("blocks", lambda dtype: (SLICE, CHUNK_BYTES // dtype.itemsize))

for _fmt in (BLOCKS, BLOCKS_TRITON):
    define_conv(_fmt, "int8")
    define_conv(_fmt, "f16")
    define_linear_int8(_fmt)
