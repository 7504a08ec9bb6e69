"""Networks for the tests of channel pruning: small ones that each show one way of depending, and random ones."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupedNet(nn.Module):
    """Grouped convolutions: of many small groups, of few large ones, depthwise with two outputs per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.many = nn.Conv2d(16, 32, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(32)
        self.few = nn.Conv2d(32, 24, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(24, 48, 3, groups=24)
        self.fc = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.many(F.relu(self.stem(x)))))
        x = F.max_pool2d(F.silu(self.few(x)), 2)
        return self.fc(F.adaptive_avg_pool2d(self.depthwise(x), 1).flatten(1))


class FlattenNet(nn.Module):
    """Every channel becomes a block of columns of a linear layer, which another follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3, padding=1)
        self.act = nn.PReLU(10)
        self.fc1 = nn.Linear(10 * 4 * 4, 20)
        self.norm = nn.BatchNorm1d(20)
        self.fc2 = nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.act(self.conv(x)), 2)
        return self.fc2(torch.sigmoid(self.norm(self.fc1(x.view(x.size(0), -1)))))


class Conv1dNet(nn.Module):
    """One-dimensional, with a norm over groups of channels and a sum over time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 12, 5)
        self.norm = nn.GroupNorm(4, 12)
        self.conv2 = nn.Conv1d(12, 8, 3, padding=1)
        self.instance = nn.InstanceNorm1d(8, affine=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.instance(self.conv2(F.gelu(self.norm(self.conv1(x))))).mean(-1))


class GatedNet(nn.Module):
    """Squeeze and excitation, a gated linear unit, one convolution called twice, a linear layer on channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.down, self.up = nn.Linear(12, 6), nn.Linear(6, 12)
        self.pair = nn.Conv2d(12, 16, 1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c = x.shape[0], x.shape[1]
        gate = self.up(F.relu(self.down(x.mean((2, 3))))).view(b, c, 1, 1)
        a, g = self.pair(x * torch.sigmoid(gate)).chunk(2, dim=1)
        x = a * torch.sigmoid(g)
        x = self.again(F.relu(self.again(x)))
        return self.fc(self.head(x).amax(dim=(2, 3)))


class ViewNet(nn.Module):
    """The other ways of moving channels about: permuted to the end, squeezed, by keyword, densely concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Linear(8, 6)
        self.back = nn.Conv2d(6, 8, 1)
        self.merge = nn.Conv2d(8 + 8 + 3, 10, 1)
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(input=self.stem(input=x))
        b = self.last(a.permute(0, 2, 3, 1)).transpose(1, 3).transpose(-1, 2)
        b = torch.cat([a, x, F.interpolate(F.avg_pool2d(self.back(b), 2), scale_factor=2)], 1)
        y = self.merge(b).mean(dim=(-2, -1), keepdim=True).squeeze(-1).unsqueeze(1).squeeze(1).squeeze(-1)
        return self.fc(2 - y)


class ShuffleNet(nn.Module):
    """A channel shuffle behind one convolution; the next ones can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(F.relu(self.second(x)).mean((2, 3)))


class BranchingNet(nn.Module):
    """Branches on its input's values, so that it can't be traced as a whole; its two halves can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
        self.head = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head((x if x.sum() > 0 else -x).mean((2, 3)))


class RandomNet(nn.Module):
    """A chain of random blocks on (N, 3, 8, 8), and a random head."""

    BLOCKS = (
        "conv",
        "grouped",
        "depthwise",
        "residual",
        "dense",
        "gate",
        "chunk",
        "group_norm",
        "prelu",
        "norm",
        "pool",
    )

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.plan: list[str] = ["conv", *rng.choices(self.BLOCKS, k=rng.randint(1, 7))]
        self.blocks = nn.ModuleList()
        c = 3
        for kind in self.plan:
            block, c = self._block(kind, c, rng)
            self.blocks.append(block)
        self.flatten = rng.random() < 0.5
        size = 8 // 2 ** self.plan.count("pool") if self.flatten else 1
        self.fc = nn.Linear(c * size * size, 5)

    @staticmethod
    def _block(kind: str, c: int, rng: random.Random) -> tuple[nn.Module, int]:
        act = rng.choice([nn.ReLU, nn.Sigmoid, nn.SiLU, nn.Tanh])()
        size = rng.choice([1, 3])
        if kind in ("conv", "grouped"):
            groups = rng.choice([g for g in range(1, c + 1) if c % g == 0]) if kind == "grouped" else 1
            k = groups * rng.randint(1, 4) if groups > 1 else rng.choice([4, 6, 7, 12])
            conv = nn.Conv2d(c, k, size, padding=size // 2, groups=groups, bias=rng.random() < 0.5)
            return nn.Sequential(conv, nn.BatchNorm2d(k), act), k
        if kind == "depthwise":
            k = c * rng.choice([1, 2])
            return nn.Sequential(nn.Conv2d(c, k, 3, padding=1, groups=c), act), k
        if kind == "chunk":
            return nn.Sequential(nn.Conv2d(c, 2 * c, 1)), c
        if kind == "dense":
            return nn.Conv2d(c, 5, size, padding=size // 2), c + 5
        if kind == "gate":
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, 3, 1), act, nn.Conv2d(3, c, 1), nn.Sigmoid()), c
        if kind == "residual":
            return nn.Sequential(nn.Conv2d(c, 6, 3, padding=1), nn.BatchNorm2d(6), act, nn.Conv2d(6, c, 1)), c
        if kind == "group_norm":
            return nn.GroupNorm(rng.choice([g for g in range(1, c + 1) if c % g == 0]), c), c
        layers = {"prelu": nn.PReLU(c), "norm": nn.BatchNorm2d(c), "pool": nn.MaxPool2d(2, ceil_mode=True)}
        return layers[kind], c

    def forward(self, x: Tensor) -> Tensor:
        for kind, block in zip(self.plan, self.blocks, strict=True):
            y = block(x)
            if kind == "chunk":
                a, b = y.chunk(2, 1)
                x = a * torch.sigmoid(b)
            elif kind == "residual":
                x = x + y
            elif kind == "dense":
                x = torch.cat([x, y], dim=1)
            elif kind == "gate":
                x = x * y
            else:
                x = y
        return self.fc(torch.flatten(x, 1) if self.flatten else x.mean([2, 3]))


class ReadsItsWidth(nn.Module):
    """Divides by a number of channels, which no tracing of channels can know."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x / x.shape[1])
