"""Initial weights, shared by all models."""

from __future__ import annotations

import math

from torch import nn


def init_weights(model: nn.Module) -> None:
    """Convolutions: normal, scaled by fan-out (He et al., 2015); BatchNorm: identity; Linear: normal, 0.01.

    Fan-out is counted within a group: counted over all of them, signals die in untrained depthwise layers.
    """
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.out_channels // m.groups * math.prod(m.kernel_size)
            nn.init.normal_(m.weight, 0.0, math.sqrt(2 / fan_out))
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0.0, 0.01)
            nn.init.zeros_(m.bias)
