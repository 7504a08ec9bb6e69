"""What a compressed model keeps: accuracy, agreement with its parent, robustness to common corruptions."""

from __future__ import annotations

from cnncomp.evaluation.corruptions import CORRUPTIONS, corrupt
from cnncomp.evaluation.evaluate import Evaluation, evaluate, table

__all__ = ["CORRUPTIONS", "Evaluation", "corrupt", "evaluate", "table"]
