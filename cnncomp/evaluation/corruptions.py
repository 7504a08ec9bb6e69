"""Common corruptions of images (Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", 2019), with the strengths of that work's small images (CIFAR-10-C)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cnncomp.errors import ArgumentError

CORRUPTIONS = ("noise", "blur", "contrast")
SEVERITIES = (1, 2, 3, 4, 5)

_NOISE_STD = (0.04, 0.06, 0.08, 0.09, 0.10)
_BLUR_SIGMA = (0.4, 0.6, 0.7, 0.8, 1.0)
_CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)


def corrupt(images: Tensor, kind: str, severity: int = 3, seed: int = 0) -> Tensor:
    """Corrupted copies of images.

    * noise: normal, independent per value, of standard deviation 0.04 to 0.10;
    * blur: Gaussian, σ of 0.4 to 1 pixels, borders repeated;
    * contrast: the distance to the image's mean, per channel, shrunk to 0.75 to 0.15 of it.

    Args:
        images: (N, C, H, W) float, 0 to 1.
        kind: "noise", "blur" or "contrast".
        severity: 1 to 5.
        seed: Of the noise.

    Returns:
        (N, C, H, W), 0 to 1.

    Raises:
        ArgumentError: Another kind or severity, or images that aren't (N, C, H, W) in 0 to 1.
    """
    if severity not in SEVERITIES:
        raise ArgumentError("severity", severity, "1 to 5")
    if images.ndim != 4 or not images.is_floating_point():
        raise ArgumentError("images", f"{images.dtype} of shape {tuple(images.shape)}", "floats (N, C, H, W)")
    if images.numel() and not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise ArgumentError("images", f"values {float(images.min()):.3g} to {float(images.max()):.3g}", "0 to 1")
    if kind == "noise":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(images.shape, generator=generator).to(images) * _NOISE_STD[severity - 1]
        return (images + noise).clamp(0, 1)
    if kind == "blur":
        return _blur(images, _BLUR_SIGMA[severity - 1]).clamp(0, 1)
    if kind == "contrast":
        mean = images.mean((2, 3), keepdim=True)
        return ((images - mean) * _CONTRAST[severity - 1] + mean).clamp(0, 1)
    raise ArgumentError("kind", repr(kind), f"one of {', '.join(CORRUPTIONS)}")


def _blur(images: Tensor, sigma: float) -> Tensor:
    radius = math.ceil(3 * sigma)
    at = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    c = images.shape[1]
    x = F.pad(images, (radius,) * 4, mode="replicate")
    x = F.conv2d(x, kernel.view(1, 1, 1, -1).expand(c, 1, 1, -1), groups=c)
    return F.conv2d(x, kernel.view(1, 1, -1, 1).expand(c, 1, -1, 1), groups=c)
