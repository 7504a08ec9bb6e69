"""Operators: ``torch.ops.cnncomp.*``, their references and the packed weight formats. Importing registers them."""

from __future__ import annotations

from cnncomp.ops import (
    activate,
    concat,
    conv2d_blocks,
    conv2d_dense,
    conv2d_depthwise,
    conv2d_int8,
    conv2d_sparse,
    conv2d_sparse24,
    conv2d_sparse_int8,
    conv2d_vectors,
    conv2d_vnm,
    linear_dense,
    max_pool2d_int8,
    pool2d,
    quantize,
)
from cnncomp.ops._openmp import attach

attach()

__all__ = [
    "activate",
    "concat",
    "conv2d_blocks",
    "conv2d_dense",
    "conv2d_depthwise",
    "conv2d_int8",
    "conv2d_sparse",
    "conv2d_sparse24",
    "conv2d_sparse_int8",
    "conv2d_vectors",
    "conv2d_vnm",
    "linear_dense",
    "max_pool2d_int8",
    "pool2d",
    "quantize",
]
