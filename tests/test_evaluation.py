"""Corruptions, and what evaluate counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cnncomp.errors import ArgumentError, DtypeError
from cnncomp.evaluation import CORRUPTIONS, corrupt, evaluate, table


def pictures(n: int = 40, c: int = 2) -> Tensor:
    return torch.rand(n, c, 11, 9)


def test_noise_has_its_strength_and_its_seed() -> None:
    x = torch.full((8, 1, 40, 40), 0.5)
    for severity, std in zip(range(1, 6), (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        noise = corrupt(x, "noise", severity) - x
        assert noise.std().item() == pytest.approx(std, rel=0.03) and abs(noise.mean().item()) < 0.003
    assert torch.equal(corrupt(x, "noise", seed=1), corrupt(x, "noise", seed=1))
    assert not torch.equal(corrupt(x, "noise", seed=1), corrupt(x, "noise", seed=2))


def test_blur_is_gaussian() -> None:
    """A single bright pixel becomes the kernel: its sum stays, its variance is σ² in both directions."""
    x = torch.zeros(1, 2, 21, 21)
    x[:, :, 10, 10] = 1
    for severity, sigma in zip(range(1, 6), (0.4, 0.6, 0.7, 0.8, 1.0), strict=True):
        out = corrupt(x, "blur", severity)
        assert torch.equal(out[:, 0], out[:, 1])
        assert out[0, 0].sum().item() == pytest.approx(1, abs=1e-5)
        at = torch.arange(21) - 10.0
        exact = torch.exp(-(at**2) / (2 * sigma**2))
        exact = exact / exact.sum()
        assert torch.allclose(out[0, 0], exact[:, None] * exact[None, :], atol=2e-3)
    flat = torch.full((1, 1, 9, 9), 0.3)
    assert torch.allclose(corrupt(flat, "blur", 5), flat)  # no dark border


def test_contrast_shrinks_around_each_channels_mean() -> None:
    x = pictures()
    for severity, factor in zip(range(1, 6), (0.75, 0.5, 0.4, 0.3, 0.15), strict=True):
        out = corrupt(x, "contrast", severity)
        assert torch.allclose(out.mean((2, 3)), x.mean((2, 3)), atol=1e-6)
        assert torch.allclose(out.std((2, 3)), factor * x.std((2, 3)), atol=1e-6)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corrupted_images_stay_images(kind: str) -> None:
    x = pictures().round()
    out = corrupt(x, kind, 5)
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 1 and not torch.equal(out, x)


def test_corrupt_refuses() -> None:
    x = pictures()
    for arguments, message in (
        ((x, "fog"), "kind"),
        ((x, "noise", 6), "severity"),
        ((x * 2, "noise"), "0 to 1"),
        ((x * math.nan, "blur"), "0 to 1"),
        ((x[0], "noise"), "images"),
        ((x.round().to(torch.uint8), "noise"), "images"),
    ):
        with pytest.raises(ArgumentError, match=message):
            corrupt(*arguments)


class Bright(nn.Module):
    """Class 1 for images whose mean is above a half; the spread and the sharpness of images make no difference to it."""

    def __init__(self, at: float = 0.5) -> None:
        super().__init__()
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        m = x.mean((1, 2, 3)) - self.at
        return torch.stack([-m, m], 1)


def test_what_is_counted() -> None:
    """Images of one grey each: the counts follow from their greys."""
    greys = torch.tensor([0.1, 0.3, 0.45, 0.55, 0.7, 0.9, 0.2])
    x = greys.view(-1, 1, 1, 1).expand(7, 1, 20, 20)
    y = torch.tensor([0, 0, 1, 1, 1, 1, 1])
    model, parent = Bright().train(), Bright(at=0.4).train()
    e = evaluate(model, x, y, parent=parent, batch_size=3)
    assert e.accuracy == 5 / 7 and e.agreement == 6 / 7 and e.images == 7
    # A mean over 400 pixels moves by far less than the distance of these greys; borders are repeated.
    assert e.corrupted == dict.fromkeys(CORRUPTIONS, 5 / 7) and e.corrupted_agreement == dict.fromkeys(
        CORRUPTIONS, 6 / 7
    )
    assert model.training and parent.training
    alone = evaluate(model, x, y, corruptions=("noise",))
    assert alone.agreement is None and alone.corrupted_agreement == {} and list(alone.corrupted) == ["noise"]


def test_corruption_comes_before_normalisation_and_bytes_are_scaled() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros(len(x), 2)

    x = (pictures(6) * 255).round().to(torch.uint8)
    evaluate(
        model, x, torch.zeros(6, dtype=torch.long), corruptions=("contrast",), severity=2, normalize=lambda x: 2 * x - 1
    )
    assert torch.allclose(seen[0], 2 * (x.float() / 255) - 1)
    assert torch.allclose(seen[1], 2 * corrupt(x.float() / 255, "contrast", 2) - 1)


def test_a_model_that_breaks_on_noise_shows() -> None:
    """Two models with the same clean accuracy, told apart by corruption alone."""
    y = torch.arange(60) % 2
    x = 0.2 + 0.6 * y.view(-1, 1, 1, 1).float().expand(60, 1, 12, 12)

    def brittle(x: Tensor) -> Tensor:
        rough = x.std((1, 2, 3)) > 0.01
        logits = Bright().eval()(x)
        return torch.where(rough[:, None], logits.flip(1), logits)

    good, bad = evaluate(Bright(), x, y), evaluate(brittle, x, y, parent=Bright())
    assert good.accuracy == bad.accuracy == bad.agreement == 1
    assert good.corrupted["noise"] == 1 and bad.corrupted["noise"] == 0 and bad.corrupted_agreement["noise"] == 0
    lines = table({"good": good, "bad": bad}).splitlines()
    assert lines[0].split("|")[1:-1] == [
        c.center(len(c) + 2) for c in ["", "accuracy", "agrees with parent", *CORRUPTIONS]
    ]
    assert [c.strip() for c in lines[3].split("|")[1:-1]] == [
        "bad",
        "100.00%",
        "100.00%",
        "0.00%",
        "100.00%",
        "100.00%",
    ]
    assert len({line.count("|") for line in lines}) == 1


def test_evaluate_refuses() -> None:
    x, y = pictures(4), torch.tensor([0, 1, 1, 5])
    with pytest.raises(ArgumentError, match="labels: got 0 to 5"):
        evaluate(Bright(), x, y)
    with pytest.raises(ArgumentError, match="labels"):
        evaluate(Bright(), x, y[:2])
    with pytest.raises(ArgumentError, match="labels"):
        evaluate(Bright(), x[:0], y[:0])
    with pytest.raises(ArgumentError, match="model"):
        evaluate(lambda x: x, x, y)
    with pytest.raises(ArgumentError, match="kind"):
        evaluate(Bright(), x, y.clamp(max=1), corruptions=("fog",))


def test_labels_that_are_none_are_refused() -> None:
    model, images, y = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 5)), torch.rand(10, 3, 4, 4), torch.arange(10) % 5
    for labels in (y[:, None], -y, y / 3, y + 1):
        with pytest.raises(ArgumentError, match="labels"):
            evaluate(model, images, labels, progress=False)
    with pytest.raises(ArgumentError, match="labels: got a list"):
        evaluate(model, images, y.tolist(), progress=False)  # type: ignore[arg-type]
    for size in (0, -1, 2.5, "a"):
        with pytest.raises(ArgumentError, match="batch_size"):
            evaluate(model, images, y, batch_size=size, progress=False)  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match="images"):
        evaluate(model, images.int(), y, progress=False)
