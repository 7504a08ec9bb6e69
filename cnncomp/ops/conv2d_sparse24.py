"""``cnncomp::conv2d_sparse24_int8``, ``linear_sparse24_int8`` and ``conv2d_sparse24_f16``: 2:4 sparse weights, packed by
:func:`cnncomp.sparsity.pack_2to4`."""

from __future__ import annotations

from cnncomp.ops.packed import Format, define_conv, define_linear_int8
from cnncomp.sparsity.two_four import check_packed, unpack_2to4

SPARSE24 = Format("sparse24", check_packed, unpack_2to4)

define_conv(SPARSE24, "int8")
define_conv(SPARSE24, "f16")
define_linear_int8(SPARSE24)
