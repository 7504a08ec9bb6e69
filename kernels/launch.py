"""What the launchers share: tile choice, device guard, launch options."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Tile of a GEMM-shaped kernel: BLOCK_M x BLOCK_N outputs, BLOCK_K products a step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def meta(self) -> dict[str, int]:
        """The kernel's constexpr arguments."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    def options(self) -> dict[str, Any]:
        """Compiler options. Without fp fusion each step of the epilogue is rounded on its own."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


#: Tiles that compile without spills for sm_80, sm_90 and sm_120; of 128 x 128 with four warps that is not so.
SMALL = Tile(32, 32, 64, 2, 4)
MEDIUM = Tile(64, 64, 64, 4, 3)
LARGE = Tile(128, 64, 64, 4, 3)
WIDE = Tile(128, 128, 64, 8, 3)
TILES = (SMALL, MEDIUM, LARGE, WIDE)

#: Tiles wanted before a larger one is taken: enough to occupy a large GPU once. A rule, not a measurement.
ENOUGH_TILES = 128


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def in_words(weight: Tensor) -> bool:
    """Whether each output channel's int8 weights, contiguous, start at a multiple of four bytes and are a multiple of four."""
    return weight.numel() // weight.shape[0] % 4 == 0 and weight.data_ptr() % 4 == 0


def choose_tile(m: int, k: int) -> Tile:
    """Largest tile that fits in an (m, k) output and still gives ENOUGH_TILES of them."""
    for tile in (WIDE, LARGE, MEDIUM):
        fits = k > tile.block_n // 2
        if fits and cdiv(m, tile.block_m) * cdiv(k, tile.block_n) >= ENOUGH_TILES:
            return tile
    return SMALL


def device_guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make x's device current for a launch; CPU tensors (Triton's interpreter) need nothing."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
