"""The sockets and the shared memory of vLLM's processes, which stay behind when an engine is killed.

A connected socket needs no name. So a server's sockets lie in a folder of its own until its engine is up, and the
folder is removed then: whatever ends the engine later, nothing stays behind. Shared memory has names during a start,
too, and those tell the server. What a server or an engine leaves that is killed during a start is removed by whoever
reaps it, or by the next start on the node.
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
from verl_rlhfless.shared_memory import mapped_segments, queue_segments, unlink_segments
from verl_rlhfless_patches import python_segment_names

_ROOT = Path("/tmp")  # as verl for its sockets: the TMPDIR of a job may be longer than a name of a socket can be
_FOLDER_VARIABLE = "VLLM_RPC_BASE_PATH"


@contextlib.contextmanager
def sockets_without_names() -> Iterator[None]:
    """Let an engine that this process starts meanwhile bind its sockets in a folder that is gone afterwards."""
    _remove_orphans()
    server = process_key(os.getpid())
    folder = _folder_of(server)
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
        _remove_files_of(server)


def name_segments() -> None:
    """Let this process name its shared memory after the server that is starting it, if one of ours is."""
    folder, prefix = Path(os.environ.get(_FOLDER_VARIABLE, "")).name, _folder_prefix()
    if folder.startswith(prefix):
        python_segment_names.apply(f"{_segment_prefix()}{folder.removeprefix(prefix)}-")


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
    _remove_files_of(server)
    return survivors


def _segments_of(processes: Iterable[ProcessKey]) -> set[str]:
    return mapped_segments(process[0] for process in processes if is_running(process))


def _remove_orphans() -> None:
    folders, segments = _folder_prefix(), _segment_prefix()
    for folder in _ROOT.glob(f"{folders}*"):
        if _is_gone(folder.name.removeprefix(folders)):
            shutil.rmtree(folder, ignore_errors=True)  # of another user: theirs to remove
    named = [name for name in queue_segments() if name.startswith(segments)]
    unlink_segments(name for name in named if _is_gone(name.removeprefix(segments).rpartition("-")[0]))


def _remove_files_of(server: ProcessKey) -> None:
    shutil.rmtree(_folder_of(server), ignore_errors=True)
    prefix = f"{_segment_prefix()}{_text_of(server)}-"
    unlink_segments(name for name in queue_segments() if name.startswith(prefix))


def _folder_of(server: ProcessKey) -> Path:
    return _ROOT / f"{_folder_prefix()}{_text_of(server)}"


def _folder_prefix() -> str:
    return f"rlhfless-sockets-{_pid_namespace()}-"


def _segment_prefix() -> str:
    return f"psm_rlhfless-{_pid_namespace()}-"


def _pid_namespace() -> int:
    """Return whose pids this process sees: containers may share a folder and memory, and not their pids."""
    return os.stat("/proc/self/ns/pid").st_ino


def _text_of(server: ProcessKey) -> str:
    pid, create_time_s = server
    return f"{pid}-{round(create_time_s * 1e3)}"


def _is_gone(server: str) -> bool:
    """Return whether a text names a server that has ended; one that names none does not."""
    pid, _, create_ms = server.partition("-")
    return pid.isdecimal() and create_ms.isdecimal() and not is_running((int(pid), int(create_ms) / 1e3))
