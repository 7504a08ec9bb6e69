"""Training on two processes under torchrun, with gloo, against one process with the joined batches."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cnncomp
from cnncomp import data
from cnncomp.distillation import distill
from cnncomp.errors import ArgumentError, TrainingError
from cnncomp.training import Batches, Settings, cross_entropy, distributed, train

SETTINGS = Settings(epochs=2, lr=0.05)


class FrozenNorm(nn.BatchNorm2d):
    """Stays in eval mode: its statistics are those it has, on one process as on many."""

    def train(self, mode: bool = True) -> FrozenNorm:
        return super().train(False)


def net(norm: type[nn.BatchNorm2d], dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 12, 3), norm(12), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(12, 10))


def loader(labels: bool = True) -> Batches:
    split = data.digits()
    y = split.train_labels[:200] if labels else None
    return Batches(split.train_images[:200], y, 32, rank=distributed.rank(), world_size=distributed.world_size())


def one_process_loader() -> list[Any]:
    """What two processes see together: full batches only."""
    return [batch for batch in Batches(*images(), 32, shuffle=False) if len(batch[0]) == 32]


def images() -> tuple[Tensor, Tensor]:
    split = data.digits()
    return split.train_images[:192], split.train_labels[:192]


def ordered() -> Batches:
    return Batches(*images(), 32, shuffle=False, rank=distributed.rank(), world_size=distributed.world_size())


def stop_at(step: int) -> Any:
    def stop(i: int) -> None:
        if i == step:
            raise KeyboardInterrupt

    return stop


def frozen_training() -> dict[str, Tensor]:
    """Trained from the joined batches, then pruned by scores and quantised, both from what all processes see."""
    model = net(FrozenNorm)
    train(model, ordered() if distributed.world_size() > 1 else one_process_loader(), SETTINGS)
    weights = copy.deepcopy(model.state_dict())
    mine = [
        images()[0][distributed.rank() :: distributed.world_size()],
        images()[1][distributed.rank() :: distributed.world_size()],
    ]
    joined = list(distributed.joined([tuple(mine)]))
    cnncomp.prune(model, 0.5, criterion="fisher", data=joined, include_first_last=True, progress=False)
    cnncomp.quantize(model, [x for x, _ in joined], progress=False)
    return {**{f"trained.{k}": v for k, v in weights.items()}, **model.state_dict()}


def resumed_training(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """With a BatchNorm that is not frozen and dropout: uninterrupted, and stopped in the second epoch and resumed."""
    whole, model = net(nn.BatchNorm2d, 0.3), net(nn.BatchNorm2d, 0.3)
    train(whole, loader(), SETTINGS)
    options: dict[str, Any] = {"checkpoint": folder / "c", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train(model, loader(), SETTINGS, after_step=stop_at(8), **options)
    model = net(nn.BatchNorm2d, 0.3)
    train(model, loader(), SETTINGS, **options)
    return whole.state_dict(), model.state_dict()


def nan_on_one() -> str:
    """The message, in every process, of a loss that is NaN in the second one only."""

    def objective(model: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
        return cross_entropy(model, x, y) * (math.nan if distributed.rank() == 1 else 1)

    with pytest.raises(TrainingError) as error:
        train(net(nn.BatchNorm2d), loader(), SETTINGS, objective=objective)
    return str(error.value)


def distilled() -> dict[str, Tensor]:
    student = net(nn.BatchNorm2d)
    distill(student, net(FrozenNorm).eval(), loader(labels=False), SETTINGS, hints={"0": "0"})
    return student.state_dict()


def main(folder: Path) -> None:
    """What each process does; ``torchrun`` runs this file."""
    torch.set_num_threads(1)
    with distributed.process_group() as device:
        assert device.type == "cpu" or torch.cuda.is_available()
        assert distributed.world_size() == 2
        results = {
            "frozen": frozen_training(),
            "resumed": resumed_training(folder),
            "nan": nan_on_one(),
            "distilled": distilled(),
        }
        torch.save(results, folder / f"rank{distributed.rank()}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        __file__,
        str(folder),
    ]
    done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def test_weights_masks_and_scales_are_the_same_in_every_process(ranks: list[dict[str, Any]]) -> None:
    for key in ("frozen", "distilled"):
        assert equal(ranks[0][key], ranks[1][key])
    assert equal(ranks[0]["resumed"][0], ranks[1]["resumed"][0])
    names = ranks[0]["frozen"].keys()
    assert any("mask" in name for name in names) and any("scale" in name for name in names)


def test_two_processes_train_as_one_with_the_joined_batch(ranks: list[dict[str, Any]]) -> None:
    one, two = frozen_training(), ranks[0]["frozen"]
    assert one.keys() == two.keys()
    start = net(FrozenNorm).state_dict()
    for name, t in one.items():
        if name.startswith("trained."):
            assert torch.allclose(t, two[name], rtol=0, atol=1e-5), name
            assert name.split(".")[-1] != "weight" or t.ndim < 2 or not torch.allclose(t, start[name[8:]], atol=1e-3)
        elif t.dtype == torch.bool:
            assert torch.equal(t, two[name]), name
        else:
            assert torch.allclose(t.float(), two[name].float(), rtol=1e-4, atol=1e-5), name


def test_two_processes_resume_to_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert equal(*rank["resumed"])


def test_a_nan_in_one_process_stops_all(ranks: list[dict[str, Any]]) -> None:
    assert "the loss is no longer finite in epoch 1, step 1" in ranks[0]["nan"] == ranks[1]["nan"]


def test_alone_it_is_the_identity() -> None:
    x = torch.rand(3)
    assert distributed.mean(x) is x and distributed.broadcast(x) is x and distributed.gather(1) == [1]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    (batch,) = distributed.joined([(x, x)])
    assert torch.equal(batch[0], x)
    with distributed.process_group() as device:
        assert device == distributed.local_device()
    with pytest.raises(ArgumentError, match="rank"):
        Batches(torch.rand(4, 1, 2, 2), None, 2, rank=2, world_size=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
