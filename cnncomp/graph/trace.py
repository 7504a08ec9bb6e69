"""From a module to a graph of fused dense layers.

``trace`` never fails on a model: what can't be traced, has hooks, is a user's subclass or shares its weights stays as it
is and is named in ``Traced.kept``.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from cnncomp._modules import bake_weight, layers_of, weight_parameter
from cnncomp.errors import ArgumentError, CnncompError
from cnncomp.graph.arguments import optional_arguments, positional, trace_with_fixed
from cnncomp.graph.fuse import READ_ELSEWHERE, fuse
from cnncomp.graph.nodes import cloned, has_user_hooks
from cnncomp.graph.normalize import CannotNormalize
from cnncomp.nn import KERNEL_MODULES, ConvertedLayer, GatheredConv2d
from cnncomp.quantization import ClampChannels, QuantizeInputHook, quantization_of, remove_layer_quantization

CONVERTIBLE = (nn.Conv1d, nn.Conv2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass
class Traced:
    """What :func:`trace` found.

    ``module``: a copy of the model in which every convertible layer is a dense :class:`ConvertedLayer`, with BatchNorm,
    activation and residual add folded in. ``graphs``: the traced parts, by path ("" is the whole model), and ``inputs`` what
    each was called with on the example input. ``kept``: path of each layer that stays as it is, and why.
    """

    module: nn.Module
    graphs: dict[str, fx.GraphModule] = field(default_factory=dict)
    inputs: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def base_type(module: nn.Module) -> type[nn.Module]:
    """The layer's class without the parametrisation that prune and quantize add."""
    cls = type(module)
    return cls.__mro__[1] if parametrize.is_parametrized(module) else cls


def why_kept(module: nn.Module, shared: frozenset[int]) -> str | None:
    """Why a convertible layer must stay as it is, or None."""
    if has_user_hooks(module):
        return "has hooks"
    if base_type(module) not in CONVERTIBLE:
        return f"is a subclass, {base_type(module).__name__}"
    if any(id(p) in shared for p in module.parameters()):
        return "shares its weights with another layer"
    if not all(p.dtype == torch.float32 for p in module.parameters()):
        return "is not float32"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.padding_mode != "zeros":
        return f"pads with {module.padding_mode}"
    return None


class _Tracer(fx.Tracer):
    """Leaves: torch's own layers, converted layers, subclasses of what could be converted, and anything with hooks."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = (ConvertedLayer, ClampChannels, *KERNEL_MODULES)
        if isinstance(m, (*ours, *CONVERTIBLE, *_NORMS)) or has_user_hooks(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def _shared_parameters(model: nn.Module) -> frozenset[int]:
    """Ids of parameters that more than one module owns."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return frozenset(i for i, n in owners.items() if n > 1)


