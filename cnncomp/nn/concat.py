"""Images one behind the other, on a kernel of this package."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnncomp.nn.base import runs_float_kernels


class ConcatChannels(nn.Module):
    """``torch.cat(inputs, 1)`` of images (N, C, H, W), of floats or of 8 bit with one scale."""

    def forward(self, *inputs: Tensor) -> Tensor:
        if all(t.dim() == 4 for t in inputs) and _on_kernel(inputs):
            return torch.ops.cnncomp.concat_channels(inputs)
        return torch.cat(inputs, 1)


def _on_kernel(images: tuple[Tensor, ...]) -> bool:
    """Whether the kernel of this package takes them: on a CPU, of one dtype and layout."""
    last = all(t.is_contiguous(memory_format=torch.channels_last) for t in images)
    if runs_float_kernels(*images):
        return last or all(t.is_contiguous() for t in images)
    kinds = {(t.device.type, t.dtype) for t in images}
    return last and kinds in ({("cpu", torch.uint8)}, {("cpu", torch.int8)})
