"""Distillation: the article's method and what is wrong in it, the loss, hints, fine-tuning, unlabelled images."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnncomp
from cnncomp import data
from cnncomp.distillation import FINETUNE, KnowledgeDistillation, distill, finetune, hint_loss, soft_cross_entropy
from cnncomp.distillation.hints import Features
from cnncomp.errors import ArgumentError, TrainingError
from cnncomp.models import ArticleNet, DigitsNet
from cnncomp.training import Batches, Settings, train

ONE = Settings(epochs=1, lr=0.05)


class Small(nn.Module):
    """1,122 parameters for the digits."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 12, 3)
        self.bn = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 8, 3)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.inner(F.relu(self.bn(self.conv(x))))))
        return self.fc(x.mean((2, 3)))


def colour(n: int = 16, labels: bool = True) -> list[Any]:
    """Two batches for the article's network."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, n // 2, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (2, n // 2), generator=generator)
    return [(x[i], y[i]) if labels else x[i] for i in range(2)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return any(not torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, data.Split]:
    """A DigitsNet of above 95 % on the test images."""
    split = data.digits()
    torch.manual_seed(0)
    model = DigitsNet()
    train(model, Batches(split.train_images, split.train_labels, 64), Settings(epochs=4, lr=0.1))
    return model, split


def accuracy(model: nn.Module, split: data.Split) -> float:
    with torch.inference_mode():
        return float((model.eval()(split.test_images).argmax(1) == split.test_labels).float().mean())


# --- the loss ---


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_soft_cross_entropy_is_the_formula(temperature: float) -> None:
    student, teacher = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    p = torch.exp(teacher / temperature) / torch.exp(teacher / temperature).sum(1, keepdim=True)
    q = torch.exp(student / temperature) / torch.exp(student / temperature).sum(1, keepdim=True)
    expected = -(temperature**2) * (p * q.log()).sum(1).mean()
    assert soft_cross_entropy(student, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_keeps_its_size_as_the_temperature_grows() -> None:
    """At high T it tends to (student − teacher) / (N · classes), of centred logits (Hinton et al., 2015, eq. 4)."""
    student, teacher = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
    soft_cross_entropy(student, teacher, 1000.0).backward()
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    assert torch.allclose(student.grad, centred.detach() / 60, atol=1e-4)


def test_the_teacher_takes_no_gradient() -> None:
    student, teacher = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10, requires_grad=True)
    soft_cross_entropy(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


# --- the article's class ---


def test_what_the_article_prints_can_not_run() -> None:
    teacher, student, (x, _) = ArticleNet(), ArticleNet(), colour()[0]
    soft = F.softmax(teacher(x), 1)
    with pytest.raises(RuntimeError):  # nll_loss takes class indices
        F.nll_loss(F.log_softmax(student(x), 1), soft)
    with torch.no_grad():
        loss = soft_cross_entropy(student(x), teacher(x))
    with pytest.raises(RuntimeError):  # under no_grad nothing can learn
        loss.backward()


def test_the_student_learns_and_the_teacher_is_frozen_from_stage_2_on() -> None:
    torch.manual_seed(0)
    kd = KnowledgeDistillation(ArticleNet(), ArticleNet(), settings=ONE)
    teacher, student = state(kd.teacher_model), state(kd.student_model)
    kd.train_teacher(colour())
    assert changed(kd.teacher_model, teacher) and not changed(kd.student_model, student)
    teacher = state(kd.teacher_model)
    kd.pretrain_student(colour(labels=False))  # looks at no label
    assert not changed(kd.teacher_model, teacher) and changed(kd.student_model, student)
    student = state(kd.student_model)
    kd.train()
    assert not kd.teacher_model.training and kd.student_model.training
    assert not any(p.requires_grad for p in kd.teacher_model.parameters())
    kd.finetune_student(colour())
    assert not changed(kd.teacher_model, teacher) and changed(kd.student_model, student)
    with pytest.raises(ArgumentError, match="stage 1 before"):
        kd.train_teacher(colour())


def test_it_is_called_like_the_student() -> None:
    kd = KnowledgeDistillation(ArticleNet(), ArticleNet()).eval()
    x = colour()[0][0]
    assert torch.equal(kd(x), kd.student_model(x)) and not torch.equal(kd(x), kd.teacher_model(x))


def test_the_frozen_teachers_batchnorm_does_not_move() -> None:
    """In train mode it would, without any gradient."""
    split = data.digits()
    kd = KnowledgeDistillation(DigitsNet(), Small(), settings=ONE)
    before = state(kd.teacher_model)
    kd.train()
    kd.pretrain_student([split.train_images[:32]])
    assert not changed(kd.teacher_model, before)


def test_stage_3_hears_the_teacher_only_where_asked() -> None:
    """With teacher_weight 0 the teacher's answers make no difference; above it they do."""
    results = {}
    for weight in (0.0, 0.5):
        for seed in (1, 2):  # two different teachers
            torch.manual_seed(seed)
            teacher = ArticleNet()
            torch.manual_seed(0)
            kd = KnowledgeDistillation(teacher, ArticleNet(), teacher_weight=weight, settings=ONE)
            kd.finetune_student(colour())
            results[weight, seed] = state(kd.student_model)
    assert all(torch.equal(t, results[0.0, 2][name]) for name, t in results[0.0, 1].items())
    assert any(not torch.equal(t, results[0.5, 2][name]) for name, t in results[0.5, 1].items())


