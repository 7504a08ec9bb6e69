"""``cnncomp.save`` and ``cnncomp.load``: a converted model as one file.

The file (``_container``) holds the layers' tensors in machine-independent form, and network, plan and provenance as JSON.
Nothing in it is executed: a file can only name what stands in the tables of ``_graph_json`` and ``_module_json``.

A tensor with enough zeros is stored as two: ``<name>:mask``, one bit per element in row-major order, the first in the
lowest bit, and ``<name>:values``, the others in the same order.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import secrets
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from cnncomp._container import Document, Tensors, contents, seal, unpack
from cnncomp._graph_json import (
    DTYPES,
    check_disjoint,
    decode_graph,
    encode_graph,
    paths_of,
)
from cnncomp._memory import trim_heap
from cnncomp._module_json import decode_module, encode_module
from cnncomp._modules import resolve_device
from cnncomp._version import __version__
from cnncomp.convert import Conversion, ConvertedModel, convert
from cnncomp.dispatch import CONV_CANDIDATES, LINEAR_CANDIDATES, Plan, device_key
from cnncomp.errors import ArgumentError, DeviceError, FileFormatError, SerializationError
from cnncomp.graph.chain import settle_units
from cnncomp.nn import ConvertedLayer

#: Zeros are taken out of a tensor where that makes it smaller than this fraction: int8 from 18 % zeros, fp32 from 9 %.
BITMAP_BELOW = 0.95
#: Bytes that one more tensor takes in a file's header, about.
HEADER_ENTRY = 128
#: Layers of as many bytes leave enough behind when they are packed that it is given back at once.
TRIM_ABOVE = 2**20
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def save(model: ConvertedModel, path: str | os.PathLike[str]) -> None:
    """Write a converted model to one file, atomically: on failure nothing is left behind and an old file stays.

    The file is independent of the machine. int8 weights take one byte each, and zeros of any weight one bit.

    Args:
        model: what :func:`cnncomp.convert` or :func:`load` returned.

    Raises:
        ArgumentError: another kind of model.
        SerializationError: a network that could not be traced as a whole, or a module or function that files don't
            hold; names it and says what to do.
        OSError: the file can't be written.
    """
    if not isinstance(model, ConvertedModel):
        raise ArgumentError("model", type(model).__name__, "what cnncomp.convert returned")
    document, tensors = _encode(model)
    tensors, document["bitmaps"] = _take_out_zeros(tensors)
    _write_atomically(Path(path), seal(document, _own_storage(tensors)))


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    replan: bool | Literal["auto"] = "auto",
) -> ConvertedModel:
    """Read a model that :func:`save` wrote.

    Args:
        device: where it will run; by default the kind of device it was saved on, or the CPU where there is none.
        replan: "auto" chooses the kernels anew, as :func:`cnncomp.convert` does (measured if they were measured
            before), if they were chosen on another kind of machine; True always; False keeps them.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: a file that is truncated, damaged, of a newer version, or not from cnncomp.
        DeviceError: a device that isn't there, or one that a kept kernel does not run on.
        SerializationError: ``replan=True`` for a network that takes more than tensors.
        ArgumentError: another value of ``replan``.
    """
    if replan not in ("auto", True, False):
        raise ArgumentError("replan", repr(replan), "'auto', True or False")
    path = Path(path)
    model, saved_on = _parse(path)
    if device is None:
        device = "cuda" if saved_on == "cuda" and torch.cuda.is_available() else "cpu"
    where = resolve_device(device)
    model.to(where)
    if replan is True or (replan == "auto" and device_key(where) != model.plan.device):
        inputs = _inputs_like(model, where)
        if inputs is not None:
            kept = model.conversion.kept
            float_dtype = DTYPES[model.plan.float_dtype]
            model = convert(model, inputs, device=where, measure=model.plan.measured, float_dtype=float_dtype)
            model.conversion.kept = {**kept, **model.conversion.kept}
            return model
        if replan is True:
            raise SerializationError(
                f"{path}: the network takes more than tensors, so no inputs can be made up: load it with replan=False "
                "and give it to cnncomp.convert with inputs of yours"
            )
    _check_runs_on(model, where)
    return model


def _check_runs_on(model: ConvertedModel, device: torch.device) -> None:
    candidates = {c.kernel: c for c in (*CONV_CANDIDATES, *LINEAR_CANDIDATES)}
    for name, layer in model.network.named_modules():
        if isinstance(layer, ConvertedLayer):
            candidate = candidates[layer.kernel]
            if not candidate.dense and device.type not in candidate.devices:
                got = f"{str(device)!r} for layer {name!r}, whose kernel is {layer.kernel}"
                raise DeviceError("device", got, f"{' or '.join(candidate.devices)}, or replan=True")


def _inputs_like(model: ConvertedModel, device: torch.device) -> tuple[Tensor, ...] | None:
    """Random inputs of the shapes that the model was converted for; None if it needs others than tensors too."""
    assert isinstance(model.network, fx.GraphModule)
    arguments = [n for n in model.network.graph.nodes if n.op == "placeholder"]
    needed = sum(1 for n in arguments if not n.args)
    shapes = model.conversion.inputs
    if not needed <= len(shapes) <= len(arguments):
        return None
    made = []
    for shape, name in shapes:
        dtype = DTYPES[name]
        zeros = torch.zeros(shape, dtype=dtype, device=device)
        made.append(torch.rand_like(zeros) if dtype.is_floating_point else zeros)
    return tuple(made)


def _encode(model: ConvertedModel) -> tuple[Document, Tensors]:
    network, conversion = model.network, model.conversion
    if not isinstance(network, fx.GraphModule):
        reason = conversion.kept.get("(model)", "it could not be traced")
        raise SerializationError(
            f"the network, a {type(network).__name__}, can't be saved as a graph ({reason}): convert and save the "
            "parts of it that can be traced, or rewrite its forward without control flow on tensors"
        )
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise SerializationError(
                f"layer {name.removeprefix('network.') or '(model)'!r} has hooks, which can't be saved: remove them "
                "before cnncomp.convert"
            )
    graph = encode_graph(network.graph)
    modules: dict[str, Any] = {}
    tensors: Tensors = {}
    for path in paths_of(graph, "call_module"):
        modules[path], own = encode_module(path, network.get_submodule(path))
        tensors.update({f"{path}.{name}": t for name, t in own.items()})
    for path in paths_of(graph, "get_attr"):
        tensors[path] = _attribute(network, path)
    try:
        check_disjoint({*modules, *paths_of(graph, "get_attr")})
    except ValueError as error:
        raise SerializationError(f"the network can't be saved: {error}, and is used on its own too") from error
    where = next((t.device.type for t in tensors.values()), "cpu")
    document = {
        "provenance": {
            "cnncomp": __version__,
            "torch": torch.__version__,
            "device": conversion.plan.device,
            "device_type": where,
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        },
        "graph": graph,
        "modules": modules,
        "plan": conversion.plan.to_json(),
        "kept": conversion.kept,
        "inputs": [[list(shape), dtype] for shape, dtype in conversion.inputs],
    }
    return document, {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _attribute(network: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    value = getattr(network.get_submodule(owner), name)
    if not isinstance(value, Tensor):
        raise SerializationError(f"the forward reads {path!r}, a {type(value).__name__}: only tensors can be saved")
    return value


def _own_storage(tensors: Tensors) -> Tensors:
    """Tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    out: Tensors = {}
    for name, t in tensors.items():
        key = t.untyped_storage().data_ptr()
        out[name] = t.clone() if key in seen else t
        seen.add(key)
    return out


