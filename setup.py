"""Builds cnncomp._cpu, and cnncomp._cuda where nvcc is found, with ninja: incremental, header dependencies tracked.

Environment: CNNCOMP_CUDA=0|1 leaves the CUDA module out, or insists on it; CNNCOMP_CUDA_ARCHS="80 90a" builds for these
architectures only; CXX and NVCC name the compilers.
"""

from __future__ import annotations

import fcntl
import functools
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
FAMILY = {"x86_64": "x86", "amd64": "x86", "i686": "x86", "aarch64": "arm64", "arm64": "arm64"}.get(
    platform.machine().lower(), ""
)

CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wall"]

#: For each family of processors, flags of the translation units of one instruction set, named by the end of their file's name.
ISA_FLAGS = {
    "x86": {
        "avx2": ["-mavx2", "-mfma"],
        "avxvnni": ["-mavx2", "-mfma", "-mavxvnni"],
        "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
        "avx512vnni": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"],
    },
    "arm64": {
        "dotprod": ["-march=armv8.2-a+dotprod"],
        "i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
    },
}
CUDA_ARCHS = ("75", "80", "86", "89", "90a", "120a")


@functools.cache
def find_nvcc() -> str | None:
    """Path of nvcc, or None: no CUDA module. CNNCOMP_CUDA decides where it is set."""
    wish = os.environ.get("CNNCOMP_CUDA", "")
    if wish == "0":
        return None
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or (str(home) if home.exists() else None)
    if nvcc is None:
        if wish == "1":
            raise SystemExit("CNNCOMP_CUDA=1, but nvcc is not on PATH, in NVCC or in CUDA_HOME/bin")
        print("cnncomp: no nvcc, building without the CUDA kernels", file=sys.stderr)
    return nvcc


def isa_of(source: Path) -> list[str]:
    """Compiler flags of the instruction set that a source file's name ends with."""
    return ISA_FLAGS.get(FAMILY, {}).get(source.stem.rsplit("_", 1)[-1], [])


class NinjaBuildExt(build_ext):
    """build_ext that writes one ninja file for all modules and runs it."""

    def build_extensions(self) -> None:
        # Not build_temp, which pip throws away: the next build compiles only what has changed.
        folder = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would spoil ninja's record of dependencies
            with (folder / "build.ninja").open("w") as f:
                self._write(Writer(f), folder)
            jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
            subprocess.run([str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder), *jobs], check=True)

    def _write(self, n: Writer, folder: Path) -> None:
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", f"-I{ROOT / 'csrc'}"]
        n.variable("cxx", os.environ.get("CXX", "g++" if shutil.which("g++") else "c++"))
        n.variable("nvcc", find_nvcc() or "nvcc")
        n.variable("includes", " ".join(includes))
        n.variable("cxxflags", " ".join(CXX_FLAGS))
        archs = os.environ.get("CNNCOMP_CUDA_ARCHS", " ".join(CUDA_ARCHS)).split()
        gencode = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)
        # --fmad=false: the epilogue rounds every step on its own.
        n.variable(
            "nvccflags", f"-O3 -std=c++17 --fmad=false --threads 2 -Xcompiler=-fPIC,-fvisibility=hidden {gencode}"
        )
        n.rule("cxx", "$cxx -MMD -MF $out.d $cxxflags $isa $includes -c $in -o $out", depfile="$out.d", deps="gcc")
        n.rule("nvcc", "$nvcc -MMD -MF $out.d $nvccflags $includes -c $in -o $out", depfile="$out.d", deps="gcc")
        undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
        n.rule("link", f"$cxx -shared {undefined} $in -o $out")
        # The runtime is linked in, so that the module loads where there is no CUDA. nvcc knows where its libraries lie.
        n.rule("link_cuda", "$nvcc -shared -cudart static $in -o $out")
        for extension in self.extensions:
            self._module(n, folder, extension)

    def _module(self, n: Writer, folder: Path, extension: Extension) -> None:
        objects = []
        for name in extension.sources:
            source = ROOT / name
            target = str(folder / f"{name.replace('/', '_')}.o")
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            n.build(target, rule, str(source), variables={"isa": " ".join(isa_of(source))})
            objects.append(target)
        out = Path(self.get_ext_fullpath(extension.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        cuda = any(name.endswith(".cu") for name in extension.sources)
        n.build(str(out), "link_cuda" if cuda else "link", objects)


def modules() -> list[Extension]:
    """The compiled modules that can be built here."""
    cpu = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))
    elsewhere = {isa for family, isas in ISA_FLAGS.items() if family != FAMILY for isa in isas}
    cpu = [s for s in cpu if Path(s).stem.rsplit("_", 1)[-1] not in elsewhere]
    found = [Extension("cnncomp._cpu", cpu)]
    cuda = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.c*") if p.suffix in (".cu", ".cpp"))
    if cuda and find_nvcc() is not None:
        found.append(Extension("cnncomp._cuda", cuda))
    return found


setup(
    ext_modules=modules(),
    cmdclass={"build_ext": NinjaBuildExt},
    packages=[*find_packages(include=["cnncomp", "cnncomp.*"]), "cnncomp.kernels"],
    package_dir={"cnncomp": "cnncomp", "cnncomp.kernels": "kernels"},
)
