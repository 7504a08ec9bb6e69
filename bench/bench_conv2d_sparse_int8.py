"""Sparse int8 convolutions of whole networks, layer by layer, against dense int8 on the same weights, and torch's fp32."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from bench import Compare
from bench.layers import ConvShape, random_layer
from cnncomp.dispatch import CONV_CANDIDATES, Candidate

CANDIDATES = [c for c in CONV_CANDIDATES if c.kernel in ("conv2d_sparse_int8", "conv2d_scattered_int8")]


@dataclass(frozen=True)
class Zeros:
    """Fraction of the weights that is zero, in runs of ``run`` input channels."""

    fraction: float
    run: int

    def __str__(self) -> str:
        return f"{'unstructured' if self.run == 1 else f'1x{self.run}'} {self.fraction:.0%}"


@pytest.mark.parametrize("zeros", [Zeros(0.75, 4), Zeros(0.9, 4), Zeros(0.9, 1)], ids=str)
def test_conv2d_sparse_int8(compare_layer: Compare, shape: ConvShape, candidate: Candidate, zeros: Zeros) -> None:
    layer, x = random_layer(shape, zeros=zeros.fraction, quantized=True, run=zeros.run)
    layer.info.pattern = str(zeros)
    compare_layer(candidate.kernel, layer, x, shape, also=("conv2d_int8",))
