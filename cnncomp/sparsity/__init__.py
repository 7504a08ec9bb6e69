"""Formats of sparse weights for the GPU kernels."""

from __future__ import annotations

from cnncomp.sparsity.two_four import pack_2to4, unpack_2to4

__all__ = ["pack_2to4", "unpack_2to4"]
