"""The choice of scales: by the largest value, by percentile, by the least squared error, or by the least KL divergence.

A scale below the largest value's clips a few values and rounds all others more finely. The least-squares choice among
clipping points is that of Sung et al. ("Resiliency of deep neural networks under quantization", 2015), the entropy one
that of Migacz ("8-bit inference with TensorRT", 2017).
"""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("mse", "minmax", "percentile", "entropy")
#: Fraction of the magnitudes that the "percentile" method does not clip.
PERCENTILE = 0.9999
# Steps below this can be taken as zero: the product of two is still a normal float32.
MIN_SCALE = 2.0**-60


def safe_scale(step: Tensor) -> Tensor:
    """``step``, or 1 where it is too small to divide by: all that it would scale is zero."""
    return torch.where(step < MIN_SCALE, torch.ones_like(step), step)


def weight_scales(weight: Tensor, method: str, qmax: int = 127, ratios: int = 25) -> Tensor:
    """One scale per output channel (dimension 0): (K,) float32.

    "minmax": the largest magnitude divided by ``qmax``. Any other: of ``ratios`` fractions of it from 0.52 to 1,
    the one that gives the channel the least squared error. ("percentile" and "entropy" are for the inputs, of which there
    is a distribution; a channel has a handful of weights.)
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
        self.zeros = 0
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
            values = x.detach().float().abs()
            self.counts += torch.histc(values, bins, 0.0, self.limit).double().cpu()
            self.zeros += values.numel() - int(values.count_nonzero())
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

    @property
    def qmax(self) -> int:
        return 127 if self.dtype == torch.int8 else 255

    def scale(self, method: str, ratios: int = 91) -> float:
        """One step: a float32 value. Of ``ratios`` fractions of the largest value, from 1 to 0.1, "mse" and "entropy" take
        the best as the end of the range."""
        limit = self.largest
        if method != "minmax" and self.limit > 0:
            if method == "percentile":
                limit = self._percentile()
            else:
                loss = self._squared_error if method == "mse" else self._divergence
                limits = self.largest * torch.linspace(1.0, 0.1, ratios, dtype=torch.float64)
                limit = min(limits.tolist(), key=loss)
        return safe_scale(torch.tensor(limit / self.qmax, dtype=torch.float64).float()).item()

    def _centres(self) -> Tensor:
        """The magnitude in the middle of each bin."""
        bins = self.counts.numel()
        centre = (torch.arange(bins, dtype=torch.float64) + 0.5) * (self.limit / bins)
        return centre.clamp_(max=self.largest)

    def _percentile(self) -> float:
        """The upper edge of the bin in which the :data:`PERCENTILE` of the magnitudes lies."""
        below = self.counts.cumsum(0)
        index = int((below < PERCENTILE * below[-1]).sum())
        return min(self.largest, (index + 1) * self.limit / self.counts.numel())

    def _squared_error(self, limit: float) -> float:
        """Sum of the squared errors with a range up to ``limit``."""
        centre, step = self._centres(), limit / self.qmax
        error = (centre / step).round_().clamp_(max=self.qmax).mul_(step).sub_(centre).square_()
        return (error @ self.counts).item()

    def _divergence(self, limit: float) -> float:
        """KL divergence from the magnitudes, clipped at ``limit``, to what is left of them after rounding.

        What falls on one level is spread evenly over the bins of that level that are not empty. Zeros are exact at any
        step, and after a ReLU they would outweigh all else: they are left out.
        """
        counts = self.counts.clone()
        counts[0] = (counts[0] - self.zeros).clamp_(min=0)
        centre = self._centres()
        inside = max(1, int((centre <= limit).sum()))
        kept, clipped = counts[:inside], counts[inside:].sum()
        level = (centre[:inside] * (self.qmax / limit)).round_().clamp_(max=self.qmax).long()
        full = (kept > 0).double()
        mass = torch.zeros(self.qmax + 1, dtype=torch.float64).index_add_(0, level, kept)
        width = torch.zeros_like(mass).index_add_(0, level, full)
        rounded = (mass / width.clamp(min=1))[level] * full
        actual = kept.clone()
        actual[-1] += clipped
        actual, rounded = actual / actual.sum(), rounded / rounded.sum().clamp_min(1e-300)
        # A bin that holds nothing but what was clipped into it would make the divergence infinite.
        return torch.special.xlogy(actual, actual / rounded.clamp_min(1e-12)).sum().item()
