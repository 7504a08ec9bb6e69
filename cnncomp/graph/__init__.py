"""Tracing and fusion: from a module to a graph of fused layers."""

from __future__ import annotations

from cnncomp.graph.fuse import fold_batch_norm
from cnncomp.graph.trace import Traced, clone_for_inference, graph_of, trace

__all__ = ["Traced", "clone_for_inference", "fold_batch_norm", "graph_of", "trace"]
