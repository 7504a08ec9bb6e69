"""Virtual environments for the engines, made once: ``python -m bench.peers.environments``. What does not install is a line.

Below ``build/peers``, one per ``bench/requirements-peers*.txt``. A requirement that can't be installed takes only the engines
with it that need it: their workers will say so.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "peers"


@dataclass(frozen=True)
class Environment:
    """``newest``: the last Python that it takes."""

    name: str
    requirements: str
    newest: tuple[int, int] | None = None
    same_torch: bool = False

    @property
    def python(self) -> Path:
        return FOLDER / self.name / "bin" / "python"

    def wanted(self) -> list[str]:
        """What to install, in this order, each after the one before."""
        lines = (ROOT / "bench" / self.requirements).read_text().splitlines()
        torch = [f"torch=={version('torch').partition('+')[0]}"] if self.same_torch else []
        return torch + [line for line in lines if line and not line.startswith("#")]


ENVIRONMENTS = {
    e.name: e
    for e in (
        Environment("runtimes", "requirements-peers.txt"),
        Environment("litert", "requirements-peers-litert.txt", same_torch=True),
        Environment("deepsparse", "requirements-peers-deepsparse.txt", newest=(3, 11)),
    )
}


def interpreter(newest: tuple[int, int] | None) -> str | None:
    """A Python that is no newer: this one, or the newest on the path."""
    if newest is None or sys.version_info[:2] <= newest:
        return sys.executable
    names = (f"python{newest[0]}.{minor}" for minor in range(newest[1], 7, -1))
    return next((path for name in names if (path := shutil.which(name))), None)


def make(environment: Environment) -> list[str]:
    """Install what is not installed yet; a line for everything that went wrong."""
    wanted, stamp = environment.wanted(), FOLDER / environment.name / ".installed"
    if stamp.exists() and stamp.read_text().splitlines() == wanted:
        return []
    python = interpreter(environment.newest)
    if python is None:
        return [f"{environment.name}: needs Python {'.'.join(map(str, environment.newest or ()))} or older, none found"]
    print(f"· installing {environment.name}: {', '.join(wanted)}", file=sys.stderr, flush=True)
    subprocess.run([python, "-m", "venv", FOLDER / environment.name], check=True)
    problems, before = [], []
    for requirement in wanted:
        pip = [environment.python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        # With those before it, so that it does not replace them.
        done = subprocess.run([*pip, *before, requirement], stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            before.append(requirement)
        else:
            why = re.findall(r"^ERROR: (.*)", done.stderr, re.MULTILINE) or ["pip failed"]
            problems.append(f"{environment.name}: {requirement} does not install: {why[-1]}")
    if not problems:
        stamp.write_text("\n".join(wanted) + "\n")
    return problems


def main() -> None:
    for environment in ENVIRONMENTS.values():
        try:
            problems = make(environment)
        except (OSError, subprocess.SubprocessError) as error:
            problems = [f"{environment.name}: {error}"]
        for problem in problems:
            print(f"skipped: {problem}", file=sys.stderr)


if __name__ == "__main__":
    main()
