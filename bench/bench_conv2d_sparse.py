"""Sparse fp32 convolutions of whole networks, layer by layer, 90 % of the weights zero, against torch's dense ones."""

from __future__ import annotations

from bench import Compare
from bench.layers import ConvShape, random_layer
from cnncomp.dispatch import CONV_CANDIDATES, Candidate
from cnncomp.dispatch.candidates import Q8

CANDIDATES = [c for c in CONV_CANDIDATES if not c.dense and c.takes != Q8]
SPARSITY = 0.9


def test_conv2d_sparse(compare_layer: Compare, shape: ConvShape, candidate: Candidate) -> None:
    layer, x = random_layer(shape, zeros=SPARSITY)
    layer.info.pattern = f"unstructured {SPARSITY:.0%}"
    compare_layer(candidate.kernel, layer, x, shape)
