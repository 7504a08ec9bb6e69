"""``cnncomp::linear_dense``: fp32 linear on few rows."""

from __future__ import annotations

from torch import Tensor

from cnncomp.errors import ArgumentError
from cnncomp.ops.library import check_float32, check_residual, check_vector, contiguous, define, num_threads, pointer

SCHEMA = "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float lo, float hi) -> Tensor"


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, lo: float, hi: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, lo: float, hi: float
) -> Tensor:
    from cnncomp import _cpu

    check_float32(x, weight=weight, bias=bias, residual=residual)
    k, c = weight.shape
    if x.shape[-1] != c:
        raise ArgumentError("x", f"shape {tuple(x.shape)}", f"{c} channels, as the weight has")
    out = _fake(x, weight, bias, residual, lo, hi)
    check_residual(residual, out.shape)
    check_vector("bias", bias, k)
    if out.numel() == 0:
        return out
    x, weight = x.contiguous(), weight.contiguous()
    residual = contiguous(residual)
    _cpu.linear_dense(
        x.data_ptr(), out.numel() // k, c, weight.data_ptr(), k, pointer(bias), pointer(residual), lo, hi, out.data_ptr(),
        num_threads(),
    )  # fmt: skip
    return out


define("linear_dense", SCHEMA, _fake, _linear_cpu)
