"""CUTLASS's own kernels, as nvcc compiles them, through the emulator with all checks: results exact to the bit.

They are a second source for the emulator: swizzles, fragments and the 2:4 metadata are laid out by NVIDIA's code, not by ours.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn.functional import conv2d

from tests.cuda_emulated import NVCC
from tests.ptx import Checks, GlobalMemory
from tests.ptx.cute import headers

if headers() is None or NVCC is None:
    pytest.skip("nvcc or the extra gpu-lab is not installed", allow_module_level=True)

from bench.cutlass_kernels import Tile, Variant, launch, plan
from bench.peers_cutlass import run_gemm

#: CUTLASS's GEMMs read a step past the last and rows past the end that nothing was copied to, and drop what comes of it.
GEMM_CHECKS = Checks(initialised=False)
FULL = pytest.mark.skipif(not os.environ.get("CNNCOMP_GPU_FULL"), reason="make test-gpu-full")
CONVS = [
    Variant("conv", "int8", Tile(64, 64, 64, 4, 32, 32), "int8", "int32", alpha=2**-7),
    pytest.param(Variant("conv", "int8", Tile(128, 128, 64, 3, 64, 64), "int32", "int32", relu=False), marks=FULL),
    pytest.param(
        Variant("conv", "int8", Tile(64, 64, 64, 2, 32, 32), "int8", "int32", alpha=2**-7, arch="75"), marks=FULL
    ),
    pytest.param(Variant("conv", "fp16", Tile(64, 128, 32, 3, 32, 64), "fp16", "fp32", alignment=8), marks=FULL),
    pytest.param(
        Variant("conv", "fp16", Tile(64, 64, 32, 2, 32, 32), "fp16", "fp32", alignment=8, arch="75"), marks=FULL
    ),
]


def finish(sums: torch.Tensor, variant: Variant, bias: torch.Tensor) -> torch.Tensor:
    """What the epilogue makes of exact sums (double)."""
    if not variant.relu:
        return sums.to(bias.dtype)
    value = (sums * variant.alpha + bias.double()).clamp(min=0)
    return value.round().clamp(max=127).to(torch.int8) if variant.output == "int8" else value.to(torch.float16)


def small(generator: torch.Generator, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Random int8, or fp16 integers whose sums stay exact."""
    most = 128 if dtype == "int8" else 4
    return torch.randint(-most, most, shape, generator=generator).to(torch.int8 if dtype == "int8" else torch.float16)


@pytest.mark.parametrize("variant", CONVS, ids=lambda v: f"{v.name}_{v.arch}")
@pytest.mark.parametrize(
    "n, h, w, c, k, r, s, padding, stride", [(2, 7, 9, 32, 80, 3, 3, 1, 2), (1, 9, 8, 64, 48, 1, 1, 0, 1)]
)
def test_conv(variant, n, h, w, c, k, r, s, padding, stride):
    generator = torch.Generator().manual_seed(k)
    x, weight = small(generator, (n, h, w, c), variant.dtype), small(generator, (k, r, s, c), variant.dtype)
    sums = conv2d(x.permute(0, 3, 1, 2).double(), weight.permute(0, 3, 1, 2).double(), None, stride, padding)
    kind = {"int8": torch.int8, "int32": torch.int32, "fp16": torch.float16}[variant.output]
    bias = torch.randint(-50, 50, (k,), generator=generator).to(kind)
    out = torch.empty(sums.permute(0, 2, 3, 1).shape, dtype=kind)
    memory = GlobalMemory()
    pointers = [memory.pointer(t) for t in (x, weight, bias)] + [memory.pointer(out, written=False)]
    planned = plan(variant, (n, h, w, c, k, r, s, padding, stride, 1), pointers)
    result = launch(variant, planned, memory)
    assert torch.equal(out, finish(sums.permute(0, 2, 3, 1), variant, bias))
    if variant.arch == "80":  # the older ones store to shared memory from registers, with conflicts
        assert result.wavefronts == result.ideal_wavefronts


GEMMS = [
    Variant("gemm", "fp16", Tile(128, 64, 32, 4, 64, 32), "fp16", "fp32", alignment=8),
    pytest.param(Variant("gemm", "int8", Tile(64, 64, 128, 3, 32, 64, 64), "fp16", "int32", relu=False), marks=FULL),
]


