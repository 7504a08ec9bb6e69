"""Feature hints: inner layers of the student imitate the teacher's (Romero et al., "FitNets", 2014)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnncomp.errors import ArgumentError


class Features(AbstractContextManager["Features"]):
    """Outputs of some modules in the last forward, by name, while the context is open.

    Raises:
        ArgumentError: the model has no module of that name.
    """

    def __init__(self, model: nn.Module, names: list[str], argument: str) -> None:
        modules = dict(model.named_modules())
        for name in names:
            if name not in modules:
                some = ", ".join(n for n in list(modules)[1:6])
                raise ArgumentError("hints", f"{name!r}, no module of the {argument}", f"one such as {some}")
        self._modules = {name: modules[name] for name in names}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.values: dict[str, Tensor] = {}

    def __enter__(self) -> Features:
        self._handles = [m.register_forward_hook(self._keep(name)) for name, m in self._modules.items()]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.values = {}

    def _keep(self, name: str) -> Callable[[nn.Module, tuple[object, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
            self.values[name] = output

        return hook


def build_projections(
    hints: Mapping[str, str], student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> nn.ModuleList:
    """One learned 1×1 convolution (4-d features) or linear layer (2-d) per hint, from the student's channels to the teacher's.

    Args:
        hints: Student's module name to teacher's.
        student, teacher: Features by name, of one batch.

    Raises:
        ArgumentError: a module that doesn't run or returns no tensor, or features that are neither (N, C) nor (N, C, H, W), or
            not the same kind for both.
    """
    projections = nn.ModuleList()
    for ours, theirs in hints.items():
        missing = [name for name, found in ((ours, student), (theirs, teacher)) if name not in found]
        if missing:
            raise ArgumentError(
                "hints", f"{missing[0]!r}, which the model never runs", "modules that run in each forward"
            )
        s, t = student[ours], teacher[theirs]
        for name, features in ((ours, s), (theirs, t)):
            if not isinstance(features, Tensor):
                got = f"{name!r}, which returns a {type(features).__name__}"
                raise ArgumentError("hints", got, "modules that return a tensor")
        if s.ndim != t.ndim or s.ndim not in (2, 4):
            got = f"{ours!r} of shape {tuple(s.shape)} for {theirs!r} of shape {tuple(t.shape)}"
            raise ArgumentError("hints", got, "both (N, C) or both (N, C, H, W)")
        kind = nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False) if s.ndim == 4 else nn.Linear(s.shape[1], t.shape[1])
        projections.append(kind.to(s.device))
    return projections


def hint_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error, relative to the mean square of the teacher's features, so that layers weigh the same.

    Where the images of the two differ in size, the larger are averaged down.
    """
    target = teacher.detach().float()
    projected = projected.float()
    if projected.ndim == 4 and projected.shape[2:] != target.shape[2:]:
        size = (min(projected.shape[2], target.shape[2]), min(projected.shape[3], target.shape[3]))
        projected, target = F.adaptive_avg_pool2d(projected, size), F.adaptive_avg_pool2d(target, size)
    return F.mse_loss(projected, target) / target.square().mean().clamp_min(1e-12)
