"""1xV sparse convolution as a gathered implicit GEMM: runs of V output channels share one list of taps.

The kernel multiplies (V, positions) by (positions, pixels). Images are NCHW, so that neighbouring pixels of a gathered row, and
of the output, lie next to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cnncomp.kernels.epilogue import clamp
from cnncomp.kernels.launch import cdiv, device_guard
from cnncomp.sparsity.blocks import PackedBlocks, pack_blocks


def pack_1xv(weight: Tensor, v: int, groups: int = 1) -> PackedBlocks:
    """Pack a masked weight (K, C/G, R, S), float32 or float16, as :func:`cnncomp.sparsity.pack_blocks` does, in blocks of ``v``
    output channels and one input channel; ``v`` is a power of two, at least 16 (one side of a tensor-core tile)."""
    if v < 16 or v & (v - 1):
        raise ValueError(f"v: got {v}, expected a power of two, at least 16")
    return pack_blocks(weight, v, 1, groups)


@triton.jit
def conv2d_sparse_kernel(
    x_ptr,
    values_ptr,
    positions_ptr,
    block_ptr_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    lo,
    hi,
    m,
    c,
    h,
    w,
    k,
    p,
    q,
    c_group,
    k_group,
    blocks,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    R: tl.constexpr,
    S: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Images NCHW. Grid: (tiles of BLOCK_M pixels, blocks of V channels of all groups)."""
    block = tl.program_id(1)
    group = block // blocks
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    image = row // (p * q)
    pixel = row % (p * q)
    h0 = (pixel // q) * stride_h - pad_h
    w0 = (pixel % q) * stride_w - pad_w
    x_base = x_ptr + (image.to(tl.int64) * c + group * c_group) * h * w + h0 * w + w0
    run = tl.arange(0, V)
    kk = tl.arange(0, BLOCK_K)
    first = tl.load(block_ptr_ptr + block)
    last = tl.load(block_ptr_ptr + block + 1)

    acc = tl.zeros((V, BLOCK_M), dtype=tl.float32)
    for start in range(first, last, BLOCK_K):
        real = start + kk < last
        position = tl.load(positions_ptr + start + kk, mask=real, other=0)
        tap = position % (R * S)
        dh = (tap // S) * dil_h
        dw = (tap % S) * dil_w
        x_offset = (position // (R * S)) * (h * w) + dh * w + dw
        hi_in = h0[None, :] + dh[:, None]
        wi_in = w0[None, :] + dw[:, None]
        inside = (row < m)[None, :] & (hi_in >= 0) & (hi_in < h) & (wi_in >= 0) & (wi_in < w)
        a_offset = (start + kk).to(tl.int64)[None, :] * V + run[:, None]
        a = tl.load(values_ptr + a_offset, mask=real[None, :], other=0.0)
        b = tl.load(x_base[None, :] + x_offset[:, None], mask=inside & real[:, None], other=0.0)
        acc = tl.dot(a, b, acc=acc, input_precision=PRECISION)

    column = (block % blocks) * V + run
    channel = group * k_group + column
    mask = (column < k_group)[:, None] & (row < m)[None, :]
    offset = (image.to(tl.int64) * k * p * q + pixel)[None, :] + channel.to(tl.int64)[:, None] * (p * q)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=column < k_group, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, clamp(acc, lo, hi).to(out_ptr.dtype.element_ty), mask=mask)


def conv2d_sparse(
    x: Tensor,
    packed: PackedBlocks,
    out_channels: int,
    kernel_size: Sequence[int],
    bias: Tensor | None,
    residual: Tensor | None,
    lo: float,
    hi: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    precision: str = "ieee",
) -> Tensor:
    """``clamp(conv2d(x, weight) + bias + residual, lo, hi)`` with a 1xV sparse weight, accumulated in fp32.

    Args:
        x: (N, C, H, W) float32 or float16, as the packed values are; contiguous, or it is copied.
        packed: From :func:`pack_1xv`.
        out_channels: K.
        kernel_size, stride, padding, dilation: (vertical, horizontal).
        bias: (K,) or None.
        residual: Shape of the output, or None.
        lo, hi: Clamp; infinities for none.
        groups: G.
        precision: For float32: "ieee", or "tf32x3" and "tf32" on the tensor cores of sm_80 and later.

    Returns:
        (N, K, P, Q) of x's dtype, contiguous.
    """
    n, c, h, w = x.shape
    (r, s), k, v = kernel_size, out_channels, packed.values.shape[1]
    p = (h + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
    q = (w + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
    out = torch.empty((n, k, p, q), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    m, k_group = n * p * q, k // groups
    blocks = cdiv(k_group, v)
    block_m = 64 if m > 64 * 32 else 32
    with device_guard(x):
        conv2d_sparse_kernel[(cdiv(m, block_m), groups * blocks)](
            x.contiguous(), *packed, bias, None if residual is None else residual.contiguous(), out, lo, hi,
            m, c, h, w, k, p, q, c // groups, k_group, blocks, *stride, *padding, *dilation,
            R=r, S=s, V=v, BLOCK_M=block_m, BLOCK_K=32, PRECISION=precision,
            num_warps=4, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
    return out
