"""Training with simulated quantisation (QAT): scales follow weights and activations while the model trains.

Gradients go straight through the rounding (Bengio et al., 2013), and BatchNorm is folded into the layer before it, so that
training sees the weights that int8 will have (Jacob et al., "Quantization and training of neural networks for efficient
integer-arithmetic-only inference", 2018; its moving averages are the ones here). In eval mode all scales stand still.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnncomp._modules import Layer, layers_of, weight_parameter
from cnncomp._norms import fold_batch_norm
from cnncomp.quantization.fake import WEIGHT_MAX, FakeQuantizeInput, FakeQuantizeWeight
from cnncomp.quantization.links import layer_graph, norm_after
from cnncomp.quantization.scales import MIN_SCALE, RangeObserver

#: How much of a batch's range goes into the moving average.
MOMENTUM = 0.01


class TrainedWeight(FakeQuantizeWeight):
    """A :class:`FakeQuantizeWeight` whose scales keep, while it trains, the share of the largest weight that calibration
    chose; a shift follows the mean.

    Args:
        weight: (K, ...), the weight that ``scale`` and ``shift`` were chosen for.
    """

    share: Tensor

    def __init__(self, scale: Tensor, shift: Tensor | None, weight: Tensor) -> None:
        super().__init__(scale, shift)
        largest = self._largest(weight.detach())
        self.register_buffer("share", torch.where(largest < MIN_SCALE, 1.0, self.scale / largest.clamp_min(MIN_SCALE)))

    def _largest(self, weight: Tensor) -> Tensor:
        rows = weight.float().flatten(1)
        rows = rows if self.shift is None else rows - self.shift[:, None]
        return rows.abs().amax(1) / WEIGHT_MAX

    def forward(self, weight: Tensor) -> Tensor:
        if self.training and self.enabled:
            with torch.no_grad():
                # New tensors: those of a forward before this one may still be needed for its backward.
                if self.shift is not None:
                    self.shift = weight.float().flatten(1).mean(1)
                scale = self._largest(weight) * self.share
                self.scale = torch.where(scale < MIN_SCALE, torch.ones_like(scale), scale)
        return super().forward(weight)


class TrainedInput(FakeQuantizeInput):
    """A :class:`FakeQuantizeInput` whose scale follows, while it trains, a moving average of the largest magnitude.

    Args:
        share: the step that calibration chose, as a fraction of the one that clips nothing.
    """

    share: Tensor

    def __init__(self, scale: float, dtype: torch.dtype, share: float) -> None:
        super().__init__(scale, dtype)
        self.register_buffer("share", torch.tensor(share, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.enabled and x.numel():
            with torch.no_grad():
                qmax = 255 - self.signed.float() * 128
                step = self.share * x.detach().float().abs().amax() / qmax
                self.scale = torch.where(step < MIN_SCALE, self.scale, self.scale.lerp(step, MOMENTUM))
        return super().forward(x)


def trained_input(observer: RangeObserver, method: str) -> TrainedInput:
    """Starts from what calibration saw."""
    scale, full = observer.scale(method), observer.scale("minmax")
    return TrainedInput(scale, observer.dtype, scale / full)


@torch.no_grad()
def fold_norms(model: nn.Module) -> list[str]:
    """Fold each BatchNorm that alone reads a convolution into it, in place: an :class:`~torch.nn.Identity` takes its place.

    Running statistics are taken as they are. Masks stay. The convolution gets a bias where it had none.

    Returns:
        The names of the norms that are gone.
    """
    found = norm_after(model, layer_graph(model))
    layers: dict[str, Layer] = layers_of(model)
    for name, norm_name in found.items():
        layer, norm = layers[name], model.get_submodule(norm_name)
        parameter = weight_parameter(layer, name)
        weight, bias, _ = fold_batch_norm(parameter, layer.bias, norm)  # type: ignore[arg-type]
        parameter.copy_(weight)
        if layer.bias is None:
            layer.bias = nn.Parameter(bias.to(parameter.dtype), requires_grad=parameter.requires_grad)
        else:
            layer.bias.copy_(bias)
        model.set_submodule(norm_name, nn.Identity())
    return list(found.values())
