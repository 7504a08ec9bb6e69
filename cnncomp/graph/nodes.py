"""Small helpers on fx nodes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from cnncomp.quantization import QuantizeInputHook


def module_at(gm: fx.GraphModule, node: fx.Node) -> nn.Module:
    """The module that a ``call_module`` node calls."""
    assert node.op == "call_module"
    return gm.get_submodule(str(node.target))


def put_module(gm: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    """Make ``node`` call ``module`` instead."""
    gm.set_submodule(str(node.target), module)


def input_node(node: fx.Node, i: int) -> fx.Node:
    """The i-th positional argument, which is a node."""
    arg = node.args[i]
    assert isinstance(arg, fx.Node)
    return arg


def has_user_hooks(module: nn.Module) -> bool:
    """Whether anyone but cnncomp.quantize hooked the module."""
    hooks = [
        *module._forward_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
        *(h for h in module._forward_pre_hooks.values() if not isinstance(h, QuantizeInputHook)),
    ]
    return bool(hooks)


def cloned(values: Any) -> tuple[Any, ...]:
    """Arguments of a call that may change its tensors, also those in tuples, lists and dictionaries."""
    return tuple(tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, values))
