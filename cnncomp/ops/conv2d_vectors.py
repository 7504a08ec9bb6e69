"""``cnncomp::conv2d_vectors_int8``, ``linear_vectors_int8`` and ``conv2d_vectors_f16``: weights in runs of 32 outputs, for int8
by 4 inputs, packed by :func:`cnncomp.sparsity.pack_vectors`. On a GPU the input is copied into units of eight images first,
if it does not lie in them."""

from __future__ import annotations

from cnncomp.ops.packed import Format, define_conv, define_linear_int8
from cnncomp.sparsity import vectors
from cnncomp.sparsity.vectors import check_packed, unpack_vectors

VECTORS = Format("vectors", check_packed, unpack_vectors, vectors)

define_conv(VECTORS, "int8")
define_conv(VECTORS, "f16")
define_linear_int8(VECTORS)
