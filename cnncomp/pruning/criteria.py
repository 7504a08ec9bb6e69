"""What a weight is worth: the scores by which weights are ranked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnncomp._batches import evaluating, inputs_of
from cnncomp.errors import ArgumentError, CalibrationError
from cnncomp.pruning.targets import Target
from cnncomp.training import distributed

CRITERIA = ("magnitude", "taylor", "fisher", "article")

#: From the model's output and the batch as it came to a scalar.
Loss = Callable[[Any, Any], Tensor]


def default_loss(output: Any, batch: Any) -> Tensor:
    """Cross-entropy with the batch's labels, its second element; without labels, with the model's own first class.

    Raises:
        ArgumentError: the output is no (N, classes) tensor, or the labels don't fit it.
    """
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise ArgumentError("loss", None, "a function of output and batch, for the model's output is not (N, classes)")
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
        if not isinstance(labels, Tensor) or labels.shape[:1] != output.shape[:1]:
            raise ArgumentError("data", "batches whose second element is no label per image", "(images, labels)")
        return F.cross_entropy(output, labels.to(output.device))
    return F.cross_entropy(output, output.detach().argmax(1))


def score_targets(
    targets: Sequence[Target],
    model: nn.Module,
    criterion: str = "magnitude",
    data: Iterable[Any] | Tensor | None = None,
    loss: Loss | None = None,
) -> list[Tensor]:
    """How much each weight is worth; non-negative, in the weights' shapes, float32 or float64.

    ======== ====================================================================================================
    criterion score
    ======== ====================================================================================================
    magnitude \\|w\\| (Han et al., "Learning both Weights and Connections", 2015)
    taylor   mean over batches of \\|w·g\\|: the change of the loss to first order (Molchanov et al., 2017)
    fisher   ½·w²·mean over single samples of g²: to second order, the Hessian's diagonal taken from the empirical
             Fisher matrix (LeCun et al., "Optimal Brain Damage", 1990; Theis et al., 2018)
    article  \\|w·∇J\\|, J the mean loss over all batches, as :class:`cnncomp.WeightPruning` ranks
    ======== ====================================================================================================

    A weight whose gradient is zero everywhere is ranked by magnitude in all of them. The model runs in eval mode;
    gradients in ``.grad`` stay as they are. In a process group, means are over the batches of all processes.

    Raises:
        ArgumentError: an unknown criterion, no data for one that needs gradients, a loss that is no scalar or not finite.
        CalibrationError: no batch, or one that can't be used.
    """
    if criterion not in CRITERIA:
        raise ArgumentError("criterion", repr(criterion), f"one of {', '.join(map(repr, CRITERIA))}")
    weights = [as_float(t.value) for t in targets]
    if criterion == "magnitude":
        return [w.abs() for w in weights]
    if data is None:
        raise ArgumentError("data", None, f"batches to take gradients on, which criterion {criterion!r} needs")
    sums = [torch.zeros_like(w) for w in weights]
    seen = 0
    for gradients in _gradients(targets, model, data, loss or default_loss, single=criterion == "fisher"):
        seen += 1
        for w, g, total in zip(weights, gradients, sums, strict=True):
            total += (w * g).abs() if criterion == "taylor" else g.square() if criterion == "fisher" else g
    count = distributed.mean(sums[0].new_tensor(float(seen)))
    means = [distributed.mean(s) / count for s in sums]
    if criterion == "taylor":
        scores = means
    elif criterion == "fisher":
        scores = [0.5 * w.square() * f for w, f in zip(weights, means, strict=True)]
    else:
        scores = [(w * g).abs() for w, g in zip(weights, means, strict=True)]
    return [s if m.any() else w.abs() for s, m, w in zip(scores, means, weights, strict=True)]


def as_float(x: Tensor) -> Tensor:
    """float32 or float64, whichever holds ``x``."""
    return x if x.dtype == torch.float64 else x.float()


def given_scores(targets: Sequence[Target], scores: Mapping[str, Tensor]) -> list[Tensor]:
    """The caller's scores by layer name, raised by one number so that none is negative.

    Raises:
        ArgumentError: one is missing, of another shape, or not finite.
    """
    found = []
    for t in targets:
        score = next((scores[name] for name in [t.name] if name in scores), None)
        shape = tuple(t.parameter.shape)
        if score is None or tuple(score.shape) != shape:
            got = "nothing" if score is None else f"shape {tuple(score.shape)}"
            raise ArgumentError("scores", f"{got} for layer {t.name!r}", f"a tensor of shape {shape}")
        if not torch.isfinite(score).all():
            raise ArgumentError("scores", f"NaN or infinity for layer {t.name!r}", "finite numbers")
        found.append(as_float(score.detach()).to(t.parameter.device))
    least = min(0.0, *(float(s.min()) for s in found if s.numel()))
    return [s - least for s in found]


def as_batches(data: Any) -> Iterable[Any]:
    """``data`` as an iterable of batches; a tensor is one batch.

    Raises:
        CalibrationError: it is neither.
    """
    batches = [data] if isinstance(data, Tensor) else data
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Mapping)):
        raise CalibrationError(f"data: got {type(data).__name__}, expected batches of input tensors")
    return batches


def _gradients(
    targets: Sequence[Target], model: nn.Module, data: Any, loss: Loss, single: bool
) -> Iterator[list[Tensor]]:
    """The loss's gradient at the targets' parameters for each batch, or each sample of it."""
    parameters = [t.parameter for t in targets]
    frozen = [p for p in parameters if not p.requires_grad]
    device = parameters[0].device
    index = -1
    try:
        for p in frozen:
            p.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for index, batch in enumerate(as_batches(data)):
                for part in _samples(batch) if single else [batch]:
                    args, kwargs = inputs_of(part, index, device)
                    value = loss(model(*args, **kwargs), part)
                    check_scalar(value, f"batch {index}")
                    yield [as_float(g) for g in gradients_of(value, parameters)]
    finally:
        for p in frozen:
            p.requires_grad_(False)
    if index < 0:
        raise CalibrationError("data: got no batches, expected at least one (was an iterator used up before?)")


def check_scalar(loss: Any, where: str = "") -> None:
    """Raise unless ``loss`` is one finite number with a gradient.

    Raises:
        ArgumentError: it isn't.
    """
    where = f" for {where}" if where else ""
    if not isinstance(loss, Tensor):
        raise ArgumentError("loss", f"{type(loss).__name__}{where}", "a tensor with one element")
    if loss.numel() != 1:
        raise ArgumentError("loss", f"shape {tuple(loss.shape)}{where}", "a scalar (reduce it, as loss.mean() does)")
    if not loss.requires_grad:
        raise ArgumentError("loss", f"a tensor without gradient{where}", "one computed from the model's parameters")
    if not torch.isfinite(loss.detach()).all():
        raise ArgumentError("loss", f"{float(loss.detach())}{where}", "a finite number")


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """d loss / d parameters, zero where the loss does not depend on one; ``.grad`` stays as it is."""
    found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _samples(batch: Any) -> Iterator[Any]:
    """The batch's samples as batches of one."""
    if isinstance(batch, Mapping):
        n = next((len(v) for v in batch.values() if isinstance(v, Tensor)), 0)
        for i in range(n):
            yield {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in batch.items()}
    elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        for i in range(len(batch[0])):
            yield [v[i : i + 1] if isinstance(v, Tensor) else v for v in batch]
    elif isinstance(batch, Tensor):
        yield from batch.split(1)
    else:
        yield batch  # inputs_of says what is wrong with it
