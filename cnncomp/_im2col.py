"""What a convolution or linear layer multiplies its filters with, as columns."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from cnncomp._modules import Layer, groups_of

#: Numbers that are written at a time.
_CHUNK = 1 << 24


def im2col(layer: Layer, x: Tensor) -> Iterator[Tensor]:
    """Parts (G, C/G, T, P) of the layer's input ``x``: T taps (one for a linear layer), P output positions of some of the
    inputs. ``x`` may lack the batch dimension."""
    if isinstance(layer, nn.Linear):
        yield x.reshape(-1, x.shape[-1]).t()[None, :, None]
        return
    one = isinstance(layer, nn.Conv1d)
    if x.dim() == (2 if one else 3):
        x = x[None]
    # torch keeps the padding that conv calls compute with, "same" resolved, in this attribute.
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if one:
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    taps = kernel[0] * kernel[1]
    per_image = max(1, x[0].numel() * taps // (stride[0] * stride[1]))
    for chunk in x.split(max(1, _CHUNK // per_image)):
        unfolded = F.unfold(chunk, kernel, dilation=dilation, stride=stride)  # (N, C·T, P)
        n, _, positions = unfolded.shape
        split = unfolded.view(n, groups_of(layer), -1, taps, positions)
        yield split.permute(1, 2, 3, 0, 4).reshape(*split.shape[1:4], n * positions)
