"""One process or many: what training needs to know of the others. Without a process group, all of it is the identity.

Under ``torchrun`` a script opens :func:`process_group` and stays otherwise the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, 0 without others."""
    return dist.get_rank() if initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if initialized() else 1


def local_device() -> torch.device:
    """The GPU of this process on its machine, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def process_group(backend: str | None = None) -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` started, and yield this one's device; alone where it started none.

    Args:
        backend: "nccl" on GPUs and "gloo" on CPUs by default.
    """
    device = local_device()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or initialized():
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend or ("nccl" if device.type == "cuda" else "gloo"))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def mean(values: Tensor) -> Tensor:
    """``values`` averaged over the processes, in each of them."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values


def broadcast(value: Any) -> Any:
    """What the first process has, a picklable object, in each of them."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather(value: Any) -> list[Any]:
    """What each process has, picklable objects, in order of their ranks, in each of them."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def joined(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of all processes, each joined in order of the ranks, in each of them.

    For calibration and for scores: ``quantize(model, joined(batches))`` gives every process the same scales, and
    ``prune(model, data=list(joined(batches)), ...)`` the same masks, as one process would get from the joined batches.

    Args:
        batches: Tensors, or tuples or lists of tensors. Each process may have another number of them.
    """
    iterator = iter(batches)
    while True:
        parts = [part for part in gather(next(iterator, None)) if part is not None]
        if not parts:
            return
        if isinstance(parts[0], Tensor):
            yield torch.cat(parts)
        else:
            yield tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def synchronize(module: nn.Module) -> None:
    """Parameters and buffers of the first process, in place, in each of them.

    Gradients are averaged in training, but the running statistics of a BatchNorm are those of a process's own images.
    """
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, 0)
