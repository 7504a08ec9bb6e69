"""``cnncomp.convert``: swap layers for the fastest drop-in that computes the same, measured on this device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from cnncomp._modules import resolve_device
from cnncomp.dispatch.network import NetworkPlanner
from cnncomp.dispatch.plan import Plan, load_cached, store_cached
from cnncomp.errors import ArgumentError
from cnncomp.graph import clone_for_inference, trace
from cnncomp.graph.arguments import by_name
from cnncomp.graph.nodes import cloned
from cnncomp.nn.base import keeping_dtype
from cnncomp.nn.dense import HALF_KERNELS
from cnncomp.progress import track
from cnncomp.recordings import Recordings


@dataclass
class Conversion:
    """How a model was converted: the plan, the layers that stayed as they were with the reason, and the example inputs'
    shapes and dtypes."""

    plan: Plan
    kept: dict[str, str] = field(default_factory=dict)
    inputs: list[tuple[list[int], str]] = field(default_factory=list)


class ConvertedModel(nn.Module):
    """A converted network: an ordinary module for inference. ``network`` runs, ``conversion`` says how it was made."""

    def __init__(self, network: nn.Module, conversion: Conversion) -> None:
        super().__init__()
        self.network = network
        self.conversion = conversion
        self._recordings = Recordings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs) if kwargs else self._recordings(self.network, args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConvertedModel:
        """Moves between devices, but never changes a dtype: what the layers hand over to each other is fixed."""
        super()._apply(keeping_dtype(fn), recurse)
        return self

    def train(self, mode: bool = True) -> ConvertedModel:
        """Stays in eval mode: layers that were kept must not update statistics."""
        return super().train(False)

    @property
    def plan(self) -> Plan:
        return self.conversion.plan


def as_inputs(example_inputs: Any, model: nn.Module) -> tuple[Any, ...]:
    """``example_inputs`` as positional arguments of the model's forward; a mapping with a key that is the name of a parameter
    holds them by name, any other is one argument.

    Raises:
        ArgumentError: no tensor among them; an unknown or missing name, or one of a keyword-only parameter.
    """
    if isinstance(example_inputs, Mapping) and isinstance(model, nn.Module):
        called = model.network if isinstance(model, ConvertedModel) else model
        example_inputs = by_name(called, example_inputs) or example_inputs
    inputs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    if not any(isinstance(x, Tensor) for x in tree_leaves(inputs)):
        raise ArgumentError("example_inputs", type(example_inputs).__name__, "a tensor or a tuple with tensors")
    return inputs


def check_float_dtype(dtype: object) -> None:
    """Refuse what no layer computes in."""
    if dtype not in (torch.float32, *HALF_KERNELS.values()):
        raise ArgumentError("float_dtype", dtype, "torch.float32, torch.float16 or torch.bfloat16")


def convert(
    model: nn.Module,
    example_inputs: Any,
    *,
    device: str | torch.device | None = None,
    measure: bool = True,
    float_dtype: torch.dtype = torch.float32,
    plan: Plan | None = None,
    cache: bool = True,
    progress: bool = True,
) -> ConvertedModel:
    """Convert a model for fast inference. The model itself stays as it is.

    Every convolution and linear gets the fastest kernel that computes the same: timed on ``example_inputs`` on this
    device against the best dense float kernel. Only layers that :func:`cnncomp.quantize` has seen run in int8; one of
    these whose int8 kernel is no faster runs in float, on the same quantised weights but with its input neither rounded
    nor clipped. At the end the whole network is timed against the dense one; if it loses, the dense one is returned and
    ``plan.reason`` says so. On a GPU every layer and the network are timed in float16 and bfloat16, channels_last, too: what
    int8 has to beat where ``float_dtype`` allows it, and what the plan names beside it where not.

    Args:
        model: a trained module, pruned, quantised, both or neither; or a :class:`ConvertedModel`, to plan it again.
        example_inputs: a tensor, a tuple of positional arguments (tensors, or lists and dictionaries of them), or a mapping
            of arguments by name, of the size to be fast for. Any other batch or image size works too.
        device: where it will run; by default where the inputs lie.
        measure: False takes a rule of thumb instead of timing.
        float_dtype: what layers that do not run in int8 may compute in on a GPU: float32, or also float16 or bfloat16, whose
            rounding changes the outputs and whose range may be too small. The model's own inputs and outputs stay float32.
        plan: replay this plan instead of choosing. Layers that it does not name are chosen by the rule of thumb.
        cache: keep measured plans on disk, per device, version and shape.
        progress: show a bar when it takes longer than a second.

    Raises:
        ArgumentError: no module or one that can't be copied, no tensor among the inputs, inputs that the model fails on, a
            plan with a kernel that can't run its layer, another ``float_dtype``.
        DeviceError: a device that isn't there.
    """
    if plan is not None and not isinstance(plan, Plan):
        raise ArgumentError("plan", type(plan).__name__, "a cnncomp.Plan (Plan.from_json for one that was exported)")
    check_float_dtype(float_dtype)
    inputs = as_inputs(example_inputs, model)
    if device is None:
        device = next(x.device for x in tree_leaves(inputs) if isinstance(x, Tensor))
    where = resolve_device(device)
    inputs = tree_map(lambda x: x.to(where) if isinstance(x, Tensor) else x, inputs)
    inputs = cloned(inputs)  # the model's forward may change them
    if isinstance(model, ConvertedModel):
        model = model.network
    if isinstance(model, nn.Module) and any(p.device != where for p in model.parameters()):
        model = clone_for_inference(model).to(where)
    with torch.autocast(where.type, enabled=False):  # converted layers compute in float32, also inside it
        planner = NetworkPlanner(trace(model, inputs), inputs, where, float_dtype)
        plan = _settle(planner, plan, measure, cache, progress)
    nested = any(isinstance(x, (tuple, list, dict)) for x in inputs)  # which shapes alone do not describe
    tensors = [] if nested else [x for x in inputs if isinstance(x, Tensor)]
    shapes = [(list(x.shape), str(x.dtype).removeprefix("torch.")) for x in tensors]
    return ConvertedModel(planner.module, Conversion(plan, planner.kept, shapes)).eval()


def _settle(planner: NetworkPlanner, plan: Plan | None, measure: bool, cache: bool, progress: bool) -> Plan:
    """Convert the planner's network by the plan given, a cached one, measurement, or the rule of thumb."""
    if plan is not None:
        return planner.replay(plan)
    if not measure:
        return planner.rule_of_thumb()
    if cache and (cached := load_cached(planner.key)) is not None and cached.layers.keys() == planner.names:
        try:
            return planner.replay(cached)
        except ArgumentError:
            pass  # written by another version: measured anew
    with track("measuring kernels", planner.num_layers, show=progress) as advance:
        plan = planner.measure(advance)
    if cache:
        store_cached(plan)
    return plan