@pytest.mark.parametrize("variant", GEMMS, ids=lambda v: v.name)
def test_gemm(variant):
    """The second one's warps share the reduction."""
    m, n, k = 150, 72, 96
    generator = torch.Generator().manual_seed(1)
    a, b = small(generator, (m, k), variant.dtype), small(generator, (n, k), variant.dtype)
    if variant.dtype == "int8":  # so that the sums are exact in fp16
        a, b = a % 4, b % 4
    bias, out = torch.randint(-50, 50, (n,), generator=generator).half(), torch.empty(m, n, dtype=torch.float16)
    memory = GlobalMemory()
    pointers = [memory.pointer(t) for t in (a, b, bias)] + [memory.pointer(out, written=False), 0]
    launch(variant, plan(variant, (m, n, k), pointers), memory, checks=GEMM_CHECKS)
    assert torch.equal(out, finish(a.double() @ b.double().T, variant, bias))


def two_of_four(
    generator: torch.Generator, m: int, k: int, dtype: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random 2:4 matrix, its kept values (m, k/2), and their places in each group of 4 (m, k/2)."""
    places = torch.rand(m, k // 4, 4, generator=generator).topk(2).indices.sort(-1).values
    kept = small(generator, (m, k // 4, 2), dtype)
    dense = torch.zeros(m, k // 4, 4, dtype=kept.dtype).scatter_(2, places, kept)
    return dense.view(m, k), kept.view(m, k // 2), places.view(m, k // 2)


def reordered(places: torch.Tensor, bits: int) -> torch.Tensor:
    """Metadata where CUTLASS's iterators look for it: words of ``bits``, rows interleaved as ldmatrix hands them out, columns
    in pairs, and blocks of 2 by 2 turned (what its sparse examples do on the host before they launch)."""
    m, words = places.shape[0], places.view(places.shape[0], -1, bits // 2)
    values = (words << (2 * torch.arange(bits // 2))).sum(-1)
    group, step = (32, 4) if bits == 16 else (16, 2)
    out = torch.zeros(values.numel(), dtype=torch.int64)
    for row in range(m):
        for column in range(values.shape[1]):
            to_row, to_column = row // group * group + row % 8 * step + row % group // 8, column
            if to_row % 2 != to_column % 2:
                to_row, to_column = to_row // 2 * 2 + to_column % 2, to_column // 2 * 2 + to_row % 2
            out[to_column // 2 * 2 * m + 2 * to_row + to_column % 2] = values[row, column]
    return out


SPARSE = [
    Variant("gemm", "int8", Tile(128, 64, 128, 3, 64, 32), "int8", "int32", alpha=2**-7, sparse=True),
    pytest.param(
        Variant("gemm", "fp16", Tile(128, 64, 64, 3, 64, 32), "fp16", "fp32", alignment=8, sparse=True), marks=FULL
    ),
]


@pytest.mark.parametrize("variant", SPARSE, ids=lambda v: v.name)
def test_sparse_gemm(variant):
    """mma.sp with CUTLASS's metadata."""
    m, n, k = 128, 80, 512
    generator = torch.Generator().manual_seed(2)
    dense, kept, places = two_of_four(generator, m, k, variant.dtype)
    b, bits = small(generator, (n, k), variant.dtype), 32 if variant.dtype == "int8" else 16
    metadata = reordered(places, bits).to(torch.int32 if bits == 32 else torch.int16)
    kind = torch.int8 if variant.output == "int8" else torch.float16
    bias, out = torch.randint(-50, 50, (n,), generator=generator).to(kind), torch.empty(m, n, dtype=kind)
    memory = GlobalMemory()
    pointers = [memory.pointer(t) for t in (kept, b, bias)] + [
        memory.pointer(out, written=False),
        memory.pointer(metadata),
    ]
    result = launch(variant, plan(variant, (m, n, k), pointers), memory, checks=GEMM_CHECKS)
    assert torch.equal(out, finish(dense.double() @ b.double().T, variant, bias))
    counts, launched = run_gemm(variant, m, n, k)
    assert counts.summary() == result.summary(), "values change no count"
    assert launched.least_bytes == kept.nbytes + b.nbytes + bias.nbytes + out.nbytes + metadata.nbytes
