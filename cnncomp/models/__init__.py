"""Networks to try cnncomp on. All are untrained; the large ones load torchvision's weight files."""

from __future__ import annotations

from cnncomp.models.mobilenet import MobileNetV2, mobilenet_v2
from cnncomp.models.resnet import ResNet, resnet18, resnet50
from cnncomp.models.small import ArticleNet, ConcatNet, DigitsNet
from cnncomp.models.vgg import VGG, vgg16, vgg16_bn

__all__ = [
    "VGG",
    "ArticleNet",
    "ConcatNet",
    "DigitsNet",
    "MobileNetV2",
    "ResNet",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "vgg16",
    "vgg16_bn",
]
