"""ResNet-18 and ResNet-50 (He et al., "Deep Residual Learning for Image Recognition", 2015).

The stride of a bottleneck sits in its 3×3 convolution ("v1.5"), and parameters carry torchvision's names, so that its
weight files load.
"""

from __future__ import annotations

from torch import Tensor, nn

from cnncomp.models.init import init_weights


def conv3x3(c: int, k: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c, k, 3, stride, padding=1, bias=False)


def conv1x1(c: int, k: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c, k, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: ``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))``."""

    expansion = 1

    def __init__(self, c: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3x3(c, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1×1 down to ``width`` channels, 3×3, 1×1 up to ``4·width``, and a shortcut."""

    expansion = 4

    def __init__(self, c: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv1x1(c, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, width * self.expansion)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """Stem, four stages of blocks, global average pool and a linear classifier.

    Args:
        block: Kind of block.
        depths: Number of blocks in each of the four stages.
        num_classes: Outputs of the classifier.
    """

    def __init__(self, block: type[BasicBlock | Bottleneck], depths: tuple[int, ...], num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(block, 64, 64, depths[0], 1)
        self.layer2 = self._stage(block, 64 * block.expansion, 128, depths[1], 2)
        self.layer3 = self._stage(block, 128 * block.expansion, 256, depths[2], 2)
        self.layer4 = self._stage(block, 256 * block.expansion, 512, depths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        init_weights(self)

    @staticmethod
    def _stage(block: type[BasicBlock | Bottleneck], c: int, width: int, depth: int, stride: int) -> nn.Sequential:
        k = width * block.expansion
        shortcut = nn.Sequential(conv1x1(c, k, stride), nn.BatchNorm2d(k)) if stride != 1 or c != k else None
        first = block(c, width, stride, shortcut)
        return nn.Sequential(first, *(block(k, width, 1, None) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) float images to (N, num_classes) logits; made for H = W = 224, works from 32 on."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def resnet18(num_classes: int = 1000) -> ResNet:
    """ResNet-18, untrained: 11,689,512 parameters."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes)


def resnet50(num_classes: int = 1000) -> ResNet:
    """ResNet-50, untrained: 25,557,032 parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes)
