"""The C++ core under AddressSanitizer with UBSan, under ThreadSanitizer, and between guard pages: ``make sanitize``.

Kernels of all instruction sets that this CPU has, on random shapes, by one thread, by several, and by two callers at once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from tests.cpp.build import build

#: Builds, where the guard pages are, and how many shapes of each kernel; ThreadSanitizer is slow.
RUNS = (("address", "heap", 300), ("thread", "heap", 20), ("debug", "after", 200), ("debug", "before", 200))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, help="shapes of each kernel, in place of each run's own number")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = []
    for kind, guard, rounds in RUNS:
        print(f"· {kind}, guard pages: {guard}", flush=True)
        command = [build(kind), guard, str(options.rounds or rounds), str(options.seed)]
        if subprocess.run(command).returncode != 0:
            failed.append(f"{kind} ({guard})")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    print("all passed")


if __name__ == "__main__":
    main()
