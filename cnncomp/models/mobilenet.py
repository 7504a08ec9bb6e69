"""MobileNetV2 (Sandler et al., "Inverted Residuals and Linear Bottlenecks", 2018), torchvision's names."""

from __future__ import annotations

from torch import Tensor, nn

from cnncomp.errors import ArgumentError
from cnncomp.models.init import init_weights

# Stages as in table 2 of the paper: expansion, output channels, blocks, stride of the first block.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def round_channels(c: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``c``, but never less than ``divisor`` or 90 % of ``c``."""
    rounded = max(divisor, int(c + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * c else rounded


class ConvBNReLU6(nn.Sequential):
    """Convolution with "same" padding, BatchNorm, ReLU6."""

    def __init__(self, c: int, k: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(c, k, kernel_size, stride, (kernel_size - 1) // 2, groups=groups, bias=False),
            nn.BatchNorm2d(k),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """1×1 up by ``expansion``, depthwise 3×3, linear 1×1 down; a shortcut where the shapes allow it."""

    def __init__(self, c: int, k: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.use_shortcut = stride == 1 and c == k
        hidden = round(c * expansion)
        expand = [ConvBNReLU6(c, hidden, 1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            ConvBNReLU6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, k, 1, bias=False),
            nn.BatchNorm2d(k),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2.

    Args:
        num_classes: Outputs of the classifier.
        width_mult: Factor on all numbers of channels.

    Raises:
        ArgumentError: ``width_mult`` is not above 0.
    """

    def __init__(self, num_classes: int = 1000, width_mult: float = 1.0) -> None:
        super().__init__()
        if not width_mult > 0:
            raise ArgumentError("width_mult", width_mult, "a number above 0")
        c = round_channels(32 * width_mult)
        features: list[nn.Module] = [ConvBNReLU6(3, c, 3, stride=2)]
        for expansion, channels, blocks, first_stride in STAGES:
            k = round_channels(channels * width_mult)
            for i in range(blocks):
                features.append(InvertedResidual(c, k, first_stride if i == 0 else 1, expansion))
                c = k
        self.last_channel = round_channels(1280 * max(1.0, width_mult))
        features.append(ConvBNReLU6(c, self.last_channel, 1))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(self.last_channel, num_classes))
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) float images to (N, num_classes) logits; made for H = W = 224, works from 32 on."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def mobilenet_v2(num_classes: int = 1000, width_mult: float = 1.0) -> MobileNetV2:
    """MobileNetV2, untrained: 3,504,872 parameters with the defaults."""
    return MobileNetV2(num_classes, width_mult)
