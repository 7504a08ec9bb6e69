"""Formats of sparse weights for the GPU kernels, and which of them a weight has the pattern for."""

from __future__ import annotations

from cnncomp.sparsity.bitmap import PackedBitmap, pack_bitmap, unpack_bitmap
from cnncomp.sparsity.blocks import PackedBlocks, pack_blocks, unpack_blocks
from cnncomp.sparsity.fit import PATTERNS, Fit, fits
from cnncomp.sparsity.gathered import pack_gathered, unpack_gathered
from cnncomp.sparsity.two_four import pack_2to4, unpack_2to4
from cnncomp.sparsity.vectors import pack_vectors, unpack_vectors
from cnncomp.sparsity.vnm import pack_vnm, unpack_vnm

__all__ = [
    "PATTERNS",
    "Fit",
    "PackedBitmap",
    "PackedBlocks",
    "fits",
    "pack_2to4",
    "pack_bitmap",
    "pack_blocks",
    "pack_gathered",
    "pack_vectors",
    "pack_vnm",
    "unpack_2to4",
    "unpack_bitmap",
    "unpack_blocks",
    "unpack_gathered",
    "unpack_vectors",
    "unpack_vnm",
]
