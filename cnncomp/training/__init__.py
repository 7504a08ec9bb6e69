"""Training: one loop for all, resumable to the bit, on one process or many."""

from __future__ import annotations

from cnncomp.training.batches import Batches, shift_and_flip
from cnncomp.training.loop import History, cross_entropy, train
from cnncomp.training.settings import Settings

__all__ = ["Batches", "History", "Settings", "cross_entropy", "shift_and_flip", "train"]
