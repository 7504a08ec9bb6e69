"""What a student learns from a teacher's outputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cnncomp.errors import ArgumentError


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """``T² · mean over the batch of −Σ softmax(teacher / T) · log softmax(student / T)``.

    A high temperature shows how the teacher ranks the wrong classes. Its gradient falls with T², hence the factor
    (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2).

    Args:
        student: (N, classes) logits.
        teacher: The same shape; takes no gradient.
        temperature: T, above 0.

    Raises:
        ArgumentError: Shapes that differ: the classes don't match.
    """
    for name, logits in (("student", student), ("teacher", teacher)):
        if not isinstance(logits, Tensor):
            raise ArgumentError(
                name, f"a model that returns a {type(logits).__name__}", "logits (N, classes), as a tensor"
            )
    if student.shape != teacher.shape or student.ndim != 2:
        got = f"logits of shape {tuple(student.shape)}"
        raise ArgumentError("student", got, f"{tuple(teacher.shape)}, the teacher's (N, classes)")
    targets = F.softmax(teacher.detach().float() / temperature, dim=1)
    return temperature**2 * F.cross_entropy(student.float() / temperature, targets)
