"""Run every benchmark that needs nothing but this host, one after another: about half an hour.

The others take a trace, a folder of runs, or much longer; each module says how it is run.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks import command

MODULES = (
    "policy",
    "scaling",
    "foundation",
    "instrument",
    "weights",
    "router",
    "journal",
    "engine_start",
    "host_memory",
)


def main() -> None:
    """Run each benchmark in a process of its own; the first failure ends the run."""
    for module in MODULES:
        print(f"benchmark: {module}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{module}"], check=True)


if __name__ == "__main__":
    command.run(main, __doc__)
