"""The Fashion-MNIST results: IDX files, resumable rows, the table. The run itself on a few made-up images."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from cnncomp.errors import ArgumentError, FileFormatError
from cnncomp.results import fashion_mnist as run
from cnncomp.results import report
from cnncomp.results.idx import fashion_mnist, read_idx
from cnncomp.results.networks import build_student, build_teacher
from cnncomp.results.rows import Row, mean_and_error, read_row, write_row


def write_idx(path: Path, array: Tensor) -> None:
    raw = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.numpy().tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of blocks whose place tells their class, as four files."""
    root = tmp_path / "data"
    root.mkdir()
    for kind, n in (("train", 356), ("t10k", 60)):
        labels = (torch.arange(n) % 10).to(torch.uint8)
        images = torch.zeros(n, 28, 28, dtype=torch.uint8)
        for label in range(10):
            images[labels == label, 2 * label : 2 * label + 8, 4:24] = 200
        write_idx(root / f"{kind}-images-idx3-ubyte.gz", images)
        write_idx(root / f"{kind}-labels-idx1-ubyte", labels)
    return root


def test_idx(tmp_path: Path, folder: Path) -> None:
    array = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    for name in ("a", "a.gz"):
        write_idx(tmp_path / name, array)
        assert torch.equal(read_idx(tmp_path / name), array)
    data = fashion_mnist(folder, held_out=100)
    assert (len(data.train), len(data.held_out), len(data.test)) == (256, 100, 60)
    assert data.train.images.shape == (256, 1, 28, 28) and data.train.labels[:12].tolist() == [*range(10), 0, 1]
    assert data.held_out.labels[0] == 256 % 10


def test_damaged_idx(tmp_path: Path, folder: Path) -> None:
    whole = (folder / "t10k-labels-idx1-ubyte").read_bytes()
    for raw in (whole[:-1], whole[:3], b"\0\0\x0d" + whole[3:], gzip.compress(whole)[:-9], b""):
        (tmp_path / "x").write_bytes(raw)
        with pytest.raises(FileFormatError):
            read_idx(tmp_path / "x")
    write_idx(folder / "t10k-labels-idx1-ubyte", torch.zeros(59, dtype=torch.uint8))
    with pytest.raises(FileFormatError, match="t10k holds images"):
        fashion_mnist(folder)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ArgumentError, match="t10k-labels-idx1-ubyte.gz in it"):
        fashion_mnist(folder)


def test_the_student_is_small_enough() -> None:
    sizes = [sum(p.numel() for p in model.parameters()) for model in (build_teacher(), build_student())]
    assert sizes == [1_209_834, 51_578] and sizes[1] * 20 <= sizes[0]


def test_the_command_makes_its_rows_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher, int8, students, and all three together; then again, from the files alone."""
    docs, out = tmp_path / "results.md", tmp_path / "out"
    docs.write_text("# Results\n\n<!-- other -->\nkept\n<!-- /other -->\n")
    names = ["teacher", "int8", "student-plain-0", "student-distilled-0", "2of4-0", "all-0"]
    arguments = ["--out", str(out), "--data", str(folder), "--docs", str(docs), "--quick"]
    arguments += [a for name in names for a in ("--only", name)]
    app = typer_app()
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    rows = {name: read_row(name, out / "rows") for name in names}
    assert all(row is not None for row in rows.values())
    text = docs.read_text()
    assert "kept" in text and text.count("<!-- fashion-mnist -->") == 1
    assert "| 90 % zeros | did not finish |" in text and "over 1 seed, paired (2 of 3 seeds did not" in text
    teacher, small = rows["teacher"], rows["all-0"]
    assert teacher is not None and small is not None
    assert teacher.parameters == 1_209_834 and small.parameters < 51_578 * 0.35 and small.hours > 0
    assert small.megabytes < teacher.megabytes / 50
    two = rows["2of4-0"]
    assert two is not None and two.parameters == pytest.approx(1_209_834 / 2, rel=0.03)
    monkeypatch.setattr(run, "ROWS", dict.fromkeys(run.ROWS, None))  # a row that is made again fails
    second = CliRunner().invoke(app, arguments)
    assert second.exit_code == 0, second.output


def test_the_search_writes_a_table_and_a_picture(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    from cnncomp.results import search

    monkeypatch.setattr("cnncomp.search.run.EXTRA_RUNGS", 2)
    app, docs = typer.Typer(), tmp_path / "results.md"
    app.command()(search.main)
    arguments = ["--out", str(tmp_path / "out"), "--data", str(folder), "--docs", str(docs), "--quick"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "0.5 of the dense latency |" in docs.read_text() and docs.read_text().count("<!-- search -->") == 1
    assert (tmp_path / "results-search.png").stat().st_size > 10_000


def typer_app() -> object:
    import typer

    app = typer.Typer()
    app.command()(run.main)
    return app


def test_the_command_refuses(tmp_path: Path) -> None:
    wrong = CliRunner().invoke(typer_app(), ["--only", "nothing", "--out", str(tmp_path)])
    assert wrong.exit_code == 2 and "no row" in wrong.output
    missing = CliRunner().invoke(typer_app(), ["--data", str(tmp_path), "--out", str(tmp_path)])
    assert missing.exit_code == 2 and "folder" in missing.output


def row(name: str, accuracy: float) -> Row:
    return Row(name, accuracy, None if name == "teacher" else 0.9, {"noise": 0.5}, 1000, 2.0, 1.5)


def test_the_gain_is_paired_by_seed() -> None:
    rows = {"teacher": row("teacher", 0.95)}
    for seed, (plain, distilled) in enumerate([(0.90, 0.91), (0.80, 0.83), (0.85, 0.87)]):
        rows[f"student-plain-{seed}"] = row(f"student-plain-{seed}", plain)
        rows[f"student-distilled-{seed}"] = row(f"student-distilled-{seed}", distilled)
    rows["all-0"] = row("all-0", 0.94)
    text = report.text(rows, {"teacher": 2.0, "dense": 1.0, "all": 0.25})
    assert "gain 2.00 ± 0.58 points" in text
    assert "| student | 85.00 ± 2.89 % | -10.00 | 90.0 % | 50.0 % | 1,000 | 2.000 | 1.0 |  |  |  | 1.50 | 3 |" in text
    assert "| 94.00 % | -1.00 | 90.0 % | 50.0 % | 1,000 | 2.000 | 1.0 | 0.25 | 8.00 | 4.00 | 1.50 | 1 |" in text


def test_mean_and_error() -> None:
    mean, error = mean_and_error([1.0, 2.0, 3.0])
    assert mean == 2 and error == pytest.approx(1 / math.sqrt(3))
    assert mean_and_error([4.0])[0] == 4 and math.isnan(mean_and_error([4.0])[1])


def test_rows_and_sections(tmp_path: Path) -> None:
    assert read_row("teacher", tmp_path) is None
    write_row(row("teacher", 0.5), tmp_path)
    assert read_row("teacher", tmp_path) == row("teacher", 0.5) and len(list(tmp_path.iterdir())) == 1
    path = tmp_path / "docs" / "r.md"
    for content in ("first", "second"):
        report.replace_section(path, "a", content)
        report.replace_section(path, "b", "other")
    assert path.read_text() == "<!-- a -->\nsecond\n<!-- /a -->\n\n<!-- b -->\nother\n<!-- /b -->\n"
