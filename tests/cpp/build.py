"""Builds the driver of the C++ core's checks: csrc/cpu without its bindings, and tests/cpp, with a sanitizer or without."""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ninja
from ninja.ninja_syntax import Writer

ROOT = Path(__file__).parents[2]
CORE, CHECKS = ROOT / "csrc" / "cpu", ROOT / "tests" / "cpp"

#: This machine's processor, as setup.py calls it.
FAMILY = "arm64" if platform.machine().lower() in ("aarch64", "arm64") else "x86"

#: What is added to the flags of each kind of build. "plain" is what users run.
KINDS = {
    "plain": [],
    "debug": ["-O1", "-g", "-D_GLIBCXX_ASSERTIONS"],
    "address": ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}


def constants_of_setup(*names: str) -> list[Any]:
    """Values of constants in setup.py, which can't be imported."""
    found = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names
    }
    return [found[name] for name in names]


def compiler() -> str | None:
    """The C++ compiler, None if there is none."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def built_objects() -> Path | None:
    """Where the package's own build left the core's object files, if ninja finds them up to date."""
    for folder in (ROOT / "build").glob("ninja-*"):
        objects = [str(folder / f"csrc_cpu_{source.name}.o") for source in sources(CORE)]
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder), "-n", *objects]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode == 0 and "no work to do" in found.stdout:
            return folder
    return None


def sources(folder: Path, family: str = FAMILY) -> list[Path]:
    """What can be compiled for a family of processors, but for the bindings to Python."""
    (by_family,) = constants_of_setup("ISA_FLAGS")
    elsewhere = {isa for other, isas in by_family.items() if other != family for isa in isas}
    names = (path for path in sorted(folder.glob("*.cpp")) if "bindings" not in path.stem)
    return [path for path in names if path.stem.rsplit("_", 1)[-1] not in elsewhere]


def build(kind: str, jobs: int | None = None) -> Path:
    """Compile what has changed; the driver's path. A plain one takes the core from the package's own build, if that is there.

    Raises:
        subprocess.CalledProcessError: it does not compile; ninja has said why.
    """
    flags, by_family = constants_of_setup("CXX_FLAGS", "ISA_FLAGS")
    by_isa = by_family.get(FAMILY, {})
    folder = ROOT / "build" / "checks" / kind
    folder.mkdir(parents=True, exist_ok=True)
    ready = built_objects() if kind == "plain" else None
    with (folder / "build.ninja").open("w") as f:
        n = Writer(f)
        n.rule("cxx", f"{compiler()} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
        n.rule("link", f"{compiler()} {' '.join(KINDS[kind])} -pthread $in -o $out")
        objects = []
        for source in [*sources(CORE), *sources(CHECKS)]:
            if ready is not None and source.parent == CORE:
                objects.append(str(ready / f"csrc_cpu_{source.name}.o"))
                continue
            isa = by_isa.get(source.stem.rsplit("_", 1)[-1], [])
            every = [*flags, *KINDS[kind], *isa, f"-I{ROOT / 'csrc'}", f"-I{CHECKS}", "-pthread"]
            if source.parent == CHECKS:
                every.append("-O1")  # compiles faster
            objects.append(str(folder / f"{source.stem}.o"))
            n.build(objects[-1], "cxx", str(source), variables={"flags": " ".join(every)})
        n.build(str(folder / "check"), "link", objects)
    command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder), *(["-j", str(jobs)] if jobs else [])]
    subprocess.run([*command, "--quiet"], check=True, stdout=sys.stderr)
    return folder / "check"
