"""What a figure was measured on and with: every record of this project holds both."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from verl_rlhfless import __version__

_DISTRIBUTIONS = ("verl", "vllm", "torch", "ray")


def versions() -> dict[str, str | None]:
    """Return the version of Python, of this package and of its stack; ``None`` = not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "verl_rlhfless": __version__}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware(num_gpus: int) -> dict[str, Any]:
    """Return the host's processor, cores and memory, and the GPUs that the run declared."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus_declared": num_gpus,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
