"""Channel pruning in one call: find what can go, score it, take it out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp._batches import evaluating
from cnncomp._modules import check_fraction
from cnncomp.convert import as_inputs
from cnncomp.errors import ArgumentError
from cnncomp.graph.nodes import cloned
from cnncomp.pruning.criteria import Loss
from cnncomp.structured.allocate import choose
from cnncomp.structured.criteria import score_groups
from cnncomp.structured.discover import channels_of
from cnncomp.structured.graph import ChannelGraph, Group
from cnncomp.structured.layers import Node, mask_buffer, set_data

SCOPES = ("global", "layer")
#: Reasons that a warning quotes.
_QUOTED = 3


def prune_channels(
    model: nn.Module,
    sparsity: float = 0.5,
    example_inputs: Any = None,
    *,
    scope: str = "global",
    criterion: str = "magnitude",
    data: Iterable[Any] | Tensor | None = None,
    loss: Loss | None = None,
    round_to: int = 1,
    limit: float = 0.9,
    exclude: str | Sequence[str] = (),
    graph: ChannelGraph | None = None,
) -> nn.Module:
    """Take the least important channels out of the model, in place: the same layers, smaller.

    What depends on a channel goes with it: BatchNorm, depthwise and grouped convolutions, PReLU, GroupNorm (whole groups),
    the columns of the layers that read it, through residual adds, products, concatenation, chunks and flattening. What
    can't be followed stays whole; :func:`channels_of` lists the groups, and what stays with the reason. The smaller model
    gives what the given one would with those channels' weights at zero; that is checked on ``example_inputs``, and where it
    fails the model stays as it was, with a warning and a line in ``kept``. The model trains on; parameters stay the same
    objects, but an optimiser with momentum has to be made anew.

    Args:
        model: The model, trainable afterwards. Layers remember how many channels they had: pruning again with the same
            ``sparsity`` does nothing, with a higher one it goes on.
        sparsity: Fraction of channels that go, 0 to 1, of all that can. Channels that go together count once. Of weights,
            about 1 − (1 − sparsity)² go. Never exceeded; no group loses its last channel.
        example_inputs: A tensor or a tuple of positional arguments, for tracing.
        scope: "global" ranks all channels together, "layer" takes the same fraction from each group.
        criterion, data, loss: "magnitude", "bn" or "taylor" (:func:`score_groups`); groups without a score stay.
        round_to: Layers keep multiples of this many channels, as 8, where the model has them.
        limit: With "global", no group loses more than this fraction, or than ``sparsity``.
        exclude: Names of layers, or of modules that hold them, to leave as they are; fnmatch patterns.
        graph: What :func:`channels_of` found for this model; gets a line in ``kept`` where pruning was taken back.

    Returns:
        ``model``. Where no channel could be taken out, or pruning was taken back, a warning says why.

    Raises:
        ArgumentError: a number out of range, an unknown scope or criterion, data missing, a pattern in ``exclude`` that
            matches nothing, no tensor among the inputs.
        CalibrationError: no batch, or one that can't be used.
    """
    _check(sparsity, scope, round_to, limit)
    inputs = as_inputs(example_inputs, model)
    found = channels_of(model, inputs) if graph is None else graph
    candidates = found.without(exclude)
    scores = score_groups(candidates.groups, model, criterion, data, loss)
    groups = [g for g, s in zip(candidates.groups, scores, strict=True) if not torch.isnan(s).any()]
    scores = [s for s in scores if not torch.isnan(s).any()]
    if scope == "global":
        gone = choose(groups, scores, sparsity, round_to, limit)
    else:
        gone = [choose([g], [s], sparsity, round_to)[0] for g, s in zip(groups, scores, strict=True)]
    removed = dict(zip(groups, gone, strict=True))
    if not remove(model, removed, inputs):
        found.kept[""] = "was left as it is: the smaller model did not give what the masked one does"
        warnings.warn(f"no channel was taken out: the model {found.kept['']}", UserWarning, stacklevel=2)
    elif sparsity > 0 and all(len(g) == g.before and not u.any() for g, u in removed.items()):
        warnings.warn(f"no channel was taken out: {_why_none(groups, candidates)}", UserWarning, stacklevel=2)
    return model


def _why_none(groups: Sequence[Group], graph: ChannelGraph) -> str:
    """Why no channel goes, of groups that have a score."""
    if groups:
        return "sparsity, limit and round_to leave each group whole"
    if graph.groups:
        return "no group has a score"
    reasons = [f"{name or '(model)'} {reason}" for name, reason in graph.kept.items()]
    more = [f"{len(reasons) - _QUOTED} more (see channels_of)"] if len(reasons) > _QUOTED else []
    return "; ".join(reasons[:_QUOTED] + more) or "no layer has channels that can go"


def _check(sparsity: float, scope: str, round_to: int, limit: float) -> None:
    for name, value in (("sparsity", sparsity), ("limit", limit)):
        check_fraction(name, value, "channels that go")
    if scope not in SCOPES:
        raise ArgumentError("scope", repr(scope), f"one of {', '.join(map(repr, SCOPES))}")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ArgumentError("round_to", repr(round_to), "a whole number from 1 on")


def remove(model: nn.Module, removed: Mapping[Group, Tensor], example_inputs: tuple[Any, ...]) -> bool:
    """Take units (bool, one per unit of each group) out of ``model``, in place.

    Returns:
        Whether the smaller model gives on ``example_inputs`` what the masked one does; if not, or if a layer can't be made
        smaller, it is as it was before.
    """
    removed = {group: gone for group, gone in removed.items() if gone.any()}
    masks = ChannelGraph(model).masks(removed)
    expected = _run(masked(model, masks), example_inputs)
    before = [_State(node) for node in masks]
    done = False
    try:
        for group in removed:
            group.remember()
        for node, axes in masks.items():
            node.shrink(axes.get("in"), axes.get("out"))
        done = _close(_run(model, example_inputs), expected)
    except Exception:  # whatever the model's own code raises
        pass
    finally:  # also where the user interrupts
        if not done:
            for state in before:
                state.restore()
    return done


def masked(model: nn.Module, masks: Mapping[Node, Mapping[str, Tensor]]) -> nn.Module:
    """A copy of ``model`` in which everything that belongs to a removed channel is zero."""
    clone = copy.deepcopy(model)
    for node, axes in masks.items():
        twin = type(node)(node.name, clone.get_submodule(node.name))
        twin.zero(axes.get("in"), axes.get("out"))
    return clone


class _State:
    """A layer's tensors and sizes, to go back to."""

    def __init__(self, node: Node) -> None:
        self.module = node.module
        self.tensors = [(t, t.data) for _, t in node.tensors()]
        mask = mask_buffer(node.module)
        self.tensors += [(mask, mask.data)] if mask is not None else []
        self.attributes = {k: v for k, v in vars(node.module).items() if not k.startswith("_")}

    def restore(self) -> None:
        for tensor, data in self.tensors:
            set_data(tensor, data)
        for name in [k for k in vars(self.module) if not k.startswith("_") and k not in self.attributes]:
            delattr(self.module, name)
        vars(self.module).update(self.attributes)


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    with evaluating(model), torch.no_grad():
        return model(*cloned(inputs))


def _close(a: Any, b: Any) -> bool:
    """Whether two results are equal but for another order of summation, in the same structure."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape:
            return False
        scale = float(b.abs().max()) if b.numel() else 0.0
        return torch.allclose(a.double(), b.double(), rtol=0.0, atol=1e-3 * scale + 1e-12, equal_nan=True)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_close(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k]) for k in a)
    return type(a) is type(b)
