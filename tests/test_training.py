"""The training loop: resume to the bit, seeds, early stop, divergence, what it writes, and what it refuses."""

from __future__ import annotations

import csv
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cnncomp import data
from cnncomp.errors import ArgumentError, DtypeError, FileFormatError, TrainingError
from cnncomp.models import DigitsNet
from cnncomp.training import Batches, Settings, cross_entropy, shift_and_flip, train

FAST = Settings(epochs=2, lr=0.05)


def toy(seed: int = 0, dropout: float = 0.5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(4 * 36, 10)
    )


def images(n: int = 96) -> tuple[Tensor, Tensor]:
    split = data.digits()
    return split.train_images[:n], split.train_labels[:n]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


class Jittered(TensorDataset):
    """Draws from the generators of torch, Python and NumPy when an image is asked for, as random transforms do."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.rand(()) + 0.1 * random.random() + 0.1 * np.random.rand(), y  # noqa: NPY002


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


def killed_at(step: int) -> Any:
    """Cross-entropy that dies in a given call."""
    calls = 0

    def objective(model: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == step:
            raise Killed
        return cross_entropy(model, x, y)

    return objective


def loaders(kind: str) -> Any:
    x, y = images()
    if kind == "Batches":
        return Batches(x, y, 16, augment=shift_and_flip(1), seed=3)
    if kind == "DataLoader of random images":
        return DataLoader(Jittered(x, y), 16, shuffle=True)
    generator = torch.Generator() if kind == "DataLoader with a generator" else None
    return DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=generator)


@pytest.mark.parametrize("kind", ["Batches", "DataLoader of random images", "DataLoader with a generator"])
@pytest.mark.parametrize(
    "settings", [FAST, Settings(epochs=2, lr=1e-3, optimizer="adamw", schedule="cosine", clip_norm=1.0)]
)
@pytest.mark.parametrize("step", [3, 7, 9])  # of 12: in the first epoch, at the second's first step, later in it
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path, kind: str, settings: Settings, step: int) -> None:
    whole, log = toy(), tmp_path / "log.csv"
    expected = train(whole, loaders(kind), settings)
    broken = toy()
    with pytest.raises(Killed):
        train(
            broken,
            loaders(kind),
            settings,
            checkpoint=tmp_path / "c",
            checkpoint_every=2,
            objective=killed_at(step),
            log=log,
        )
    torch.manual_seed(99)  # another process: other numbers everywhere
    resumed = toy(seed=5)
    history = train(resumed, loaders(kind), settings, checkpoint=tmp_path / "c", checkpoint_every=2, log=log)
    assert same(whole, resumed)
    assert [row["loss"] for row in history.rows] == [row["loss"] for row in expected.rows]
    with log.open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith("part")] == []


SCRIPT = """
import os, signal, sys
import torch
from cnncomp.training import Batches, Settings, cross_entropy, train

torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
x, y = torch.rand(64, 1, 8, 8), torch.arange(64) % 10
calls = 0

def objective(model, x, y):
    global calls
    calls += 1
    if calls == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    return cross_entropy(model, x, y)

