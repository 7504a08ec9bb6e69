"""The demonstration that ``cnncomp demo`` runs: real photographs, a digits network trained here, a sparse ResNet-50.

Everything that it reports is computed and timed in the run that reports it.
"""

from __future__ import annotations

from cnncomp.demo.common import Column, Options, Report
from cnncomp.demo.runner import PARTS, Outcome, run

__all__ = ["PARTS", "Column", "Options", "Outcome", "Report", "run"]
