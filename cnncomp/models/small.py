"""Small networks: for the demonstration and for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnncomp.models.init import init_weights


def _conv_bn(c: int, k: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, k, 3, padding=1, bias=False), nn.BatchNorm2d(k))


class DigitsNet(nn.Module):
    """Four convolutions with BatchNorm, one shortcut, one linear layer: for scikit-learn's 8×8 digits.

    Wide enough for its task that most of its 168,810 parameters can go, and that int8 and sparse kernels pay.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = _conv_bn(1, 32)
        self.conv2 = _conv_bn(32, 64)
        self.conv3 = _conv_bn(64, 64)
        self.conv4 = _conv_bn(64, 192)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(192, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) float images to (N, num_classes) logits."""
        x = self.relu(self.conv1(x))
        x = self.pool(self.relu(self.conv2(x)))
        x = self.relu(self.conv3(x) + x)
        x = self.relu(self.conv4(x))
        return self.fc(self.avgpool(x).flatten(1))


class ArticleNet(nn.Module):
    """Two convolutions with ReLU and max-pool, global average pool, one linear layer, on 32×32 colour images."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Linear(128, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) float images to (N, num_classes) logits."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class ConcatNet(nn.Module):
    """Two branches of different kernel sizes, concatenated, and an output that two layers read: tests graph passes."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.narrow = nn.Conv2d(16, 16, 1)
        self.wide = nn.Conv2d(16, 16, 5, padding=2)
        self.merge = nn.Conv2d(32, 32, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(32, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) float images to (N, num_classes) logits."""
        x = self.relu(self.stem(x))
        x = torch.cat([self.relu(self.narrow(x)), self.wide(x)], dim=1)
        x = self.relu(self.merge(x))
        return self.fc(self.pool(x).flatten(1))
