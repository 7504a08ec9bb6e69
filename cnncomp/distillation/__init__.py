"""Distillation: a small model learns from a large one, a pruned one from its dense parent."""

from __future__ import annotations

from cnncomp.distillation.distill import FINETUNE, distill, finetune
from cnncomp.distillation.hints import hint_loss
from cnncomp.distillation.knowledge import KnowledgeDistillation
from cnncomp.distillation.losses import soft_cross_entropy

__all__ = ["FINETUNE", "KnowledgeDistillation", "distill", "finetune", "hint_loss", "soft_cross_entropy"]
