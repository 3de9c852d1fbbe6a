"""What a figure was measured on and with, and by which code: every record of this project holds all three."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from verl_rlhfless import __version__

_DISTRIBUTIONS = ("verl", "vllm", "torch", "ray")
_ROOT = Path(__file__).parents[2]
_SAYS_NOTHING = (":(exclude)benchmarks/results", ":(exclude)*.md")  # changes there change no figure


def versions() -> dict[str, str | None]:
    """Return the version of Python, of this package and of its stack; ``None`` = not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "verl_rlhfless": __version__}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


@cache
def code() -> dict[str, Any]:
    """Return the commit of this package and whether its checkout differs from it; both ``None`` outside of a checkout.

    The first call counts for the whole process, so that it is made before what may take hours.
    """
    root = _git("rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() != _ROOT.resolve():  # installed: a repository around it is not ours
        return {"commit": None, "has_uncommitted_changes": None}
    changes = _git("status", "--porcelain", "--", ".", *_SAYS_NOTHING)
    return {"commit": _git("rev-parse", "--short", "HEAD"), "has_uncommitted_changes": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=_ROOT, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def gpu_names() -> list[str]:
    """Return the names of this host's GPUs, as their driver tells them: asking them would take memory on each."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def hardware(num_gpus: int) -> dict[str, Any]:
    """Return the host's processor, cores, memory and GPUs, and the GPUs that the run declared."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpu_names(),
        "gpus_declared": num_gpus,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
