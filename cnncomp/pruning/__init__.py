"""Pruning: which weights go, and the masks that keep them gone."""

from __future__ import annotations

from cnncomp.pruning.magnitude import PATTERNS, prune
from cnncomp.pruning.mask import Mask, mask_of, remove_masks
from cnncomp.pruning.report import LayerSparsity, SparsityReport, sparsity_of

__all__ = ["PATTERNS", "LayerSparsity", "Mask", "SparsityReport", "mask_of", "prune", "remove_masks", "sparsity_of"]