def _take_out_zeros(tensors: Tensors) -> tuple[Tensors, dict[str, list[int]]]:
    """Replace tensors with many zeros by mask and values; also returns their shapes by name. −0.0 is no zero."""
    out: Tensors = {}
    shapes: dict[str, list[int]] = {}
    for name, t in tensors.items():
        size = t.element_size()
        if t.dtype == torch.bool or t.is_complex() or t.dim() == 0:
            out[name] = t
            continue
        flat = t.reshape(-1)
        mask = flat.view(_BITS[size]) != 0
        if HEADER_ENTRY + math.ceil(t.numel() / 8) + size * int(mask.sum()) >= BITMAP_BELOW * size * t.numel():
            out[name] = t
            continue
        shapes[name] = list(t.shape)
        out[f"{name}:mask"] = torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
        out[f"{name}:values"] = flat[mask]
    return out, shapes


def _put_zeros_back(tensors: Tensors, shapes: dict[str, list[int]]) -> Tensors:
    """The inverse of :func:`_take_out_zeros`.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: parts that do not fit each other.
    """
    out = dict(tensors)
    for name, shape in shapes.items():
        packed, values = out.pop(f"{name}:mask"), out.pop(f"{name}:values")
        n = math.prod(shape)
        if name in out or packed.dtype != torch.uint8 or packed.shape != (math.ceil(n / 8),):
            raise ValueError(f"the mask of tensor {name!r} does not fit its shape {shape}")
        mask = torch.from_numpy(np.unpackbits(packed.numpy(), bitorder="little")[:n]).view(torch.bool)
        if int(mask.count_nonzero()) != values.numel():
            raise ValueError(f"the mask of tensor {name!r} does not fit its {values.numel()} values")
        flat = torch.zeros(n, dtype=values.dtype).masked_scatter_(mask, values)
        out[name] = flat.reshape(shape)
    return out