def clone_for_inference(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters need no gradient, with masks baked into the weights and converted layers dense
    again.

    Raises:
        ArgumentError: a module that can't be copied.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError("model", "a ScriptModule", "the module that it was scripted from")
    try:
        with torch.inference_mode(False):
            copied = copy.deepcopy(model).eval().requires_grad_(False)
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        for name, layer in layers_of(model).items():
            if not parametrize.is_parametrized(layer, "weight"):
                weight_parameter(layer, name)  # names the layer whose weight something else computes
        expected = "one that copy.deepcopy takes (torch.nn.utils.prune.remove, remove_weight_norm, ... first)"
        raise ArgumentError("model", f"a module that can't be copied: {error}", expected) from error
    for name, layer in list(copied.named_modules()):
        if quantization_of(layer) is None:
            bake_weight(layer)  # inference has no use for masks, and what is parametrised can't be pickled
        # Fused layers quantise by themselves; until then the network runs on unrounded inputs, to be compared with.
        for key in [k for k, hook in layer._forward_pre_hooks.items() if isinstance(hook, QuantizeInputHook)]:
            del layer._forward_pre_hooks[key]
        if isinstance(layer, ConvertedLayer):
            if not name:
                return layer.to_dense()
            copied.set_submodule(name, layer.to_dense())
    return copied


@dataclass
class Call:
    """What a module was called with in one forward, and what it returned."""

    args: tuple[Any, ...]
    result: Any = None


def trace_graph(root: nn.Module, call: Call) -> fx.GraphModule | None:
    """The module's graph, if it can be traced and the graph gives on the recorded call what the module gave.

    Parameters of forward that were not given, or as their defaults, stay free parameters of the graph, but for those that
    tracing fails with, because the code branches on them: these are fixed at their defaults.
    """

    def attempt(fixed: dict[str, Any]) -> fx.GraphModule | None:
        try:
            gm = trace_with_fixed(_Tracer(), root, fixed)
            return gm if gives(gm, call) else None
        except Exception:  # fx, and the model's own code on a proxy, raise anything
            return None

    found, fixed = attempt({}), optional_arguments(root, call.args)
    if found is None and fixed and (found := attempt(fixed)) is not None:
        for name in list(fixed) if len(fixed) > 1 else ():
            fewer = {k: v for k, v in fixed.items() if k != name}
            if (gm := attempt(fewer)) is not None:
                found, fixed = gm, fewer
    return found


def graph_of(model: nn.Module, example_inputs: tuple[Any, ...]) -> fx.GraphModule | None:
    """The model's graph, not fused, its modules the model's own, if it gives what the model gives; None otherwise."""
    call = record_calls(model, example_inputs)[""]
    return None if call is None else trace_graph(model, call)


def gives(module: nn.Module, call: Call) -> bool:
    """Whether the module returns what was recorded."""
    # A GraphModule's __call__ prints a traceback when it fails, which is no failure here.
    run = module.forward if isinstance(module, fx.GraphModule) else module
    with torch.no_grad():
        return same(run(*cloned(call.args)), call.result)


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal but for rounding, in the same structure."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape:
            return False
        a, b = a.double(), b.double()
        finite = b[torch.isfinite(b)]
        # Rounding is relative to what was summed, which outputs near zero do not show: the largest stands for it.
        rounding = 1e-5 + 1e-4 * (float(finite.abs().max()) if finite.numel() else 0.0)
        return torch.allclose(a, b, rtol=1e-3, atol=rounding, equal_nan=True)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and not isinstance(a, Tensor)


def trace(model: nn.Module, example_inputs: tuple[Any, ...]) -> Traced:
    """Copy ``model`` and fuse what can be fused (see :class:`Traced`).

    Args:
        example_inputs: positional arguments of the model's forward; tensors lie on the model's device.
    """
    root = clone_for_inference(model)
    for module in root.modules():
        if isinstance(module, GatheredConv2d):
            module.out_units = False  # values are looked at as images until it is settled again
    return _Visitor(root, example_inputs).traced


def record_calls(root: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, Call | None]:
    """Every module's call in one forward; None where it ran more than once or took keywords only.

    Raises:
        ArgumentError: the forward fails.
    """
    calls: dict[str, Call | None] = {}
    names = {m: name for name, m in root.named_modules(remove_duplicate=False)}
    handles = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = names[module]
        given = positional(module, args, kwargs)
        calls[name] = None if name in calls or given is None else Call(cloned(given))

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if (call := calls[names[module]]) is not None:
            call.result = cloned((result,))[0]

    for module in names:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(after))
    try:
        with torch.no_grad():
            root(*cloned(example_inputs))
    except CnncompError:
        raise
    except Exception as error:
        shapes = [tuple(x.shape) for x in tree_leaves(example_inputs) if isinstance(x, Tensor)]
        reason = (str(error).splitlines() or [""])[0]
        got = f"tensors of the shapes {shapes}, on which it fails ({type(error).__name__}: {reason})"
        raise ArgumentError("example_inputs", got, "what the model's forward takes") from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


