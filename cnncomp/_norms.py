"""BatchNorm as what it is in inference: an affine map of each channel, which the layer before it can take over."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


def fold_batch_norm(weight: Tensor, bias: Tensor | None, norm: BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Fold eval-mode BatchNorm: returns (weight, bias, factor (K,)), ``factor`` = gamma / sqrt(var + eps)."""
    assert norm.running_mean is not None and norm.running_var is not None
    gamma = norm.weight if norm.weight is not None else torch.ones_like(norm.running_mean)
    beta = norm.bias if norm.bias is not None else torch.zeros_like(norm.running_mean)
    factor = gamma.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    start = torch.zeros_like(factor) if bias is None else bias.double()
    folded = weight.double() * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return folded.float(), ((start - norm.running_mean.double()) * factor + beta.double()).float(), factor.float()
