"""ONNX Runtime's static quantiser, which other engines' models come from too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from bench.peers.case import Case


class Images(CalibrationDataReader):
    def __init__(self, case: Case) -> None:
        self.batches = iter(case.calibration_batches())

    def get_next(self) -> dict[str, Any] | None:
        x = next(self.batches, None)
        return None if x is None else {"input": x}


def write_int8(case: Case, float_model: Path, out: Path, form: QuantFormat, **options: Any) -> None:
    """Quantise the ONNX model ``float_model`` to ``out``: uint8 activations and int8 weights, which suits x86 best."""
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(float_model, out, Images(case), quant_format=form, **types, **options)