class _Visitor:
    """Traces a module as a whole or, where that fails, its children each on its own.

    Whatever is put in a module's place is tried: if the network then returns something else, or raises, because its code
    wanted an attribute or a layout that is gone, the module stays as it was.
    """

    def __init__(self, root: nn.Module, example_inputs: tuple[Any, ...]) -> None:
        self.traced = Traced(root)
        self.shared = _shared_parameters(root)
        self.calls = record_calls(root, example_inputs)
        graph = self._graph(root, "")
        if graph is not None:
            self.traced.module = graph
        else:
            self._children(root, "")
        self._make_plain()

    def _make_plain(self) -> None:
        """Layers that stay lose their quantisation, but for those whose weight the graph computes itself."""
        for name, module in self.traced.module.named_modules():
            if not isinstance(module, CONVERTIBLE):
                continue
            reason = self.traced.kept.get(name, "was not converted")
            if reason != READ_ELSEWHERE and remove_layer_quantization(module):
                self.traced.kept[name] = f"{reason}, and runs in float"
                bake_weight(module)

    def _graph(self, module: nn.Module, path: str) -> fx.GraphModule | None:
        """The module's fused graph, noted in ``traced``; None, and nothing noted, if there is none that gives the same."""
        call = self.calls.get(path)
        if call is None or has_user_hooks(module) or not any(isinstance(a, Tensor) for a in tree_leaves(call.args)):
            return None
        single = isinstance(module, CONVERTIBLE)
        gm = trace_graph(nn.Sequential(module) if single else module, call)
        if gm is None:
            return None

        def full_name(target: str) -> str:
            return path if single else f"{path}.{target}" if path else target

        try:
            kept = fuse(gm, call.args, lambda m: why_kept(m, self.shared), full_name)
            _contiguous_outputs(gm)
            if not gives(gm, call):
                return None
        except CannotNormalize:
            return None
        self.traced.kept.update(kept)
        self.traced.graphs[path], self.traced.inputs[path] = gm, call.args
        return gm

    def _children(self, module: nn.Module, path: str) -> None:
        kept = self.traced.kept
        if has_user_hooks(module) and path:
            kept[path] = "has hooks"
            return
        reason = "has hooks" if has_user_hooks(module) else "its forward can't be traced"
        kept[path or "(model)"] = f"{reason}: its layers were converted one by one"
        for name, child in list(module.named_children()):
            child_path = f"{path}.{name}" if path else name
            if not any(isinstance(m, CONVERTIBLE) for m in child.modules()):
                continue
            if isinstance(child, CONVERTIBLE) and self.calls.get(child_path) is None:
                reached = child_path in self.calls
                kept[child_path] = "is called more than once" if reached else "was not reached by the example input"
                continue
            before = dict(kept)
            graph = self._graph(child, child_path)
            if graph is None:
                self._children(child, child_path)
                continue
            setattr(module, name, graph)
            if not self._network_works():
                setattr(module, name, child)
                del self.traced.graphs[child_path], self.traced.inputs[child_path]
                self.traced.kept = kept = before
                kept[child_path] = "the code around it needs it as it is"

    def _network_works(self) -> bool:
        call = self.calls[""]
        if call is None:
            return False
        try:
            return gives(self.traced.module, call)
        except Exception:  # whatever the network's own code raises
            return False


def _contiguous_outputs(gm: fx.GraphModule) -> None:
    """A network, or a part of one, returns its tensors in torch's own layout, for the code around it may ask for a view."""
    output = next(n for n in gm.graph.nodes if n.op == "output")
    for node in output.all_input_nodes:
        if len(node.meta.get("shape", ())) > 2:  # matrices have one layout
            with gm.graph.inserting_before(output):
                fixed = gm.graph.call_method("contiguous", (node,))
            fixed.meta.update(node.meta)
            output.replace_input_with(node, fixed)
    gm.recompile()
