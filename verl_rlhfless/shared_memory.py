"""The shared-memory segments of vLLM's queues and collectives, which vLLM leaks on every kind of exit.

Linux frees a segment when its name is gone and nobody maps it any more. So the names of an engine that is up are
removed at once: its processes go on using the memory, and whatever ends them, nothing stays behind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_FOLDER = Path("/dev/shm")
# Of Python's SharedMemory, of vLLM's collectives between CPU workers, and of a weight load that was cut off.
_PREFIXES = ("psm_", "vllm_dist_", "verl_weights_")


def queue_segments() -> set[str]:
    """Return the names of all segments on this host that vLLM's workers may have made."""
    return {path.name for path in _FOLDER.iterdir() if path.name.startswith(_PREFIXES)}


def mapped_segments(pids: Iterable[int]) -> set[str]:
    """Return the names of the segments that processes map; one that is gone, or not ours to look into, maps nothing."""
    return {name for pid in pids for name in _mapped_by(pid)}


def unlink_segments(names: Iterable[str]) -> None:
    """Remove segments by name; one that is gone already is fine, and another user's is theirs to remove."""
    for name in names:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.unlink(_FOLDER / name)


def _mapped_by(pid: int) -> Iterable[str]:
    markers = tuple(f"{_FOLDER}/{prefix}" for prefix in _PREFIXES)
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            if any(marker in line for marker in markers):
                yield line.split(f"{_FOLDER}/", 1)[1].split()[0]
