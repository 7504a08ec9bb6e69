"""The article's weight pruning: gradient, pruning, clipped update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cnncomp.errors import ArgumentError
from cnncomp.pruning.criteria import as_float, check_scalar, gradients_of
from cnncomp.pruning.mask import apply_mask
from cnncomp.pruning.patterns import keep_largest
from cnncomp.pruning.targets import Target, targets_of
from cnncomp.training import distributed

CLIPS = ("l1", "mean")


class WeightPruning(nn.Module):
    """Train and prune a model by the gradient of a loss, as the article proposes, with its gaps filled.

    **The article's formula.** With the loss J and the *fraction of non-zeros that stay*, which the article calls the
    sparsity ε:

    1. compute the gradient ∇J;
    2. prune it: all but a fraction ε of its non-zeros become zero;
    3. update ``W ← W − α·clip(∇J, −ε/‖∇J‖₁, +ε/‖∇J‖₁)``, α the learning rate.

    **What is wrong or open in it, and what is done here.**

    * *It never makes a weight zero.* Step 2 zeroes entries of the gradient, step 3 then leaves these weights as they are and
      moves the others by at most α·ε/‖∇J‖₁. Here a mask prunes: :meth:`step` leaves exactly ``round(sparsity · numel)``
      entries of every Conv1d, Conv2d and Linear weight and zeroes the others after the update. Biases and norms are
      updated, but not pruned.
    * *Which entries stay* is not said. Here those with the largest \\|w·∇J\\|, by which the loss would change to first order
      if they went; \\|w\\| where a weight's gradient is all zero; of equal ones the last.
    * *Each step would prune again*, a fraction of what the last one left. Here the fraction is reached at the first step and
      kept: pruned entries never return, whatever trains the model afterwards.
    * *The sparsity* is elsewhere, :func:`cnncomp.prune` included, the fraction of zeros. Here it is as in the article.
    * *‖∇J‖₁* is taken per parameter, of the gradient after step 2. Where it is 0, nothing is to be clipped or updated.
      Note what the bound does: where ‖∇J‖₁ ≤ √ε nothing is clipped, above it the step shrinks as the gradient grows.
    * *The article's code differs from its formula*: it clips at ε·mean\\|∇J\\| and steps by 1/numel in place of α. This is
      ``clip="mean"``, the formula is ``clip="l1"``.
    * *The article's code updates weights in forward*, under ``no_grad``, and differentiates the output, which is no
      scalar: ``autograd.grad`` raises either way. Here :meth:`forward` is the model's and has no side effect, and
      :meth:`step` takes a scalar loss.

    Masks are :class:`cnncomp.pruning.Mask` parametrizations, present from the start, so that ``state_dict`` has the same
    keys before and after pruning; :func:`cnncomp.remove_masks` makes the result permanent.

    Args:
        model: the model, changed in place.
        sparsity: fraction of the entries of each weight that stay, 0 to 1.
        alpha: α; None: 0.1 for ``clip="l1"``, 1/numel of each parameter for ``clip="mean"``.
        clip: "l1" or "mean".

    Raises:
        ArgumentError: a sparsity outside 0 to 1, an ``alpha`` that is not a number above 0, an unknown ``clip``, a model
            without weights to prune or with fewer left than asked for.
    """

    def __init__(self, model: nn.Module, sparsity: float = 0.1, alpha: float | None = None, clip: str = "l1") -> None:
        super().__init__()
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity <= 1:
            raise ArgumentError("sparsity", repr(sparsity), "a number from 0 to 1 (the fraction that stays)")
        if alpha is not None and not (isinstance(alpha, (int, float)) and 0 < alpha < float("inf")):
            raise ArgumentError("alpha", repr(alpha), "a number above 0, or None")
        if clip not in CLIPS:
            raise ArgumentError("clip", repr(clip), f"one of {', '.join(map(repr, CLIPS))}")
        self.model, self.sparsity, self.alpha, self.clip = model, sparsity, alpha, clip
        for t in self._targets():
            left = t.numel - t.masked
            if left < self._kept(t):
                raise ArgumentError("model", f"{left} weights left in layer {t.name!r}", f"at least {self._kept(t)}")
            _ = t.mask_module  # now, so that the state_dict has the same keys before and after pruning

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns; nothing is changed."""
        return self.model(*args, **kwargs)

    def step(self, loss: Tensor) -> None:
        """One update of all parameters by the gradient of ``loss``, after which the sparsity is reached.

        Works beside an optimiser or in its place; ``.grad`` stays as it is. In a process group, gradients are averaged.

        Args:
            loss: a scalar computed from the model's parameters.

        Raises:
            ArgumentError: ``loss`` is no scalar, has no gradient, or it or its gradient is not finite. Nothing is changed
                then.
        """
        check_scalar(loss)
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        targets = {id(t.parameter): t for t in self._targets()}
        gradients = [distributed.mean(g) for g in gradients_of(loss, list(parameters.values()))]
        for name, g in zip(parameters, gradients, strict=True):
            if not torch.isfinite(g).all():
                raise ArgumentError("loss", f"a gradient with NaN or infinity at {name!r}", "finite gradients")
        with torch.no_grad():
            for p, g in zip(parameters.values(), gradients, strict=True):
                target = targets.pop(id(p), None)
                keep = None if target is None else self._keep(target, g)
                p.sub_(self._update(g if keep is None else g.where(keep, 0.0)))
                if target is not None and keep is not None:
                    apply_mask(target.layers, keep)
            for frozen in targets.values():
                apply_mask(frozen.layers, self._keep(frozen, torch.zeros_like(frozen.parameter)))

    def _targets(self) -> list[Target]:
        return targets_of(self.model, include_first_last=True, include_depthwise=True)

    def _kept(self, target: Target) -> int:
        return round(self.sparsity * target.numel)

    def _keep(self, target: Target, gradient: Tensor) -> Tensor:
        """Step 2: which entries stay."""
        weight = as_float(target.parameter.detach())
        score = (weight * gradient).abs() if gradient.any() else weight.abs()
        if target.mask is not None:
            score = score.masked_fill(~target.mask, -1.0)
        return keep_largest(score.flatten(), target.numel - self._kept(target)).view(score.shape)

    def _update(self, gradient: Tensor) -> Tensor:
        """Step 3: what is subtracted from the parameter."""
        size = as_float(gradient).abs()
        if not size.any():
            return gradient
        if self.clip == "l1":
            bound, alpha = self.sparsity / size.sum(), 0.1
        else:
            bound, alpha = self.sparsity * size.mean(), 1 / gradient.numel()
        alpha = alpha if self.alpha is None else self.alpha
        return (alpha * torch.minimum(torch.maximum(as_float(gradient), -bound), bound)).to(gradient.dtype)

    def extra_repr(self) -> str:
        return f"sparsity={self.sparsity}, alpha={self.alpha}, clip={self.clip!r}"
