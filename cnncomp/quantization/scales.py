"""The choice of scales: by the largest value, or by the least mean squared error.

A scale below the largest value's clips a few values and rounds all others more finely. The least-squares choice among
clipping points is that of Sung et al. ("Resiliency of deep neural networks under quantization", 2015).
"""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("mse", "minmax")
# Steps below this can be taken as zero: the product of two is still a normal float32.
MIN_SCALE = 2.0**-60


def safe_scale(step: Tensor) -> Tensor:
    """``step``, or 1 where it is too small to divide by: all that it would scale is zero."""
    return torch.where(step < MIN_SCALE, torch.ones_like(step), step)


def weight_scales(weight: Tensor, method: str, qmax: int = 127, ratios: int = 25) -> Tensor:
    """One scale per output channel (dimension 0): (K,) float32.

    "minmax": the largest magnitude divided by ``qmax``. "mse": of ``ratios`` fractions of it from 0.52 to 1,
    the one that gives the channel the least squared error.
    """
    w = weight.detach().flatten(1).float()
    largest = w.abs().amax(dim=1)
    if method == "minmax":
        return safe_scale(largest / qmax)
    best = torch.full_like(largest, torch.inf)
    scale = largest / qmax
    for ratio in torch.linspace(1.0, 0.52, ratios).tolist():
        step = safe_scale(largest * ratio / qmax)
        q = (w / step[:, None]).round_().clamp_(-qmax, qmax)
        error = q.mul_(step[:, None]).sub_(w).square_().sum(dim=1)
        scale = torch.where(error < best, step, scale)
        best = torch.minimum(error, best)
    return safe_scale(scale)


class RangeObserver:
    """Collects, batch by batch, what a scale is chosen from: the extremes, and a histogram of the magnitudes.

    The histogram's range doubles when a batch exceeds it, by merging bins in pairs: nothing is lost, and no batch
    has to be kept.

    Args:
        bins: Bins of the histogram; at least half of them are in use.
    """

    def __init__(self, bins: int = 4096) -> None:
        self.lowest = 0.0
        self.largest = 0.0
        self.seen = 0
        self.limit = 0.0
        self.counts = torch.zeros(bins, dtype=torch.float64)

    def update(self, x: Tensor, histogram: bool) -> bool:
        """Take in a float tensor. Returns False, and takes nothing in, if it holds NaN or infinity."""
        if x.numel() == 0:
            return True
        low, high = (v.item() for v in torch.aminmax(x.detach().float()))
        if not (abs(low) < torch.inf and abs(high) < torch.inf):
            return False
        self.seen += x.numel()
        self.lowest = min(self.lowest, low)
        magnitude = max(abs(low), abs(high))
        self.largest = max(self.largest, magnitude)
        if histogram and magnitude > 0:
            self._widen(magnitude)
            bins = self.counts.numel()
            self.counts += torch.histc(x.detach().float().abs(), bins, 0.0, self.limit).double().cpu()
        return True

    def _widen(self, magnitude: float) -> None:
        if self.limit == 0.0:
            self.limit = magnitude
        while self.limit < magnitude:
            merged = self.counts.view(-1, 2).sum(dim=1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.limit *= 2

    @property
    def dtype(self) -> torch.dtype:
        """uint8 where nothing negative was seen."""
        return torch.int8 if self.lowest < 0 else torch.uint8

    def scale(self, method: str, ratios: int = 91) -> float:
        """One step: a float32 value."""
        qmax = 127 if self.dtype == torch.int8 else 255
        step = torch.tensor(self.largest / qmax, dtype=torch.float64)
        if method == "mse" and self.limit > 0:
            step = step * self._best_ratio(qmax, ratios)
        return safe_scale(step.float()).item()

    def _best_ratio(self, qmax: int, ratios: int) -> float:
        """Of ``ratios`` fractions of the largest value, from 1 to 0.1, the one with the least squared error."""
        centre = (torch.arange(self.counts.numel(), dtype=torch.float64) + 0.5) * (self.limit / self.counts.numel())
        centre.clamp_(max=self.largest)
        ratio = torch.linspace(1.0, 0.1, ratios, dtype=torch.float64)
        step = (self.largest * ratio / qmax)[:, None]
        error = (centre / step).round_().clamp_(max=qmax).mul_(step).sub_(centre).square_() @ self.counts
        return ratio[error.argmin()].item()
