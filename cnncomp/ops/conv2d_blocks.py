"""``cnncomp::conv2d_blocks_int8``, ``linear_blocks_int8`` and ``conv2d_blocks_f16``: weights in gathered blocks of 64 outputs
by 16 bytes of inputs, packed by :func:`cnncomp.sparsity.pack_gathered`."""

from __future__ import annotations

from cnncomp.ops.packed import Format, define_conv, define_linear_int8
from cnncomp.sparsity.gathered import check_packed, unpack_gathered

BLOCKS = Format("blocks", check_packed, unpack_gathered)

define_conv(BLOCKS, "int8")
define_conv(BLOCKS, "f16")
define_linear_int8(BLOCKS)
