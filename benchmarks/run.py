"""Run every benchmark, one after another."""

from __future__ import annotations

import subprocess
import sys

MODULES = ("foundation", "instrument", "weights")


def main() -> None:
    """Run each benchmark in a process of its own; the first failure ends the run."""
    for module in MODULES:
        print(f"benchmark: {module}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{module}"], check=True)


if __name__ == "__main__":
    main()
