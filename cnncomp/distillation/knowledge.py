"""Knowledge distillation in the three stages of the article that this project began from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cnncomp.distillation.distill import check_temperature, check_weight, distill
from cnncomp.errors import ArgumentError
from cnncomp.training.loop import History, Validate, train
from cnncomp.training.settings import Settings


class KnowledgeDistillation(nn.Module):
    """Train a small student with the help of a large teacher; called like the student.

    **The article's method.** (1) Train the teacher on labelled data; (2) pre-train the student on the teacher's outputs;
    (3) fine-tune the student on the target data.

    **What is wrong or open in it, and what is done here.**

    * *The article's code swaps the two*: it computes the loss of the teacher's output against targets from the student, so
      the optimiser would move the teacher. Here the student learns, and from stage 2 on the teacher is frozen: in eval mode
      (even after ``train()``), its parameters without gradients.
    * *It blocks all gradients*, by running both models under ``no_grad``: nothing could learn. Here the teacher alone runs so.
    * *It gives soft targets to* ``nll_loss``, which takes class indices and log-probabilities, and raises. Here the loss is
      the cross-entropy against the teacher's softened probabilities,
      ``−T²·Σ softmax(teacher/T)·log softmax(student/T)`` (Hinton et al., 2015): see
      :func:`cnncomp.distillation.soft_cross_entropy`.
    * *No temperature is said.* T softens the probabilities, so that those of wrong classes count; the factor T² keeps
      the gradient's size as T grows.
    * *Whether fine-tuning still hears the teacher* is not said: ``teacher_weight`` mixes its term into stage 3, 0 by default.

    Args:
        teacher_model: Any classifier. Changed by stage 1 only.
        student_model: A classifier of the same classes, changed in place.
        temperature: T, above 0.
        teacher_weight: Of the teacher's term in stage 3, 0 to 1; the labels have the rest.
        settings: Of each stage that isn't given its own.

    Raises:
        ArgumentError: The two share parameters, or a number is out of its range.
    """

    def __init__(
        self,
        teacher_model: nn.Module,
        student_model: nn.Module,
        *,
        temperature: float = 4.0,
        teacher_weight: float = 0.0,
        settings: Settings | None = None,
    ) -> None:
        super().__init__()
        for name, model in (("teacher_model", teacher_model), ("student_model", student_model)):
            if not isinstance(model, nn.Module):
                raise ArgumentError(name, type(model).__name__, "a torch.nn.Module")
        check_temperature(temperature)
        check_weight("teacher_weight", teacher_weight, 1, "0 to 1")
        if {id(p) for p in teacher_model.parameters()} & {id(p) for p in student_model.parameters()}:
            raise ArgumentError("student_model", "parameters of the teacher", "a model of its own")
        self.teacher_model, self.student_model = teacher_model, student_model
        self.temperature, self.teacher_weight = temperature, teacher_weight
        self.settings = Settings() if settings is None else settings
        self._frozen = False

    def forward(self, x: Tensor) -> Tensor:
        """The student's logits (N, classes)."""
        return self.student_model(x)

    def train(self, mode: bool = True) -> KnowledgeDistillation:
        """As of any module, but a teacher that is frozen stays in eval mode."""
        super().train(mode)
        if self._frozen:
            self.teacher_model.eval()
        return self

    def freeze_teacher(self) -> None:
        """Eval mode and no gradients, for good."""
        self._frozen = True
        self.teacher_model.eval().requires_grad_(False)

    def train_teacher(self, loader: Iterable[Any], settings: Settings | None = None, **options: Any) -> History:
        """Stage 1: the teacher learns the labels by cross-entropy.

        Args:
            loader: Batches of (images, labels).
            options: As in :func:`cnncomp.training.train`.

        Raises:
            ArgumentError: The teacher is frozen already, no batch, or batches without labels.
        """
        if self._frozen:
            raise ArgumentError("teacher_model", "one that a later stage has frozen", "stage 1 before the others")
        return train(self.teacher_model, loader, settings or self.settings, **{"title": "teacher", **options})

    def pretrain_student(self, loader: Iterable[Any], settings: Settings | None = None, **options: Any) -> History:
        """Stage 2: the student learns the teacher's softened probabilities alone; labels are not looked at.

        Args:
            loader: Batches of images, with or without labels.
            options: As in :func:`cnncomp.distill`.
        """
        return self._distill(loader, settings, 0.0, {"title": "student, from the teacher", **options})

    def finetune_student(self, loader: Iterable[Any], settings: Settings | None = None, **options: Any) -> History:
        """Stage 3: the student learns the labels, with ``teacher_weight`` of the teacher's term mixed in.

        Args:
            loader: Batches of (images, labels) of the target data.
            options: As in :func:`cnncomp.training.train`.

        Raises:
            ArgumentError: No batch, or batches without labels.
        """
        options = {"title": "student, on labels", **options}
        if self.teacher_weight == 0:
            self.freeze_teacher()
            return train(self.student_model, loader, settings or self.settings, **options)
        return self._distill(loader, settings, 1 - self.teacher_weight, options)

    def fit(
        self,
        loader: Iterable[Any],
        target_loader: Iterable[Any] | None = None,
        *,
        teacher: Settings | None = None,
        pretrain: Settings | None = None,
        finetune: Settings | None = None,
        checkpoints: str | Path | None = None,
        checkpoint_every: int | None = None,
        logs: str | Path | None = None,
        validate: Validate | None = None,
        after_step: Callable[[int], object] | None = None,
        progress: bool = True,
    ) -> list[History]:
        """All three stages, once: the teacher is frozen afterwards.

        Args:
            loader: Batches of (images, labels) for the teacher and for pre-training.
            target_loader: Of the target data; by default ``loader``.
            teacher, pretrain, finetune: Settings of the stages.
            checkpoints: Folder of one checkpoint file per stage: a fit that was killed goes on where it was, with new models of
                the same kind.
            logs: Folder of one CSV file per stage.
            validate: Called with the model that learns: the teacher in stage 1, then the student.
            checkpoint_every, after_step, progress: Of every stage, as in :func:`cnncomp.training.train`.

        Returns:
            What happened in each stage.

        Raises:
            ArgumentError: No batch, batches without labels, or a teacher that is frozen already.
            TrainingError: A loss is not finite.
        """
        target = loader if target_loader is None else target_loader
        options = {"checkpoint_every": checkpoint_every, "validate": validate, "after_step": after_step}

        def of_stage(name: str) -> dict[str, Any]:
            files = {"checkpoint": (checkpoints, f"{name}.ckpt"), "log": (logs, f"{name}.csv")}
            return {
                **options,
                "progress": progress,
                **{k: Path(folder) / file for k, (folder, file) in files.items() if folder is not None},
            }

        return [
            self.train_teacher(loader, teacher, **of_stage("teacher")),
            self.pretrain_student(loader, pretrain, **of_stage("pretrain")),
            self.finetune_student(target, finetune, **of_stage("finetune")),
        ]

    def _distill(
        self, loader: Iterable[Any], settings: Settings | None, label_weight: float, options: dict[str, Any]
    ) -> History:
        self.freeze_teacher()
        options = {"temperature": self.temperature, "label_weight": label_weight, **options}
        return distill(self.student_model, self.teacher_model, loader, settings or self.settings, **options)
