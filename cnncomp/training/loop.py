"""The training loop that everything in cnncomp shares."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnncomp.errors import ArgumentError, CnncompError, DtypeError, TrainingError
from cnncomp.progress import track
from cnncomp.training import checkpoint as checkpoints
from cnncomp.training import distributed
from cnncomp.training.metrics import Row, TensorBoard, write_csv
from cnncomp.training.settings import Settings

Objective = Callable[[nn.Module, Tensor, Tensor | None], Tensor]
Validate = Callable[[nn.Module], float]


@dataclass
class History:
    """What happened.

    Attributes:
        rows: One per epoch: epoch, loss (mean over the images), lr, seconds, and validation where there was one.
        stopped: "finished" or "early".
        best_epoch: The one with the highest validation, counted from 1; None without validation.
    """

    rows: list[Row] = field(default_factory=list)
    stopped: str = "finished"
    best_epoch: int | None = None


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
    """The cross-entropy of ``model``'s logits for the labels ``y``.

    Raises:
        ArgumentError: there are no labels, or one that the model has no class for.
    """
    if y is None:
        raise ArgumentError("loader", "batches without labels", "batches of (images, labels)")
    logits = model(x)
    check_labels(y, logits)
    return F.cross_entropy(logits.float(), y.long())


def check_labels(y: Tensor, logits: Tensor) -> None:
    """Raise ArgumentError where labels don't fit (N, classes) logits: otherwise a GPU only says that an assertion failed."""
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = f"outputs {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ArgumentError("model", got, "logits (N, classes), as a tensor")
    if not isinstance(y, Tensor):
        raise ArgumentError("labels", f"a {type(y).__name__}", f"a tensor of {len(logits)} integers")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.ndim != 1 or len(y) != len(logits):
        raise ArgumentError("labels", f"{y.dtype} of shape {tuple(y.shape)}", f"{len(logits)} integers")
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= logits.shape[1]):
        raise ArgumentError(
            "labels", f"{int(y.min())} to {int(y.max())}", f"0 to {logits.shape[1] - 1}: classes don't match"
        )


def split_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images and labels of a batch: a tensor, or a tuple or list of one or two.

    Raises:
        DtypeError: something else.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2 and all(isinstance(t, Tensor) for t in batch):
        return batch[0], batch[1] if len(batch) == 2 else None
    raise DtypeError("loader", f"a batch that is a {type(batch).__name__}", "images, or (images, labels), as tensors")


def check_training(model: nn.Module, loader: Iterable[Any], settings: Settings) -> None:
    """Raise ArgumentError where one of the three is of another kind."""
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
    if not isinstance(settings, Settings):
        raise ArgumentError("settings", type(settings).__name__, "a cnncomp.training.Settings")
    if not isinstance(loader, Iterable):
        raise ArgumentError("loader", type(loader).__name__, "batches, such as a DataLoader")


def train(
    model: nn.Module,
    loader: Iterable[Any],
    settings: Settings | None = None,
    *,
    objective: Objective = cross_entropy,
    validate: Validate | None = None,
    after_step: Callable[[int], object] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    log: str | Path | None = None,
    tensorboard: str | Path | None = None,
    title: str = "training",
    progress: bool = True,
    identity: str = "",
) -> History:
    """Train ``model`` in place, on the device where it lies; it is left in eval mode.

    With a checkpoint file, a training that was killed goes on where the file was written, and gives the same bits as one
    that was not, if the loader's order depends on torch's, Python's and NumPy's generators or on ``set_epoch`` alone.
    In a process group (see :mod:`cnncomp.training.distributed`) gradients are averaged over the processes; each needs
    the same number of batches of the same size.

    Args:
        loader: Iterated once per epoch; batches of images (N, ...) or (images, labels). Its ``set_epoch``, or that of its
            sampler, is called before.
        settings: Optimiser, schedule, precision, seed; by default ``Settings()``.
        identity: What else makes this training what it is, such as numbers in ``objective``: a checkpoint with another is
            refused.
        objective: ``(model, images, labels or None) -> loss``, a mean over the batch.
        validate: Called with the model in eval mode after each epoch; returns a finite number, higher is better. With
            ``settings.patience`` the best epoch's weights are kept.
        after_step: Called with the number of steps done before, from 0 on, after each, as pruning schedules want it. What it
            changes must be in the model's ``state_dict`` for a resumed training to be the same.
        checkpoint: File, written after each epoch and read at the start.
        checkpoint_every: Write it also after so many steps.
        log: CSV file of one row per epoch.
        tensorboard: Folder for TensorBoard, where that is installed.

    Raises:
        ArgumentError: An empty loader, batches without the labels that the objective needs, or a checkpoint of another
            training.
        DtypeError: Batches that are no tensors, or images of integers that the model doesn't take.
        TrainingError: The loss, a weight or the validation is not finite. The model then holds the last good checkpoint.
        FileFormatError: The checkpoint is damaged.
    """
    settings = Settings() if settings is None else settings
    check_training(model, loader, settings)
    if checkpoint is not None and getattr(loader, "persistent_workers", False):
        # They draw the order of all epochs from what the first began with: no later epoch can be begun anew.
        raise ArgumentError("loader", "one with persistent_workers", "one without, where there is a checkpoint")
    if settings.patience is not None and validate is None:
        raise ArgumentError("validate", None, "a function, for settings.patience")
    if settings.epochs > 1 and isinstance(loader, Iterator):
        raise ArgumentError("loader", "an iterator", "one that can be iterated once per epoch, such as a DataLoader")
    path = None if checkpoint is None else Path(checkpoint)
    run = _Run(model, loader, settings, objective, validate, after_step, path, checkpoint_every, title, identity)
    board = TensorBoard(Path(tensorboard) if tensorboard and distributed.rank() == 0 else None)
    outside = checkpoints.random_state()
    try:
        run.resume()
        run.run(board, None if log is None else Path(log), progress)
    finally:
        board.close()
        checkpoints.set_random_state(outside)
        model.eval()
    return run.history


