"""Pruning: which weights go, and the masks that keep them gone."""

from __future__ import annotations

from cnncomp.pruning.allocation import ALLOCATIONS
from cnncomp.pruning.article import WeightPruning
from cnncomp.pruning.criteria import CRITERIA, score_targets
from cnncomp.pruning.mask import Mask, mask_of, remove_masks
from cnncomp.pruning.masking import prune
from cnncomp.pruning.patterns import PATTERNS, parse_pattern
from cnncomp.pruning.permute import Permutation, permute_channels
from cnncomp.pruning.report import LayerSparsity, SparsityReport, sparsity_of
from cnncomp.pruning.schedule import GradualCubic, OneShot, RigL
from cnncomp.pruning.targets import Target, targets_of

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "PATTERNS",
    "GradualCubic",
    "LayerSparsity",
    "Mask",
    "OneShot",
    "Permutation",
    "RigL",
    "SparsityReport",
    "Target",
    "WeightPruning",
    "mask_of",
    "parse_pattern",
    "permute_channels",
    "prune",
    "remove_masks",
    "score_targets",
    "sparsity_of",
    "targets_of",
]
