"""int8 linear: ``out = epilogue(x @ weight.T)``, u8 or s8 activations and s8 weights on the tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cnncomp.kernels.epilogue import store_both
from cnncomp.kernels.launch import Tile, cdiv, choose_tile, device_guard, in_words
from cnncomp.kernels.products import flip_correction, operand


@triton.jit
def gemm_int8_kernel(
    x_ptr, weight_ptr, constants_ptr, residual_ptr, out_ptr, residual_scale, lo, out_factor, m, c, k,
    WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """x (m, c), weight (k, c), out and residual (m, k), all row-major; one program a tile of the output."""
    UNSIGNED: tl.constexpr = x_ptr.dtype.element_ty == tl.uint8
    N: tl.constexpr = BLOCK_N // 2  # columns of a half
    tiles_m = tl.cdiv(m, BLOCK_M)
    row = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, N)
    real, other_real, exists = channel < k, channel + N < k, (row < m)[:, None]
    kk = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row.to(tl.int64)[:, None] * c + kk[None, :]
    weight_at = weight_ptr + channel.to(tl.int64)[None, :] * c + kk[:, None]
    other_at = weight_ptr + (channel + N).to(tl.int64)[None, :] * c + kk[:, None]

    acc = tl.zeros((BLOCK_M, N), dtype=tl.int32)
    other = tl.zeros((BLOCK_M, N), dtype=tl.int32)
    for k0 in range(0, c, BLOCK_K):
        cc = kk < c - k0
        a = operand(tl.load(x_at, mask=exists & cc[None, :], other=0))
        b = tl.load(weight_at, mask=real[None, :] & cc[:, None], other=0)
        b_other = tl.load(other_at, mask=other_real[None, :] & cc[:, None], other=0)
        acc = tl.dot(a, b, acc=acc, out_dtype=tl.int32)
        other = tl.dot(a, b_other, acc=other, out_dtype=tl.int32)
        x_at += BLOCK_K
        weight_at += BLOCK_K
        other_at += BLOCK_K
    acc += flip_correction(weight_ptr, channel, real, c, UNSIGNED, WORDS, N)[None, :]
    other += flip_correction(weight_ptr, channel + N, other_real, c, UNSIGNED, WORDS, N)[None, :]

    store_both(
        acc, other, constants_ptr, residual_ptr, out_ptr, row, channel, exists, real, other_real, k, residual_scale, lo,
        out_factor, N, ACTIVATION,
    )  # fmt: skip


def linear_int8(
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    lo: float,
    out_dtype: torch.dtype,
    activation: str = "",
    out_factor: float = 1.0,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """int8 linear with the fused epilogue. No synchronisation; allocates only the output.

    Args:
        x: (..., C) uint8 or int8.
        weight: (K, C) int8.
        constants: (3, K) float32: scale, bias, hi.
        residual: Shape of the output, uint8, int8, float32, float16 or bfloat16; or None.
        residual_scale: Factor of the residual.
        lo: Lower clamp.
        out_dtype: uint8, int8, float32, float16 or bfloat16.
        activation: "silu", "hardswish" or "".
        out_factor: Behind the activation, before the clamp.
        tile: Overrides the rule that picks one.

    Returns:
        (..., K) of ``out_dtype``, contiguous.
    """
    c, k = x.shape[-1], weight.shape[0]
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty((*x.shape[:-1], k), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    m = out.numel() // k
    residual = None if residual is None else residual.contiguous()
    tile = tile or choose_tile(m, k)
    grid = (cdiv(m, tile.block_m) * cdiv(k, tile.block_n),)
    with device_guard(x):
        gemm_int8_kernel[grid](
            x, weight, constants.contiguous(), residual, out, residual_scale, lo, out_factor, m, c, k,
            ACTIVATION=activation, WORDS=in_words(weight), **tile.meta(), **tile.options(),
        )  # fmt: skip
    return out