def _number(score: Any) -> float:
    """What ``validate`` returned, a number of any kind or a tensor of one, as a float."""
    if isinstance(score, Real) or (isinstance(score, Tensor) and score.numel() == 1 and not score.is_complex()):
        return float(score)
    got = f"a tensor of shape {tuple(score.shape)}" if isinstance(score, Tensor) else f"a {type(score).__name__}"
    raise ArgumentError("validate", f"a function that returns {got}", "one that returns a number")


class _Run:
    """One training: its state, and what moves it on by an epoch."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        settings: Settings,
        objective: Objective,
        validate: Validate | None,
        after_step: Callable[[int], object] | None,
        path: Path | None,
        every: int | None,
        title: str,
        identity: str,
    ) -> None:
        self.identity = identity
        self.model, self.loader, self.settings, self.objective = model, loader, settings, objective
        self.after_step = after_step
        self.validate, self.path, self.every, self.title = validate, path, every, title
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = settings.build_optimizer(model)
        self.dtype = settings.autocast_dtype(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.wrapped = self._wrap()
        self.length = len(loader) if isinstance(loader, Sized) else None
        self.epoch, self.step, self.steps = 0, 0, 0
        self.total, self.images, self.seconds = 0.0, 0, 0.0
        self.history = History()
        self.best: tuple[float, dict[str, Any]] | None = None
        self.random: dict[str, Any] | None = None
        self.good: dict[str, Any] = {}

    def _wrap(self) -> nn.Module:
        if distributed.world_size() == 1:
            return self.model
        distributed.synchronize(self.model)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(self.model, device_ids=ids)

    # --- state ---

    def fingerprint(self) -> str:
        """What must be equal for a checkpoint to be of this training."""
        shapes = [(n, tuple(p.shape)) for n, p in self.model.named_parameters()]
        what = (sorted(asdict(self.settings).items()), self.length, distributed.world_size(), shapes)
        return repr(what) + self.identity

    def state(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": (self.epoch, self.step, self.total, self.images, self.seconds),
            "steps": self.steps,
            "history": asdict(self.history),
            "best": self.best,
            "random": distributed.gather(checkpoints.random_state() if self.step else None),
        }

    def keep(self) -> None:
        """Make the present state the one to go back to, if it is finite; in the file, too."""
        state = self.state()
        if not checkpoints.is_finite(state["model"]):
            self.diverged("a weight")
        # The checkpoint holds references; what memory keeps must not change with the next step.
        self.good = {"model": copy.deepcopy(state["model"]), "position": state["position"]}
        if self.path is not None and distributed.rank() == 0:
            checkpoints.write(state, self.path)

    def resume(self) -> None:
        """Go on from the file, if there is one."""
        found = checkpoints.read(self.path) if self.path is not None and distributed.rank() == 0 else None
        state = distributed.broadcast(found)
        if state is None:
            self.good = {"model": copy.deepcopy(self.model.state_dict()), "position": (0, 0)}
            return
        if state.get("fingerprint") != self.fingerprint():
            raise ArgumentError(
                "checkpoint", f"{self.path}, of another model, data or settings", "one of this training"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.total, self.images, self.seconds = state["position"]
        self.steps = state.get("steps", self.epoch * (self.length or 0) + self.step)
        self.history, self.best = History(**state["history"]), state["best"]
        self.random = state["random"][distributed.rank()]
        self.good = {"model": copy.deepcopy(state["model"]), "position": state["position"]}

    def diverged(self, what: str) -> None:
        """Go back to the last good state and say so."""
        self.model.load_state_dict(self.good["model"])
        self.model.eval()
        epoch, step = self.good["position"][:2]
        raise TrainingError(
            f"{self.title}: {what} is no longer finite in epoch {self.epoch + 1}, step {self.step + 1}, at learning rate "
            f"{self.optimizer.param_groups[0]['lr']:.3g}. The model holds the last good checkpoint: {epoch} epochs and {step} "
            "steps. Train with a lower rate, or clip_norm."
        )

    def left(self) -> int:
        """Steps that are still to come; epochs where their length is not known."""
        return (self.settings.epochs - self.epoch) * (self.length or 1) - (self.step if self.length else 0)

    # --- the way through ---

    def run(self, board: TensorBoard, log: Path | None, progress: bool) -> None:
        """All epochs that are left; at the end the best one's weights, where it can stop early."""
        with track(self.title, max(1, self.left()), show=progress) as advance:
            while self.epoch < self.settings.epochs and self.history.stopped == "finished":
                board.add(self.run_epoch(advance))
                if log is not None and distributed.rank() == 0:
                    write_csv(self.history.rows, log)
        if self.settings.patience and self.best is not None:
            self.model.load_state_dict(self.best[1])

    def batches(self) -> Iterator[Any]:
        """The batches of this epoch that are still to come."""
        for target in (self.loader, getattr(self.loader, "sampler", None)):
            set_epoch = getattr(target, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self.epoch)
        seed = self.settings.seed * 1_000_003 + self.epoch
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        for owner in (
            self.loader,
            getattr(self.loader, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
        ):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
        checkpoints.seed_everything(seed + 7919 * distributed.rank())
        batches = iter(self.loader)
        for _ in range(self.step):
            next(batches, None)
        if self.random is not None:
            # What the skipped batches drew came again with them; the model's own numbers, of dropout, did not.
            checkpoints.set_random_state(self.random)
            self.random = None
        return batches

    def run_epoch(self, advance: Callable[[str], None]) -> Row:
        self.model.train()
        self.wrapped.train()
        start = time.perf_counter()
        for batch in self.batches():
            loss = self.train_step(batch)
            if self.after_step is not None:
                self.after_step(self.steps)
            self.step, self.steps = self.step + 1, self.steps + 1
            advance(f"epoch {self.epoch + 1}, loss {loss:.4f}")
            if self.every and self.step % self.every == 0:
                self.seconds += time.perf_counter() - start
                start = time.perf_counter()
                self.keep()
        if self.images == 0:
            raise ArgumentError("loader", "no batches", "at least one batch in each epoch")
        distributed.synchronize(self.model)
        self.seconds += time.perf_counter() - start
        return self.close_epoch()

    def train_step(self, batch: Any) -> float:
        x, y = split_batch(batch)
        x = x.to(self.device)
        y = None if y is None else y.to(self.device)
        if self.settings.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        done = self.epoch + (self.step / self.length if self.length else 0.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(min(1.0, done / self.settings.epochs))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            loss = self.loss(x, y)
        value = float(distributed.mean(loss.detach().float()))
        if not math.isfinite(value):
            self.diverged("the loss")
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.settings.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.total += value * len(x)
        self.images += len(x)
        return value

    def loss(self, x: Tensor, y: Tensor | None) -> Tensor:
        """The objective. A model may well take images of integers, so that they are blamed only where it does not."""
        try:
            return self.objective(self.wrapped, x, y)
        except RuntimeError as error:
            if x.is_floating_point() or isinstance(error, (CnncompError, torch.OutOfMemoryError)):
                raise
            got = f"images of {x.dtype}, at which the model raises: {str(error).splitlines()[0]}"
            raise DtypeError("loader", got, "floating-point images, as Batches makes of uint8") from error

    def close_epoch(self) -> Row:
        """Validate, note the row, decide whether to go on, and write the checkpoint."""
        row: Row = {"epoch": self.epoch + 1, "loss": self.total / self.images}
        row |= {"lr": self.optimizer.param_groups[0]["lr"], "seconds": round(self.seconds, 3)}
        if self.validate is not None:
            self.model.eval()
            row["validation"] = score = distributed.broadcast(_number(self.validate(self.model)))
            if not math.isfinite(score):
                self.diverged("what validate returns")
            if self.best is None or score > self.best[0]:
                weights = copy.deepcopy(self.model.state_dict()) if self.settings.patience else {}
                self.best, self.history.best_epoch = (score, weights), self.epoch + 1
            elif self.settings.patience and self.epoch + 1 - (self.history.best_epoch or 0) >= self.settings.patience:
                self.history.stopped = "early"
        self.history.rows.append(row)
        self.epoch, self.step, self.total, self.images, self.seconds = self.epoch + 1, 0, 0.0, 0, 0.0
        self.keep()
        return row
