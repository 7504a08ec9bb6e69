"""Pruning in two processes: the same masks and weights in both, and those that one process finds on the joined data."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from cnncomp.pruning import RigL, WeightPruning, prune


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1),
        nn.Flatten(), nn.Linear(8 * 16, 4),
    ).eval()  # fmt: skip


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 1, 8, 8, generator=generator), torch.randint(0, 4, (6,), generator=generator)) for _ in range(6)
    ]


def results(batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """All that pruning finds with these batches."""
    found = {}
    for criterion in ("taylor", "fisher", "article"):
        model = prune(net(), 0.5, criterion=criterion, data=batches, scope="layer")
        found.update({f"{criterion}.{k}": v for k, v in model.state_dict().items()})
    for name, options in {"reconstruct": {"reconstruct": True}, "sensitivity": {"allocation": "sensitivity"}}.items():
        model = prune(net(), 0.5, data=batches, **options)
        found.update({f"{name}.{k}": v for k, v in model.state_dict().items()})
    model = net()
    rigl = RigL(model, 0.5, every=1, end=10)
    rigl.step(0)
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
    rigl.step(1)
    found.update({f"rigl.{k}": v for k, v in model.state_dict().items() if k.endswith("mask")})
    pruner = WeightPruning(net(), 0.2)
    pruner.step(sum(F.cross_entropy(pruner(x), y) for x, y in batches) / len(batches))
    found.update({f"article step.{k}": v for k, v in pruner.state_dict().items()})
    return copy.deepcopy(found)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(results(data()[rank::2]), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_prune_as_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    joined = results(data())
    assert first.keys() == second.keys() == joined.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        if key.startswith("sensitivity"):
            continue  # errors are means over processes, whatever the size of their share
        if value.dtype == torch.bool:
            assert torch.equal(value, joined[key]), key
        else:
            torch.testing.assert_close(value, joined[key], rtol=1e-4, atol=1e-5)
