"""The sockets and the shared memory of vLLM's processes, which stay behind when an engine is killed.

A connected socket needs no name. So a server's sockets lie in a folder of its own until its engine is up, and the
folder is removed then: whatever ends the engine later, nothing stays behind. What a server leaves that is killed
during a start is removed by whoever reaps it, or by the next start on the node. Shared memory has names during a start,
too: whoever ends the processes that map it removes them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from verl_rlhfless.processes import (
    ProcessKey,
    descendants,
    end_processes,
    end_server,
    is_running,
    process_key,
)
from verl_rlhfless.shared_memory import mapped_segments, unlink_segments

_ROOT = Path("/tmp")  # as verl for its sockets: the TMPDIR of a job may be longer than a name of a socket can be
_PREFIX = "rlhfless-sockets-"
_FOLDER_VARIABLE = "VLLM_RPC_BASE_PATH"


@contextlib.contextmanager
def sockets_without_names() -> Iterator[None]:
    """Let an engine that this process starts meanwhile bind its sockets in a folder that is gone afterwards."""
    _remove_orphans()
    folder = _folder_of(process_key(os.getpid()))
    folder.mkdir(mode=0o700, exist_ok=True)
    before = os.environ.get(_FOLDER_VARIABLE)
    os.environ[_FOLDER_VARIABLE] = str(folder)
    try:
        yield
    finally:
        # A process that this one starts later would look for its sockets in the folder that is gone.
        os.environ.pop(_FOLDER_VARIABLE)
        if before is not None:
            os.environ[_FOLDER_VARIABLE] = before
        shutil.rmtree(folder, ignore_errors=True)


def end_engine(processes: Sequence[ProcessKey], timeout_s: float) -> tuple[int, ...]:
    """End an engine as :func:`~verl_rlhfless.processes.end_processes` does, and remove its shared memory."""
    segments = _segments_of(processes)
    survivors = end_processes(processes, timeout_s)
    unlink_segments(segments)
    return survivors


def reap_server(server: ProcessKey, known: Iterable[ProcessKey], timeout_s: float) -> tuple[int, ...]:
    """End a server and its engine as :func:`~verl_rlhfless.processes.end_server` does, and remove their files."""
    known = tuple(known)
    started = descendants(server[0]) if is_running(server) else ()  # else the pid may be another's
    segments = _segments_of((server, *known, *started))
    survivors = end_server(server, known, timeout_s)
    unlink_segments(segments)
    shutil.rmtree(_folder_of(server), ignore_errors=True)
    return survivors


def _segments_of(processes: Iterable[ProcessKey]) -> set[str]:
    return mapped_segments(process[0] for process in processes if is_running(process))


def _remove_orphans() -> None:
    ours = f"{_PREFIX}{_pid_namespace()}-"
    for folder in _ROOT.glob(f"{ours}*"):
        pid, _, create_ms = folder.name.removeprefix(ours).partition("-")
        if pid.isdecimal() and create_ms.isdecimal() and not is_running((int(pid), int(create_ms) / 1e3)):
            shutil.rmtree(folder, ignore_errors=True)  # of another user: theirs to remove


def _folder_of(server: ProcessKey) -> Path:
    pid, create_time_s = server
    return _ROOT / f"{_PREFIX}{_pid_namespace()}-{pid}-{round(create_time_s * 1e3)}"


def _pid_namespace() -> int:
    """Return which processes the pids are of: containers that share the folder do not see each other's."""
    return os.stat("/proc/self/ns/pid").st_ino