train(model, Batches(x, y, 16), Settings(epochs=3), objective=objective, checkpoint=path, checkpoint_every=1)
"""


def test_a_process_that_is_killed_outright_goes_on(tmp_path: Path) -> None:
    """A real process, which gets no chance to tidy up."""
    path, script = tmp_path / "c", tmp_path / "script.py"
    script.write_text(f"kill, path = 6, {str(path)!r}\n{SCRIPT}")
    assert subprocess.run([sys.executable, str(script)], check=False, cwd=tmp_path).returncode == -9
    assert torch.load(path)["position"][:2] == (1, 1)
    resumed: dict[str, Any] = {"kill": 0, "path": path}
    whole: dict[str, Any] = {"kill": 0, "path": None}
    exec(SCRIPT, resumed)
    exec(SCRIPT, whole)
    assert resumed["calls"] == 12 - 5 and whole["calls"] == 12
    assert same(resumed["model"], whole["model"])


def test_the_seed_decides_and_the_callers_generators_are_left_alone() -> None:
    first, second, other = toy(), toy(), toy()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    train(first, loaders("DataLoader"), FAST)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    train(second, loaders("DataLoader"), FAST)
    train(other, loaders("DataLoader"), Settings(epochs=2, lr=0.05, seed=1))
    assert same(first, second)
    assert not same(first, other)


def test_digits_are_learnt() -> None:
    split = data.digits()
    torch.manual_seed(0)
    model = DigitsNet()
    history = train(model, Batches(split.train_images, split.train_labels, 64), Settings(epochs=3, lr=0.1))
    with torch.inference_mode():
        accuracy = (model(split.test_images).argmax(1) == split.test_labels).float().mean()
    assert accuracy > 0.93
    assert history.rows[-1]["loss"] < 0.3 * history.rows[0]["loss"]
    assert not model.training


def test_early_stop_keeps_the_best_weights(tmp_path: Path) -> None:
    scores: Iterator[float] = iter([0.2, 0.5, 0.4, 0.3, 0.9])
    seen: list[Tensor] = []

    def validate(model: nn.Module) -> float:
        assert not model.training
        seen.append(model[0].weight.detach().clone())
        return next(scores)

    model = toy()
    history = train(
        model, loaders("Batches"), Settings(epochs=5, patience=2), validate=validate, checkpoint=tmp_path / "c"
    )
    assert history.stopped == "early" and history.best_epoch == 2 and len(history.rows) == 4
    assert torch.equal(model[0].weight, seen[1]) and not torch.equal(seen[1], seen[3])
    again = toy(seed=8)
    assert (
        train(again, loaders("Batches"), Settings(epochs=5, patience=2), validate=validate, checkpoint=tmp_path / "c")
        == history
    )
    assert same(again, model)


def nan_at(step: int) -> Any:
    calls = 0

    def objective(model: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        loss = cross_entropy(model, x, y)
        return loss * math.nan if calls == step else loss

    return objective


def test_a_loss_that_is_not_finite_stops_at_the_last_good_checkpoint(tmp_path: Path) -> None:
    model, expected = toy(), toy()
    with pytest.raises(TrainingError, match=r"the loss is no longer finite in epoch 2, step 4.*1 epochs and 2 steps"):
        train(model, loaders("Batches"), FAST, objective=nan_at(10), checkpoint=tmp_path / "c", checkpoint_every=2)
    with pytest.raises(Killed):
        train(expected, loaders("Batches"), FAST, objective=killed_at(9))
    assert same(model, expected) and not model.training
    # Without a file: the end of the last epoch, in memory.
    model, expected = toy(), toy()
    with pytest.raises(TrainingError, match="1 epochs and 0 steps"):
        train(model, loaders("Batches"), FAST, objective=nan_at(10))
    with pytest.raises(Killed):
        train(expected, loaders("Batches"), FAST, objective=killed_at(7))
    assert same(model, expected)


def test_weights_that_are_not_finite_never_get_into_a_checkpoint(tmp_path: Path) -> None:
    """A finite loss can give infinite gradients; the weights then are wrong before the next loss is."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    start = model[1].weight.detach().clone()

    def objective(model: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
        return cross_entropy(model, x, y) + torch.sqrt(model[1].weight[0, 0] * 0)

    with pytest.raises(TrainingError):
        train(model, loaders("Batches"), FAST, objective=objective, checkpoint=tmp_path / "c", checkpoint_every=1)
    assert torch.equal(model[1].weight, start)
    assert not (tmp_path / "c").exists()


class Unsized:
    """Batches whose number is not known, as of an IterableDataset."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def test_bad_input_is_a_typed_error(tmp_path: Path) -> None:
    x, y = images(32)
    cases: list[tuple[Any, type[Exception], str]] = [
        ([], ArgumentError, "no batches"),
        (Unsized([]), ArgumentError, "no batches"),
        ([x], ArgumentError, "batches without labels"),
        ([(x,)], ArgumentError, "batches without labels"),
        ([(x, y.float())], ArgumentError, "labels.*float32"),
        ([(x, y[:3])], ArgumentError, "labels.*expected 32 integers"),
        ([(x, y + 1)], ArgumentError, "labels.*1 to 10, expected 0 to 9.*classes don't match"),
        ([{"image": x}], DtypeError, "a batch that is a dict"),
        (iter([(x, y)]), ArgumentError, "an iterator"),
    ]
    for loader, error, message in cases:
        with pytest.raises(error, match=message):
            train(toy(), loader, FAST)
    with pytest.raises(ArgumentError, match="validate"):
        train(toy(), [(x, y)], Settings(patience=1))
    with pytest.raises(ArgumentError, match="no parameter"):
        train(nn.Flatten(), [(x, y)], FAST)
    train(toy(), [(x, y)], FAST, checkpoint=tmp_path / "c")
    with pytest.raises(ArgumentError, match="of another model, data or settings"):
        train(toy(), [(x, y)], Settings(epochs=3), checkpoint=tmp_path / "c")
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:500])
    with pytest.raises(FileFormatError, match="can't be read"):
        train(toy(), [(x, y)], FAST, checkpoint=tmp_path / "c")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "c")
    with pytest.raises(FileFormatError, match="no checkpoint"):
        train(toy(), [(x, y)], FAST, checkpoint=tmp_path / "c")


@pytest.mark.parametrize(
    "wrong",
    [{"optimizer": "lion"}, {"schedule": "step"}, {"precision": "int8"}, {"epochs": -1}, {"lr": 0.0}, {"lr": math.nan},
     {"warmup": 1.0}, {"patience": 0}, {"clip_norm": -1.0}, {"clip_norm": 0}, {"momentum": 2.0}, {"weight_decay": -1.0},
     {"epochs": 1.5}, {"epochs": "2"}, {"lr": "a"}, {"lr": True}, {"seed": 0.5}, {"patience": 1.5}, {"warmup": None}],
    ids=str,
)  # fmt: skip
def test_settings_that_can_not_be_used(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        Settings(**wrong)


def test_rates() -> None:
    one = Settings(lr=1.0, warmup=0.2)
    assert (
        one.rate(0) == pytest.approx(0.1)
        and one.rate(0.2) == 1
        and one.rate(0.6) == pytest.approx(0.5)
        and one.rate(1) == 0
    )
    cosine = Settings(lr=1.0, warmup=0.0, schedule="cosine")
    assert cosine.rate(0) == 1 and cosine.rate(0.5) == pytest.approx(0.5) and cosine.rate(1) == pytest.approx(0)
    assert Settings(lr=1.0, schedule="constant").rate(0.9) == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precision_and_layout(precision: str) -> None:
    seen: set[tuple[torch.dtype, bool]] = set()

    def objective(model: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
        out = model[0](x)
        seen.add((out.dtype, out.is_contiguous(memory_format=torch.channels_last)))
        return cross_entropy(model, x, y)

    model = toy()
    train(model, loaders("Batches"), Settings(epochs=1, precision=precision, channels_last=True), objective=objective)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    assert seen == {(dtype, True)}
    assert model[0].weight.dtype == torch.float32


def test_tensorboard_is_optional(tmp_path: Path) -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        written = False
    else:
        written = True
    train(toy(), loaders("Batches"), FAST, tensorboard=tmp_path / "board")
    assert (tmp_path / "board").exists() == written


def test_labels_of_any_integer_type_and_nothing_else() -> None:
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    for labels in (y.int(), y.to(torch.uint8)):
        train(nn.Linear(4, 3), [(x, labels)], Settings(epochs=1), progress=False)
    for labels in (y.bool(), y.float(), y[:, None], -y):
        with pytest.raises(ArgumentError, match="labels"):
            train(nn.Linear(4, 3), [(x, labels)], Settings(epochs=1), progress=False)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x), x


def test_what_is_no_training_is_typed(tmp_path: Path) -> None:
    batches, net = [(torch.randn(8, 4), torch.arange(8) % 3)], nn.Linear(4, 3)
    for arguments, name in (
        ((3, batches), "model"),
        ((net, None), "loader"),
        ((net, batches, {"epochs": 1}), "settings"),
        ((Pair(), batches), "model"),
    ):
        with pytest.raises(ArgumentError, match=name):
            train(*arguments, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="validate"):
        train(net, batches, validate=lambda model: None, progress=False)  # type: ignore[arg-type, return-value]
    (tmp_path / "c").write_bytes(b"hello world" * 30)
    with pytest.raises(FileFormatError):
        train(net, batches, checkpoint=tmp_path / "c", progress=False)


def test_a_score_that_is_not_a_number_is_not_the_best() -> None:
    batches, net = [(torch.randn(8, 4), torch.arange(8) % 3)], nn.Linear(4, 3)
    with pytest.raises(TrainingError, match="validate"):
        train(net, batches, Settings(epochs=3, patience=5), validate=lambda model: float("nan"), progress=False)


def test_resumes_exactly_with_a_sampler_of_its_own_generator(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.arange(32) % 3)

    def run(steps: int | None, name: str) -> nn.Module:
        torch.manual_seed(0)
        net, generator = nn.Linear(4, 3), torch.Generator().manual_seed(int(torch.randint(99, (1,))))
        sampler = torch.utils.data.RandomSampler(data, generator=generator)

        def stop(step: int) -> None:
            if step == steps:
                raise KeyboardInterrupt

        loader = torch.utils.data.DataLoader(data, 4, sampler=sampler)
        options = {"checkpoint": tmp_path / name, "checkpoint_every": 2, "progress": False}
        train(net, loader, Settings(epochs=2), after_step=stop, **options)  # type: ignore[arg-type]
        return net

    whole = run(None, "a")
    with pytest.raises(KeyboardInterrupt):
        run(11, "b")
    resumed = run(None, "b")
    assert torch.equal(whole.weight, resumed.weight)  # type: ignore[arg-type]
    loader = torch.utils.data.DataLoader(data, 4, num_workers=1, persistent_workers=True)
    with pytest.raises(ArgumentError, match="persistent_workers"):
        train(nn.Linear(4, 3), loader, checkpoint=tmp_path / "c", progress=False)


def test_batch_samplers_with_a_generator_of_their_own_resume_exactly(tmp_path: Path) -> None:
    x, y = images(32)
    dataset = TensorDataset(x, y)

    def run(name: str, objective: Any = cross_entropy) -> nn.Module:
        sampler = torch.utils.data.RandomSampler(dataset, generator=torch.Generator().manual_seed(3))
        loader = DataLoader(dataset, batch_sampler=torch.utils.data.BatchSampler(sampler, 8, drop_last=False))
        model = toy()
        train(model, loader, FAST, objective=objective, checkpoint=tmp_path / name, checkpoint_every=1)
        return model

    whole = run("whole")
    with pytest.raises(Killed):
        run("broken", killed_at(7))
    assert same(run("broken"), whole)


def test_validation_may_be_a_tensor_of_one_number() -> None:
    batches = [images(8)]
    history = train(toy(), batches, FAST, validate=lambda model: torch.tensor([0.25]))  # type: ignore[arg-type, return-value]
    assert [row["validation"] for row in history.rows] == [0.25, 0.25] and history.best_epoch == 1
    for score in (torch.zeros(2), torch.tensor(1j), "0.5"):
        with pytest.raises(ArgumentError, match="validate"):
            train(toy(), batches, FAST, validate=lambda model, score=score: score)  # type: ignore[misc]


class Scaled(nn.Module):
    """Takes uint8 images, which it scales itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = toy()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.float() / 255)


def test_images_of_integers_are_for_models_that_take_them() -> None:
    x, y = images(8)
    batches = [((x * 255).to(torch.uint8), y)]
    with pytest.raises(DtypeError, match=r"loader: got images of torch\.uint8"):
        train(toy(), batches, FAST)
    assert len(train(Scaled(), batches, FAST).rows) == 2
    with pytest.raises(RuntimeError, match=r"^Given groups") as raised:  # not the images' dtype
        train(toy(), [(x.expand(-1, 2, -1, -1), y)], FAST)
    assert not isinstance(raised.value, DtypeError)


def test_labels_that_are_no_tensor_and_folders_are_refused(tmp_path: Path) -> None:
    x, y = images(8)
    with pytest.raises(ArgumentError, match="labels: got a list"):
        cross_entropy(toy(), x, y.tolist())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="checkpoint: got the folder"):
        train(toy(), [(x, y)], FAST, checkpoint=tmp_path)
    torch.save({"cnncomp_training": 1}, tmp_path / "c")
    with pytest.raises(ArgumentError, match="checkpoint"):
        train(toy(), [(x, y)], FAST, checkpoint=tmp_path / "c")