def _write_atomically(path: Path, data: bytearray) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as error:
        _remove(temporary)
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # not the temporary file's name
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _parse(path: Path) -> tuple[ConvertedModel, str]:
    """The model on the CPU, and the type of device it was saved on.

    Raises:
        OSError: no file that can be read.
        FileFormatError: for whatever is wrong with it.
    """
    try:
        document, tensors = contents(unpack(path.read_bytes()))
    except OSError:
        raise
    except Exception as error:
        raise FileFormatError(f"{path}: {error}") from error
    try:
        return _decode(document, tensors), str(document["provenance"]["device_type"])
    except Exception as error:  # a file with the right checksum that save did not write
        reason = f"{type(error).__name__}: {error}"
        raise FileFormatError(f"{path}: its contents don't make a model ({reason})") from error


def _decode(document: Document, tensors: Tensors) -> ConvertedModel:
    bitmaps = dict(document["bitmaps"])
    encoded = document["graph"]
    graph = decode_graph(encoded)
    called, read = paths_of(encoded, "call_module"), paths_of(encoded, "get_attr")
    check_disjoint({*called, *read})
    if set(called) != set(document["modules"]):
        raise ValueError("the graph does not call the modules that are there")
    parts: dict[str, nn.Module | Tensor] = {path: _take(path, tensors, bitmaps)[path].clone() for path in read}
    # One at a time: with their zeros, the weights of all layers would take many times the model's memory.
    for path in called:
        own = _take(path, tensors, bitmaps)
        encoded_module = document["modules"][path]
        size = sum(t.nbytes for t in own.values())
        parts[path] = decode_module(encoded_module, {name.removeprefix(f"{path}."): t for name, t in own.items()})
        if size >= TRIM_ABOVE:
            del own
            trim_heap()
    if tensors or bitmaps:
        raise ValueError(f"tensors that belong to no layer: {sorted({*tensors, *bitmaps})}")
    network = fx.GraphModule(_assemble(parts), graph)
    settle_units(network)
    conversion = Conversion(_decode_plan(document["plan"]), _decode_kept(document["kept"]))
    conversion.inputs = [_decode_input(*entry) for entry in document["inputs"]]
    return ConvertedModel(network, conversion).eval().requires_grad_(False)


def _take(path: str, tensors: Tensors, bitmaps: dict[str, list[int]]) -> Tensors:
    """The tensor ``path`` and those below it, by name, with their zeros; taken out of both."""

    def ours(name: str) -> bool:
        return name.partition(":")[0] == path or name.startswith(f"{path}.")

    own = {name: tensors.pop(name) for name in list(tensors) if ours(name)}
    return _put_zeros_back(own, {name: bitmaps.pop(name) for name in list(bitmaps) if ours(name)})


def _assemble(parts: dict[str, nn.Module | Tensor]) -> nn.Module:
    """Modules and tensors as the tree that their paths describe."""
    root = nn.Module()
    for path, part in parts.items():
        owner = root
        *parents, name = path.split(".")
        for parent in parents:
            if parent not in owner._modules:
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        if isinstance(part, Tensor):
            owner.register_buffer(name, part)
        else:
            owner.add_module(name, part)
    return root


def _decode_plan(text: str) -> Plan:
    plan = Plan.from_json(text)
    known = {c.kernel for c in (*CONV_CANDIDATES, *LINEAR_CANDIDATES)}
    for name, layer in plan.layers.items():
        if layer.kernel not in known:
            raise ValueError(f"layer {name!r} runs the unknown kernel {layer.kernel!r}")
    return plan


def _decode_kept(kept: dict[str, Any]) -> dict[str, str]:
    return {str(name): str(reason) for name, reason in kept.items()}


def _decode_input(shape: Any, dtype: Any) -> tuple[list[int], str]:
    if dtype not in DTYPES or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"an input of shape {shape} and dtype {dtype}")
    return list(shape), dtype
