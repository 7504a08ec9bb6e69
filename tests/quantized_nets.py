"""Networks for the tests of quantisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnncomp.models import ArticleNet, ConcatNet, DigitsNet, mobilenet_v2, resnet18


class Chain(nn.Module):
    """Kinds of links: through max-pool, ReLU6, a group convolution, flatten to a linear layer, and between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool, self.six = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), nn.ReLU6()
        self.b, self.norm = nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(12)
        self.c, self.act = nn.Conv2d(12, 12, 3, groups=12), nn.Hardtanh(0.0, 3.0)
        self.d, self.e = nn.Linear(12 * 4, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.six(self.pool(self.a(x)))
        x = self.act(self.norm(self.b(x)))
        return self.e(F.relu(self.d(torch.flatten(self.c(x), 1))))


#: What builds it, the shape of its input, and how many links it has.
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "chain": (Chain, (4, 3, 8, 8), 4),
    "article": (ArticleNet, (4, 3, 32, 32), 2),
    "digits": (DigitsNet, (4, 1, 8, 8), 3),
    "mobilenet": (lambda: mobilenet_v2(10, 0.35), (2, 3, 32, 32), 42),
    "resnet18": (lambda: resnet18(10), (2, 3, 32, 32), 12),
    "concat": (ConcatNet, (2, 3, 16, 16), 2),
}
