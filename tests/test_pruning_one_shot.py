"""The command behind the one-shot results: what it reports, on a small network and random images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cnncomp import data, sparsity_of
from cnncomp.errors import MissingPackageError
from cnncomp.models import DigitsNet
from cnncomp.results import one_shot


def small() -> nn.Module:
    torch.manual_seed(0)
    return DigitsNet().eval()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(4, 1, 8, 8)
    crops = torch.randn(4 * one_shot.CROPS, 1, 8, 8)
    monkeypatch.setattr(one_shot, "pretrained", small)
    monkeypatch.setattr(one_shot, "scored_photos", lambda: ([], images, small()(images).argmax(1)))
    monkeypatch.setattr(one_shot, "varied", lambda photos, n: crops)
    monkeypatch.setattr(one_shot, "calibration", lambda n: [torch.randn(8, 1, 8, 8)])


def test_rows_are_kept_and_told_apart(stand_ins: None, tmp_path: Path) -> None:
    out = tmp_path / "results" / "rows.json"
    cases = (one_shot.CASES[0], one_shot.CASES[3], one_shot.CASES[5])
    rows = one_shot.run(cases, 1, out)
    assert [r.name for r in rows] == [c.name for c in cases]
    for row, pattern in zip(rows, ("unstructured", "2:4", "2:4"), strict=True):
        assert 0 <= row.low <= row.agreement <= row.high <= 1 and -1 <= row.cosine <= 1 and row.kl >= 0
        zeros = sparsity_of(one_shot.cnncomp.prune(small(), 0.5, pattern, scope="layer")).sparsity
        assert row.zeros == zeros and 0 <= row.top1 <= 4
    assert rows[2].cosine > rows[1].cosine  # reconstruction pays
    written = json.loads(out.read_text())
    written[0]["top1"] = 99
    out.write_text(json.dumps(written))
    assert one_shot.run(cases[:1], 1, out)[0].top1 == 99  # not made anew
    lines = one_shot.table(rows).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1 and cases[1].name in lines[3]


def test_an_unpruned_model_agrees_with_itself(stand_ins: None) -> None:
    images, crops = torch.randn(4, 1, 8, 8), torch.randn(4 * one_shot.CROPS, 1, 8, 8)
    seen = one_shot.Scored(crops, small()(crops).detach(), images, small()(images).argmax(1))
    row = one_shot.score(one_shot.CASES[0], small(), 0.0, seen)
    assert (row.agreement, row.low, row.high, row.top1) == (1.0, 1.0, 1.0, 4)
    assert row.cosine == pytest.approx(1) and row.kl == pytest.approx(0, abs=1e-5)


def test_the_interval_draws_photographs() -> None:
    alike = torch.tensor([[True] * 16] * 10 + [[False] * 16] * 10)  # crops of one photograph say nothing new
    mixed = torch.tensor([[True] * 8 + [False] * 8] * 20)
    low, high = one_shot.interval(alike)
    assert 0.2 < low < 0.35 and 0.65 < high < 0.8
    assert one_shot.interval(mixed) == (0.5, 0.5)


def test_what_is_calibrated_on_is_not_scored() -> None:
    pytest.importorskip("PIL.Image")
    try:
        known = {p.name for p in data.imagenet_photos()}
        names = [p.name for p in (*data.calibration_photos(), *data.cifar_pictures())]
        batches = one_shot.calibration(1)
    except MissingPackageError as error:
        pytest.skip(str(error))
    assert len(names) == len(set(names)) == 52 and not known & set(names)
    assert sum(map(len, batches)) == 52 and batches[0].shape == (8, 3, 224, 224)
    assert all(torch.equal(a, b) for a, b in zip(batches, one_shot.calibration(1), strict=True))
