"""The operating-system side of an engine: its processes and its shared-memory segments.

vLLM leaks ``/dev/shm/psm_*`` segments on every kind of exit, and an engine outlives a server actor that is killed:
whoever stops a replica needs both by name, noted while it still runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

_SHM = Path("/dev/shm")
_SEGMENT_PREFIX = "psm_"
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class ProcessTree:
    """Children of a server process on its node, and the shared-memory segments that they map.

    Attributes:
        children: ``(pid, create_time [s since the epoch])``, deepest first; the time tells a reused pid apart.
        segments: File names below ``/dev/shm``.
    """

    children: tuple[tuple[int, float], ...]
    segments: tuple[str, ...]

    def union(self, other: ProcessTree) -> ProcessTree:
        """Return everything that is in this tree or in the other one."""
        children = tuple(dict.fromkeys((*self.children, *other.children)))
        return ProcessTree(children, tuple(dict.fromkeys((*self.segments, *other.segments))))


def inspect_tree(root_pid: int) -> ProcessTree:
    """Return the descendants of ``root_pid`` and the segments that the tree maps."""
    root = psutil.Process(root_pid)
    children = list(reversed(root.children(recursive=True)))
    known = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            known.append((child.pid, child.create_time()))
    segments = sorted({name for pid in (root_pid, *(pid for pid, _ in known)) for name in mapped_segments(pid)})
    return ProcessTree(tuple(known), tuple(segments))


def all_segments() -> set[str]:
    """Return the names of every segment on this host that vLLM's queues may have made."""
    return {path.name for path in _SHM.glob(f"{_SEGMENT_PREFIX}*")}


def unlink_segments(names: Iterable[str]) -> None:
    """Remove segments by name; one that is gone already is fine."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_SHM / name)


def mapped_segments(pid: int) -> Iterable[str]:
    """Yield the names of the segments that a process maps; nothing for a process that is gone or not ours."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as maps:
        marker = f"{_SHM}/{_SEGMENT_PREFIX}"
        for line in maps:
            if marker in line:
                yield line.split(f"{_SHM}/", 1)[1].split()[0]


def process_key(pid: int) -> tuple[int, float]:
    """Return pid and create time of a process, which together name it for good."""
    return pid, psutil.Process(pid).create_time()


def end_server(server: tuple[int, float], known: ProcessTree, timeout_s: float) -> tuple[int, ...]:
    """End a server that may or may not live: itself, what it runs now, and what it was known to run.

    Returns:
        The pids that survived.
    """
    now = inspect_tree(server[0]) if _same_process(server) is not None else ProcessTree((), ())
    return end_tree(now.union(known).union(ProcessTree((server,), ())), timeout_s)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_tree(tree: ProcessTree, timeout_s: float) -> tuple[int, ...]:
    """Kill the processes of ``tree``, unlink its segments, and return the pids still alive after ``timeout_s``."""
    alive = [process for process in map(_same_process, tree.children) if process is not None]
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + timeout_s
    while (alive := [process for process in alive if _is_running(process)]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)  # a zombie has given everything back; whoever adopted it may reap it much later
    unlink_segments(tree.segments)
    return tuple(process.pid for process in alive)


def _same_process(child: tuple[int, float]) -> psutil.Process | None:
    pid, create_time = child
    try:
        process = psutil.Process(pid)
        return process if process.create_time() == create_time else None
    except psutil.NoSuchProcess:
        return None


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
