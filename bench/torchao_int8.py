"""torchao's static int8 for CPUs: the peer that does convolutions inside torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def torchao_int8(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """``model`` as a graph with quantise and dequantise steps, calibrated on ``batches`` with torchao's defaults; inductor
    fuses them to int8 kernels.

    Raises:
        ImportError: torchao is not installed.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    sizes = ({0: torch.export.Dim("n", min=2)},) if len(batches[0]) > 1 else None
    exported = torch.export.export(model, (batches[0],), dynamic_shapes=sizes)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported.module(), quantizer)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    return convert_pt2e(prepared)