def test_fit_runs_the_three_stages(trained: tuple[nn.Module, data.Split]) -> None:
    split = trained[1]
    torch.manual_seed(0)
    kd = KnowledgeDistillation(DigitsNet(), Small(), settings=Settings(epochs=3, lr=0.1))
    histories = kd.fit(Batches(split.train_images, split.train_labels, 64), finetune=Settings(epochs=1, lr=0.05))
    assert [len(h.rows) for h in histories] == [3, 3, 1]
    assert accuracy(kd, split) > 0.85
    for stage in (kd.finetune_student, kd.pretrain_student):
        with pytest.raises(ArgumentError, match="no batches"):
            stage([])
    with pytest.raises(ArgumentError, match="labels"):
        kd.finetune_student([split.train_images[:8]])
    kd.teacher_weight = 0.5
    with pytest.raises(ArgumentError, match="labels"):
        kd.finetune_student([split.train_images[:8]])


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"temperature": math.inf}, {"teacher_weight": 1.5}])
def test_the_class_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        KnowledgeDistillation(ArticleNet(), ArticleNet(), **wrong)
    net = ArticleNet()
    with pytest.raises(ArgumentError, match="student_model"):
        KnowledgeDistillation(net, net)


# --- distill ---


def test_the_loss_is_the_mixture(trained: tuple[nn.Module, data.Split]) -> None:
    """The first loss that is reported, of one batch, against the formula."""
    teacher, split = trained
    x, y = split.train_images[:40], split.train_labels[:40]
    torch.manual_seed(0)
    student = Small()
    reference = copy.deepcopy(student).train()
    with torch.no_grad():
        logits, target = reference(x), teacher(x)
    expected = 0.7 * soft_cross_entropy(logits, target, 3.0) + 0.3 * F.cross_entropy(logits, y)
    history = distill(student, teacher, [(x, y)], ONE, temperature=3.0, label_weight=0.3)
    assert history.rows[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_student_learns_from_a_teacher_without_labels(trained: tuple[nn.Module, data.Split]) -> None:
    """Half of the images and no label at all."""
    teacher, split = trained
    torch.manual_seed(0)
    student, before = Small(), state(teacher)
    distill(student, teacher, Batches(split.train_images[::2], None, 32), Settings(epochs=6, lr=0.1))
    assert accuracy(student, split) > 0.85
    assert not changed(teacher, before)


def unexplained(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    """The part of the teacher's ``conv3`` that no linear map of the student's ``inner`` gives, by least squares."""
    with Features(student.eval(), ["inner"], "student") as ours, Features(teacher, ["conv3"], "teacher") as theirs:
        with torch.inference_mode():
            student(images)
            teacher(images)
        a, b = (f.permute(0, 2, 3, 1).flatten(0, 2) for f in (ours.values["inner"], theirs.values["conv3"]))
    rest = b - a @ torch.linalg.lstsq(a, b).solution
    return float(rest.square().mean() / b.square().mean())


def test_hints_teach_inner_layers(trained: tuple[nn.Module, data.Split]) -> None:
    """The teacher's features can be read from the student's, on other images too; projections and hooks are gone afterwards."""
    teacher, split = trained
    torch.manual_seed(0)
    plain = Small()
    student, names = copy.deepcopy(plain), list(plain.state_dict())
    loader, settings = Batches(split.train_images[:800], None, 64), Settings(epochs=4, lr=0.05)
    hints = {"inner": "conv3", "conv": "conv2"}  # 4×4 for 4×4, and 6×6 for 8×8: averaged down
    distill(plain, teacher, loader, settings)
    distill(student, teacher, loader, settings, hints=hints, hint_weight=20.0)
    assert list(student.state_dict()) == names
    assert not student.inner._forward_hooks and not teacher.conv3._forward_hooks
    with_hints, without = (unexplained(m, teacher, split.test_images) for m in (student, plain))
    assert with_hints < 0.95 * without, (with_hints, without)


def test_hint_loss_is_relative_and_averages_the_larger_down() -> None:
    teacher = torch.randn(3, 4, 6, 6)
    assert hint_loss(torch.zeros_like(teacher), teacher).item() == pytest.approx(1)
    assert hint_loss(torch.zeros_like(teacher), 100 * teacher).item() == pytest.approx(1)
    assert hint_loss(teacher.repeat_interleave(2, 2).repeat_interleave(2, 3), teacher).item() == pytest.approx(
        0, abs=1e-10
    )
    assert hint_loss(torch.ones(2, 3), torch.full((2, 3), 2.0)).item() == pytest.approx(0.25)


def test_a_resumed_distillation_is_the_same(trained: tuple[nn.Module, data.Split], tmp_path: Any) -> None:
    teacher, split = trained
    loader = Batches(split.train_images[:160], None, 32)
    torch.manual_seed(0)
    start = Small()
    whole, broken = copy.deepcopy(start), copy.deepcopy(start)
    options: dict[str, Any] = {"hints": {"inner": "conv3"}}
    distill(whole, teacher, loader, Settings(epochs=2, lr=0.05), **options)

    def stop(step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    options |= {"checkpoint": tmp_path / "c", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        distill(broken, teacher, loader, Settings(epochs=2, lr=0.05), after_step=stop, **options)
    resumed = copy.deepcopy(start)
    distill(resumed, teacher, loader, Settings(epochs=2, lr=0.05), **options)
    assert not changed(resumed, state(whole))


def test_a_pruned_model_recovers_from_its_parent(trained: tuple[nn.Module, data.Split]) -> None:
    """Self-distillation: without labels, and the zeros stay."""
    parent, split = trained
    pruned = cnncomp.prune(copy.deepcopy(parent), sparsity=0.95)
    zeros, before = cnncomp.sparsity_of(pruned).zeros, accuracy(pruned, split)
    finetune(pruned, parent, Batches(split.train_images, None, 64), FINETUNE)
    assert cnncomp.sparsity_of(pruned).zeros >= zeros
    assert accuracy(pruned, split) > max(0.9, before + 0.1)


def test_as_the_finetuning_of_a_recipe(trained: tuple[nn.Module, data.Split]) -> None:
    parent, split = trained
    recipe = cnncomp.Recipe(
        sparsity=0.9, int8=False, finetune=lambda m: finetune(m, parent, [split.train_images[:64]], ONE)
    )
    fast = cnncomp.compress(parent, None, recipe, example_inputs=split.test_images[:8], measure=False, progress=False)
    assert fast(split.test_images[:8]).shape == (8, 10)


def test_a_converted_model_can_teach(trained: tuple[nn.Module, data.Split]) -> None:
    teacher, split = trained
    fast = cnncomp.convert(teacher, split.test_images[:8], measure=False, progress=False)
    student = Small()
    history = distill(student, fast, Batches(split.train_images[:256], None, 32), Settings(epochs=3, lr=0.1))
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]


def test_distill_refuses(trained: tuple[nn.Module, data.Split]) -> None:
    teacher, split = trained
    x, y = split.train_images[:8], split.train_labels[:8]
    cases: list[tuple[nn.Module, Any, dict[str, Any], str]] = [
        (Small(9), [x], {}, r"student.*\(2, 9\).*\(2, 10\)"),
        (Small(), [], {}, "no batches"),
        (Small(), iter([x]), {}, "an iterator"),
        (Small(), [x], {"label_weight": 0.5}, "without labels"),
        (Small(), [(x, y + 5)], {}, "classes don't match"),
        (Small(), [x], {"label_weight": 2.0}, "label_weight"),
        (Small(), [x], {"temperature": -1.0}, "temperature"),
        (Small(), [x], {"hint_weight": -1.0}, "hint_weight"),
        (Small(), [x], {"hints": {"nothing": "conv3"}}, "no module of the student"),
        (Small(), [x], {"hints": {"inner": "nothing"}}, "no module of the teacher"),
        (Small(), [x], {"hints": {"inner": "fc"}}, "hints"),
        (teacher, [x], {}, "teacher"),
    ]
    for student, loader, options, message in cases:
        with pytest.raises(ArgumentError, match=message):
            distill(student, teacher, loader, ONE, **options)
    with pytest.raises(TrainingError, match="the loss is no longer finite"):
        distill(Small(), teacher, [x * math.nan], ONE)


def test_the_teachers_modes_come_back(trained: tuple[nn.Module, data.Split]) -> None:
    teacher = copy.deepcopy(trained[0]).train()
    teacher.conv1.eval()
    before = state(teacher)
    distill(Small(), teacher, [trained[1].train_images[:8]], ONE)
    assert not changed(teacher, before)  # in train mode its BatchNorms would have moved
    assert teacher.training and not teacher.conv1.training


def test_a_checkpoint_of_another_distillation_is_refused(tmp_path: Path) -> None:
    teacher, x = nn.Linear(4, 3), [torch.randn(8, 4)]
    distill(nn.Linear(4, 3), teacher, x, ONE, checkpoint=tmp_path / "c", progress=False)
    with pytest.raises(ArgumentError, match="checkpoint"):
        distill(nn.Linear(4, 3), teacher, x, ONE, temperature=2.0, checkpoint=tmp_path / "c", progress=False)
    for other in ({"label_weight": 0.2}, {"hint_weight": 2.0}, {"hints": {"": ""}}):
        with pytest.raises(ArgumentError, match="checkpoint"):
            distill(nn.Linear(4, 3), teacher, x, ONE, checkpoint=tmp_path / "c", progress=False, **other)  # type: ignore[arg-type]
    resumed = distill(nn.Linear(4, 3), teacher, x, ONE, temperature=4, checkpoint=tmp_path / "c", progress=False)
    assert len(resumed.rows) == 1  # 4 is 4.0


def test_all_stages_resume_from_a_folder(tmp_path: Path) -> None:
    batches = [(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3)]

    def fit(**options: Any) -> KnowledgeDistillation:
        torch.manual_seed(0)
        kd = KnowledgeDistillation(nn.Linear(4, 3), nn.Linear(4, 3), settings=Settings(epochs=2, lr=0.1))
        kd.fit(batches, progress=False, **options)
        return kd

    whole = fit()
    folders = {"checkpoints": tmp_path / "c", "logs": tmp_path / "l"}

    def stop(step: int) -> None:
        if (tmp_path / "c" / "pretrain.ckpt").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(after_step=stop, **folders)
    resumed = fit(**folders)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert sorted(p.name for p in (tmp_path / "l").iterdir()) == ["finetune.csv", "pretrain.csv", "teacher.csv"]


def test_models_that_are_none_are_typed() -> None:
    x = [torch.randn(8, 4)]
    for student, teacher, name in ((nn.Linear(4, 3), None, "teacher"), (nn.ReLU(), nn.Linear(4, 3), "student")):
        with pytest.raises(ArgumentError, match=name):
            distill(student, teacher, x, ONE, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="temperature"):
        distill(nn.Linear(4, 3), nn.Linear(4, 3), x, ONE, temperature="a", progress=False)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="student_model"):
        KnowledgeDistillation(nn.Linear(4, 3), 3)  # type: ignore[arg-type]
    student = nn.Sequential(nn.Linear(4, 3))
    student.add_module("unused", nn.Identity())
    student.forward = lambda x: student[0](x)  # type: ignore[method-assign]
    with pytest.raises(ArgumentError, match="never runs"):
        distill(student, nn.Sequential(nn.Linear(4, 3)), x, ONE, hints={"unused": "0"}, progress=False)


class Pair(nn.Module):
    """Returns its logits and its input; so does its module ``pair``."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.pair = inner

    def forward(self, x: Tensor) -> Any:
        return (self.fc(x), x) if self.pair is None else self.pair(x)[0]


def test_what_is_no_distillation_is_typed() -> None:
    net, x = nn.Linear(4, 3), [torch.randn(8, 4)]
    cases: list[tuple[nn.Module, nn.Module, dict[str, Any], str]] = [
        (nn.Linear(4, 3), net, {"label_weight": "a"}, "label_weight"),
        (nn.Linear(4, 3), net, {"hint_weight": "a"}, "hint_weight"),
        (nn.Linear(4, 3), net, {"hint_weight": math.inf}, "hint_weight"),
        (nn.Linear(4, 3), net, {"settings": {"epochs": 1}}, "settings"),
        (nn.Linear(4, 3), net, {"data": None}, "loader"),
        (nn.Linear(4, 3), Pair(), {}, "teacher: got a model that returns a tuple"),
        (Pair(), net, {}, "student: got a model that returns a tuple"),
        (Pair(Pair()), net, {"hints": {"pair": ""}}, "hints: got 'pair', which returns a tuple"),
    ]
    for student, teacher, wrong, message in cases:
        with pytest.raises(ArgumentError, match=message):
            distill(student, teacher, **{"data": x, "settings": ONE, "progress": False, **wrong})
    with pytest.raises(ArgumentError, match="teacher_weight"):
        KnowledgeDistillation(nn.Linear(4, 3), net, teacher_weight="a")  # type: ignore[arg-type]


def test_fit_validates_the_model_of_each_stage_and_refuses_what_a_stage_would() -> None:
    batches = [(torch.randn(8, 4), torch.arange(8) % 3)]
    kd, seen = KnowledgeDistillation(nn.Linear(4, 3), nn.Linear(4, 3), settings=ONE), []

    def validate(model: nn.Module) -> float:
        seen.append(model)
        return 0.0

    for unknown in ("checkpoint", "tensorboard", "objective"):  # before the teacher is trained in vain
        with pytest.raises(TypeError, match=unknown):
            kd.fit(batches, **{unknown: None})  # type: ignore[arg-type]
    kd.fit(batches, validate=validate, progress=False)
    assert [m is kd.teacher_model for m in seen] == [True, False, False] and seen[1] is seen[2] is kd.student_model
    with pytest.raises(ArgumentError, match="frozen"):
        kd.fit(batches, progress=False)
