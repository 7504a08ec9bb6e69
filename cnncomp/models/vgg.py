"""VGG-16 (Simonyan & Zisserman, 2014), with and without BatchNorm, with torchvision's parameter names."""

from __future__ import annotations

from torch import Tensor, nn

from cnncomp.models.init import init_weights

# Output channels of the 3×3 convolutions of each stage; a 2×2 max-pool ends each stage.
VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """VGG-16.

    Args:
        num_classes: Outputs of the classifier.
        batch_norm: Put a BatchNorm behind each convolution.
    """

    def __init__(self, num_classes: int = 1000, batch_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        c = 3
        for stage in VGG16_STAGES:
            for k in stage:
                layers.append(nn.Conv2d(c, k, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(k))
                layers.append(nn.ReLU(inplace=True))
                c = k
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(c * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) float images to (N, num_classes) logits; made for H = W = 224, works from 32 on."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def vgg16(num_classes: int = 1000) -> VGG:
    """VGG-16, untrained: 138,357,544 parameters."""
    return VGG(num_classes)


def vgg16_bn(num_classes: int = 1000) -> VGG:
    """VGG-16 with BatchNorm, untrained: 138,365,992 parameters."""
    return VGG(num_classes, batch_norm=True)
