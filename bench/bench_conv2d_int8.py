"""8-bit convolutions of whole networks, layer by layer, against torch's fp32 ones."""

from __future__ import annotations

from bench import Compare
from bench.layers import ConvShape, random_layer
from cnncomp.dispatch import CONV_CANDIDATES, Candidate

CANDIDATES = [c for c in CONV_CANDIDATES if c.kernel == "conv2d_int8"]


def test_conv2d_int8(compare_layer: Compare, shape: ConvShape, candidate: Candidate) -> None:
    compare_layer(candidate.kernel, *random_layer(shape, quantized=True), shape)
