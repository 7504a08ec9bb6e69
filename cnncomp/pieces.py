"""Large batches, some images at a time through the whole network, so that what lies between its layers stays in the cache.

Layer by layer, a batch writes and reads all its activations once per layer, which from some size on is the memory's work: the
images per second fall. Image by image, the weights are read for each. Between the two lies what :data:`PIECE_BYTES` allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from cnncomp.executor import Recording
from cnncomp.graph import operations as op
from cnncomp.nn import KERNEL_MODULES, ConvertedLayer

#: Activations that live at the same time, at most: half of a small last-level cache. Measured on ResNet-50 and MobileNetV2: the
#: images per second are the same from 5 to 15 MB, and fall by a fifth to a half beyond.
PIECE_BYTES = 8 << 20
#: Fewer images at a time would read the weights more often than they save.
LEAST = 2

#: Modules that take each image alone; a converted network is never in training mode. What nn.Flatten or a view does to the
#: batch shows in the first dimension of its result.
_MODULES = (
    ConvertedLayer, *KERNEL_MODULES, nn.Flatten, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm,
)  # fmt: skip


def recorded(gm: fx.GraphModule, args: tuple[Any, ...]) -> Recording | Pieces:
    """The network recorded for inputs like ``args``: at once, or in pieces where that keeps them in the cache and the images
    of a batch don't meet in it.

    Raises:
        NotRecordable: as :class:`Recording`.
    """
    images = _images(args)
    if images is None or images <= LEAST:
        return Recording(gm, args)
    try:
        probe = Recording(gm, _part(args, 0, LEAST))
    except Exception:  # the network's own code may take this number of images only, and raise anything
        return Recording(gm, args)
    if not images_apart(probe):
        return Recording(gm, args)
    most = max(LEAST, PIECE_BYTES * LEAST // max(1, probe.arena_bytes))
    if most >= images:
        return Recording(gm, args)
    return Pieces(probe, args, images, most)


class Pieces:
    """A network recorded for pieces of a batch. Is used as a :class:`Recording`."""

    def __init__(self, probe: Recording, args: tuple[Any, ...], images: int, most: int) -> None:
        """
        Args:
            probe: The network recorded for the first :data:`LEAST` images.
            images: In the batch.
            most: In a piece.
        """
        count = -(-images // most)
        self.sizes = [images // count + (i < images % count) for i in range(count)]
        known = {LEAST: probe}
        self.recordings = {
            size: known.get(size) or Recording(probe.gm, _part(args, 0, size)) for size in sorted(set(self.sizes))
        }
        self.modules, self.parameters = probe.modules, probe.parameters

    def valid(self, gm: nn.Module) -> bool:
        """Whether the network is still the one that was recorded."""
        return all(r.valid(gm) for r in self.recordings.values())

    def run(self, args: tuple[Any, ...]) -> Any:
        """What the network returns for inputs like the recorded ones.

        Raises:
            NotRecordable: a function in it returned something of another shape than then.
        """
        results, first = [], 0
        for size in self.sizes:
            results.append(self.recordings[size].run(_part(args, first, size)))
            first += size
        return tree_map(lambda *parts: torch.cat(parts), *results)


def _images(args: tuple[Any, ...]) -> int | None:
    """Images in the batch; None if the arguments don't agree on it, or are no batches."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    sizes = {x.shape[0] if x.dim() > 1 else 0 for x in tensors}
    return sizes.pop() or None if len(sizes) == 1 else None


def _part(args: tuple[Any, ...], first: int, size: int) -> tuple[Any, ...]:
    return tuple(x[first : first + size] if isinstance(x, Tensor) else x for x in args)


def images_apart(recording: Recording) -> bool:
    """Whether nothing that is computed for one image of the batch depends on another, as far as is known: each value has the
    batch in its first dimension, and comes from the same images of its inputs."""
    values, images = recording.values, LEAST
    for node, value in values.items():
        if node.op == "get_attr":
            continue
        leaves = tree_leaves(value)
        if any(isinstance(t, Tensor) and t.shape[:1] != (images,) for t in leaves):
            return False
        if node.op == "output":
            return all(isinstance(t, Tensor) for t in leaves)
        if node.op == "placeholder":
            continue
        if not isinstance(value, Tensor):
            # Sizes, which a view may be given; in a sum they would make the batch count.
            if not op.reads_shape(node.target, node.args[1:]) and node.target not in op.INDEXING:
                return False
            if any(isinstance(values.get(user), Tensor) and user.target not in op.RESHAPING for user in node.users):
                return False
        elif not _by_image(recording.gm, node, values):
            return False
    return True


def _by_image(gm: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """Whether an operation that gives a tensor takes each image alone."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return isinstance(module, _MODULES) or op.is_channelwise(module)
    if node.target in op.COMBINING:
        # A vector for each image, (N,), would meet the last dimension of the other.
        return len({values[n].dim() for n in node.all_input_nodes if isinstance(values[n], Tensor)}) == 1
    if node.target in op.REDUCING:
        dims = op.arguments(node, ("dim",), (None,))[0]
        dims = dims if isinstance(dims, (tuple, list)) else [dims]
        ndim = values[node.all_input_nodes[0]].dim()
        return all(isinstance(d, int) and d % ndim for d in dims)
    return node.target in op.CHANNELWISE | op.CONCATENATING | op.FLATTENING | op.RESHAPING | op.SQUEEZING
