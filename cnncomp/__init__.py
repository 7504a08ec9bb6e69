"""cnncomp makes a trained convolutional network smaller and measurably faster.

``prune`` and ``quantize`` change a model in place, ``convert`` swaps its layers for drop-in ones on hand-written kernels,
each measured against dense on this device; ``compress`` is all of it. ``profile`` says what each layer costs.
"""

from __future__ import annotations

from cnncomp import errors, models, training
from cnncomp import nn as nn  # not in __all__: a star import would hide torch's
from cnncomp import ops as ops
from cnncomp._version import __version__
from cnncomp.compress import Recipe, compress
from cnncomp.convert import ConvertedModel, convert
from cnncomp.cuda_graph import cuda_graph
from cnncomp.dispatch import Plan
from cnncomp.distillation import KnowledgeDistillation, distill, finetune
from cnncomp.evaluation import evaluate
from cnncomp.profile import profile
from cnncomp.pruning import WeightPruning, prune, remove_masks, sparsity_of
from cnncomp.quantization import Quantization, quantize, remove_quantization
from cnncomp.search import SearchResult, Target
from cnncomp.serialization import load, save
from cnncomp.structured import channels_of, prune_channels

__all__ = [
    "ConvertedModel",
    "KnowledgeDistillation",
    "Plan",
    "Quantization",
    "Recipe",
    "SearchResult",
    "Target",
    "WeightPruning",
    "__version__",
    "channels_of",
    "compress",
    "convert",
    "cuda_graph",
    "distill",
    "errors",
    "evaluate",
    "finetune",
    "load",
    "models",
    "profile",
    "prune",
    "prune_channels",
    "quantize",
    "remove_masks",
    "remove_quantization",
    "save",
    "sparsity_of",
    "training",
]
