"""Residual networks for small images: thin enough to train on a CPU (He et al., 2015, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cnncomp.errors import ArgumentError
from cnncomp.models.init import init_weights
from cnncomp.models.resnet import BasicBlock, conv1x1, conv3x3


class ThinResNet(nn.Module):
    """A 3×3 stem at full resolution, one basic block per further width, each of stride 2, and a linear classifier.

    Args:
        widths: Channels of the stem and of each block.
        in_channels: 1 for grey images, 3 for colour.
        num_classes: Outputs of the classifier.
        stem_stride: Stride of the stem.

    Raises:
        ArgumentError: fewer than two widths.
    """

    def __init__(
        self, widths: Sequence[int], in_channels: int = 1, num_classes: int = 10, stem_stride: int = 1
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ArgumentError("widths", tuple(widths), "a stem and at least one block")
        self.conv1 = conv3x3(in_channels, widths[0], stem_stride)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(*(_block(c, k) for c, k in zip(widths[:-1], widths[1:], strict=True)))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(widths[-1], num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) float images to (N, num_classes) logits."""
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _block(c: int, k: int) -> BasicBlock:
    return BasicBlock(c, k, 2, nn.Sequential(conv1x1(c, k, 2), nn.BatchNorm2d(k)))
