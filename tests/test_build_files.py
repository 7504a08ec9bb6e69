"""Files of the build and of the caches of tests and benches: none that is stale, none that is written by half."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from bench import files
from tests import cuda_emulated as emulated
from tests.helpers import outside_xdist

NINJA = """
rule cc
  command = {command} && echo "$out: $in $dir/header" > $out.d
  depfile = $out.d
  deps = gcc
build {folder}/csrc_cuda_a.cu.o: cc {folder}/source
  dir = {folder}
"""


def built(folder: Path, command: str = "cat $in $dir/header > $out") -> Path:
    """An object of a source and a header, by ninja."""
    ninja = pytest.importorskip("ninja", reason="ninja is not installed")
    for name in ("source", "header"):
        (folder / name).write_text(name)
        os.utime(folder / name, (time.time() - 10,) * 2)
    (folder / "build.ninja").write_text(NINJA.format(command=command, folder=folder))
    subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", folder], check=True, capture_output=True)
    return folder / "csrc_cuda_a.cu.o"


def current(out: Path) -> bool:
    return emulated.linked_as_it_is(out, {out.parent / "source", out.parent / "header"})


def later(path: Path) -> None:
    """As if it were changed in a second."""
    os.utime(path, (time.time() + 1,) * 2)


@pytest.mark.parametrize("name", ["source", "header"])
def test_an_object_of_other_sources_is_stale(tmp_path, name):
    out = built(tmp_path)
    assert current(out)
    later(tmp_path / name)
    assert not current(out)


def test_an_object_is_stale_whose_source_changed_while_it_was_compiled(tmp_path):
    """Though it is newer than the source."""
    out = built(tmp_path, "cat $in > $out; sleep 0.2; touch $in; sleep 0.2; touch $out; true")
    assert out.stat().st_mtime > (tmp_path / "source").stat().st_mtime
    assert not current(out)


def test_an_object_of_another_command_or_place_is_stale(tmp_path):
    out = built(tmp_path)
    text = (tmp_path / "build.ninja").read_text()
    (tmp_path / "build.ninja").write_text(text.replace("cat ", "cat -u "))
    assert not current(out)
    (tmp_path / "build.ninja").write_text(text)
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "_moved"))
    assert not current(moved / out.name)


def test_all_builds_are_looked_at(tmp_path, monkeypatch):
    """Of two folders the first of which is stale, the other's object is taken."""
    folders = [tmp_path / "build" / f"ninja-{name}" for name in "ab"]
    for folder in folders:
        folder.mkdir(parents=True)
    first, second = map(built, folders)
    later(folders[0] / "source")
    monkeypatch.setattr(emulated, "ROOT", tmp_path)
    monkeypatch.setattr(emulated, "_included", lambda path: {folders[1] / "source"})
    assert emulated.built_objects("a") == [second] and first.exists()


def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    with pytest.raises(ValueError), files.replaced(path) as partial:
        partial.write_text("hal")
        raise ValueError
    assert not list(path.parent.iterdir())
    with files.replaced(path) as one, files.replaced(path) as other:
        assert one != other and not path.exists()
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]
    files.write(path, "two")
    assert path.read_text() == "two"


def test_a_pytest_of_its_own_is_none_of_xdists(monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    monkeypatch.setenv("OTHER", "kept")
    assert outside_xdist()["OTHER"] == "kept" and not [n for n in outside_xdist() if n.startswith("PYTEST_XDIST")]
