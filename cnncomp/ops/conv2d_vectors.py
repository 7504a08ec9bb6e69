"""``cnncomp::conv2d_vectors_int8``, ``linear_vectors_int8`` and ``conv2d_vectors_f16``: weights in runs of 32 outputs, for int8
by 4 inputs, packed by :func:`cnncomp.sparsity.pack_vectors`. On a GPU the input is copied into units of eight images first,
if it does not lie in them. The same with ``_triton`` behind the names are for Triton's kernels, packed by
:func:`cnncomp.sparsity.steps.pack_steps`."""

from __future__ import annotations

from cnncomp.ops.packed import Format, define_conv, define_linear_int8, triton_format
from cnncomp.sparsity import vectors
from cnncomp.sparsity.vectors import check_packed, unpack_vectors

VECTORS = Format("vectors", check_packed, unpack_vectors, vectors)
VECTORS_TRITON = triton_format("vectors", lambda dtype: (vectors.RUN, vectors.columns(dtype)), vectors)

for _fmt in (VECTORS, VECTORS_TRITON):
    define_conv(_fmt, "int8")
    define_conv(_fmt, "f16")
    define_linear_int8(_fmt)
