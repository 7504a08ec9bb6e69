"""Which kernel runs each layer: candidates, measurement, choice, plans."""

from __future__ import annotations

from cnncomp.dispatch.candidates import CONV_CANDIDATES, LINEAR_CANDIDATES, Candidate
from cnncomp.dispatch.device import cpu_name, device_key
from cnncomp.dispatch.plan import LayerPlan, Plan
from cnncomp.dispatch.timing import interleaved

__all__ = [
    "CONV_CANDIDATES",
    "LINEAR_CANDIDATES",
    "Candidate",
    "LayerPlan",
    "Plan",
    "cpu_name",
    "device_key",
    "interleaved",
]
