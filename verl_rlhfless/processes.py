"""Processes by name, and their certain end: an engine outlives a server actor that is killed, and its GPUs with it.

Invariant: a process has ended when its last thread has, whoever reaps it: until then its memory and devices are held.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import time
from collections.abc import Iterable

import psutil

ProcessKey = tuple[int, float]
"""Pid and create time [s since the epoch], which together name a process for good: pids are reused."""

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.005


def process_key(pid: int) -> ProcessKey:
    """Return the key of a running process."""
    return pid, psutil.Process(pid).create_time()


def is_running(key: ProcessKey) -> bool:
    """Return whether the process is there, to the millisecond of its start."""
    pid, create_time = key
    try:
        return abs(psutil.Process(pid).create_time() - create_time) < 1e-3
    except psutil.NoSuchProcess:
        return False


def descendants(pid: int) -> tuple[ProcessKey, ...]:
    """Return the keys of everything that a process started and that still runs, deepest first; none if it is gone."""
    found: list[ProcessKey] = []
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return ()
    for child in reversed(children):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append((child.pid, child.create_time()))
    return tuple(found)


def end_processes(keys: Iterable[ProcessKey], timeout_s: float) -> tuple[int, ...]:
    """Kill processes and return the pids that still run after ``timeout_s``; one that is gone already is fine."""
    alive = [process for process in map(_find, keys) if process is not None]
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + timeout_s
    while (alive := [process for process in alive if _is_running(process)]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return tuple(process.pid for process in alive)


def end_server(server: ProcessKey, known: Iterable[ProcessKey], timeout_s: float) -> tuple[int, ...]:
    """End a server that may or may not live: what it was known to run, what it runs now, and itself.

    Returns:
        The pids that survived.
    """
    now = descendants(server[0]) if _find(server) is not None else ()
    return end_processes(dict.fromkeys((*now, *known, server)), timeout_s)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _find(key: ProcessKey) -> psutil.Process | None:
    pid, create_time = key
    try:
        process = psutil.Process(pid)
        return process if process.create_time() == create_time else None
    except psutil.NoSuchProcess:
        return None


def _is_running(process: psutil.Process) -> bool:
    try:
        # A zombie is a process whose first thread has ended. The last one gives memory and devices back before it ends.
        return bool(process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1)
    except psutil.NoSuchProcess:
        return False
