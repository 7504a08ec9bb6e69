"""What the command line reads and checks before it starts to work: networks, weights, images, names of files."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp import data
from cnncomp.errors import ArgumentError, FileFormatError
from cnncomp.progress import track

#: From this many images on, every fifth is kept out of calibration, to compare with full precision.
HOLD_OUT_FROM = 10

#: Where a checkpoint may keep its state dict.
_CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model")
#: What wrappers put before every name: DataParallel and DistributedDataParallel, torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")
_MASKED = "parametrizations.weight."


def first_line(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def load_network(name: str, weights: Path | None) -> nn.Module:
    """The network that ``module:function`` returns, with ``weights`` in it, in eval mode.

    Raises:
        ArgumentError: no such module or function, one that fails, no network, or weights of another network.
        FileFormatError: weights that can't be read.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ArgumentError("--model", repr(name), "MODULE:FUNCTION")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the module is the user's code
        raise ArgumentError("--model", f"{name!r} ({first_line(error)})", "a function that can be imported") from error
    finally:
        sys.path.pop(0)
    try:
        network = function if isinstance(function, nn.Module) or not callable(function) else function()
    except Exception as error:
        got = f"{name!r}, which raises {first_line(error)}"
        raise ArgumentError("--model", got, "a function that takes no arguments and returns the network") from error
    if not isinstance(network, nn.Module):
        raise ArgumentError("--model", f"{name!r}, which gives a {type(network).__name__}", "a torch.nn.Module")
    if weights is not None:
        try:
            network.load_state_dict(read_weights(weights))
        except RuntimeError as error:
            raise ArgumentError("--weights", f"{str(weights)!r} ({error})", f"the state dict of {name}") from error
    return network.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, or from one that torch.save wrote: on its own, or as "state_dict", "model" or
    "model_state_dict" in a checkpoint. Prefixes of wrappers go, masks of :func:`cnncomp.prune` go into the weights. No code in
    the file is run.

    Raises:
        FileFormatError: another file, or the weights of a quantised network.
        FileNotFoundError: no such file.
    """
    found: Any
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            found = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileFormatError(f"{path} can't be read as weights: {reason}") from error
    if isinstance(found, dict):
        found = next((found[k] for k in _CHECKPOINT_KEYS if isinstance(found.get(k), dict)), found)
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise FileFormatError(f"{path} holds a {type(found).__name__}, not a state dict of tensors")
    for prefix in _WRAPPERS:
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): t for name, t in found.items()}
    return _without_masks(path, found)


def _without_masks(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain state dict of a pruned network."""
    out = dict(weights)
    for name in [name for name in weights if name.endswith(f"{_MASKED}original")]:
        layer = name.removesuffix(f"{_MASKED}original")
        parts = {k: out.pop(k) for k in weights if k.startswith(layer + _MASKED) and k != name}
        if any(not k.endswith(".mask") or v.dtype != torch.bool for k, v in parts.items()):
            raise FileFormatError(
                f"{path} holds a network that is quantised or parametrised otherwise (layer {layer.rstrip('.')!r}): convert "
                "it in Python, with cnncomp.convert, or save the weights before cnncomp.quantize"
            )
        weight = out.pop(name)
        for mask in parts.values():
            weight = weight.masked_fill(~mask, 0)
        out[f"{layer}weight"] = weight
    return out


def read_images(folder: Path, size: int, channels: int = 3) -> Tensor:
    """All images of a folder, preprocessed: (N, channels, size, size).

    Raises:
        ArgumentError: no image there, or neither one nor three channels.
    """
    if channels not in (1, 3):
        raise ArgumentError("--channels", channels, "3 (RGB) or 1 (grey) where images are given")
    photos = data.image_folder(folder)
    pictures = []
    with track("preparing images", len(photos)) as advance:
        for photo in photos:
            image = photo.image if channels == 3 else photo.image.convert("L")
            # The three channels of a grey image differ in their normalisation: one gets the mean of it.
            pictures.append(data.preprocess(image, size).view(channels, -1, size, size).mean(1))
            advance(photo.name)
    return torch.stack(pictures)


def split(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Images to calibrate on and images to compare on; the same ones where there are few."""
    if len(pictures) < HOLD_OUT_FROM:
        return pictures, pictures
    held_out = torch.arange(len(pictures), device=pictures.device) % 5 == 4
    return pictures[~held_out], pictures[held_out]


def parse_shape(text: str) -> tuple[int, ...]:
    """ "1,3,224,224" as sizes.

    Raises:
        ArgumentError: anything else.
    """
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ArgumentError("--shape", repr(text), "sizes like 1,3,224,224")
    return sizes


def check_output(option: str, path: Path | None) -> None:
    """Raise :class:`ArgumentError` unless a file ``path`` can be written, before the work is done that goes into it."""
    if path is None:
        return
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "is a folder" if path.is_dir() else "can't be written to" if folder.is_dir() else "does not exist"
        which = path if path.is_dir() else folder
        raise ArgumentError(
            option, f"{str(path)!r} ({str(which)!r} {reason})", "a file in a folder that can be written to"
        )


def check_runs(network: nn.Module, example: Tensor, options: str) -> None:
    """Run the network once.

    Raises:
        ArgumentError: naming ``options``, if it fails.
    """
    try:
        with torch.no_grad():
            network(example)
    except Exception as error:  # whatever the network's own code raises
        got = f"an input of shape {tuple(example.shape)}, on which the network raises {first_line(error)}"
        raise ArgumentError(options, got, "an input that the network takes alone") from error
