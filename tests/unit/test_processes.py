"""Processes that a killed server leaves behind are found and ended, and nobody else's process is touched."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from verl_rlhfless.processes import ProcessKey, descendants, end_processes, end_server, process_key

_SERVER = """
import subprocess, sys
engine = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print("up", flush=True)
sys.stdin.read()
"""

_HOLDER = """
import ctypes, threading
held = bytearray(512 << 20)
for page in range(0, len(held), 4096):
    held[page] = 1
threading.Thread(target=threading.Event().wait).start()
print("up", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    """A process with a child of its own, as a server actor has an engine."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "up\n"
    engine = descendants(process.pid)
    yield process
    process.kill()
    process.wait()
    end_processes(engine, timeout_s=10)


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """A zombie whose second thread lives and holds the memory of the process."""
    process = subprocess.Popen([sys.executable, "-c", _HOLDER], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "up\n"
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    yield process
    process.kill()
    process.wait()


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie that nobody reaped yet."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_descendants_end(server: subprocess.Popen[str]) -> None:
    engine = descendants(server.pid)
    assert len(engine) == 1
    assert end_processes(engine, timeout_s=10) == ()
    assert has_ended(engine[0][0]) and server.poll() is None


def test_a_process_has_ended_with_its_last_thread_and_not_with_its_first(holder: subprocess.Popen[str]) -> None:
    threads = Path(f"/proc/{holder.pid}/task")
    assert len(list(threads.iterdir())) == 2
    assert end_processes([process_key(holder.pid)], timeout_s=30) == ()
    assert len(list(threads.iterdir())) == 1, "the memory is free, though nobody has reaped it"


def test_reused_pid_is_left_alone(server: subprocess.Popen[str]) -> None:
    stale: ProcessKey = (server.pid, psutil.Process(server.pid).create_time() - 100.0)
    assert end_processes([stale], timeout_s=1) == ()
    assert server.poll() is None


def test_server_ends_with_what_it_runs_now(server: subprocess.Popen[str]) -> None:
    engine = descendants(server.pid)
    assert end_server(process_key(server.pid), (), timeout_s=10) == ()
    assert has_ended(server.pid) and has_ended(engine[0][0])


def test_server_that_is_gone_still_loses_what_it_was_known_to_run(server: subprocess.Popen[str]) -> None:
    engine, key = descendants(server.pid), process_key(server.pid)
    server.kill()
    server.wait()
    assert not has_ended(engine[0][0])
    assert end_server(key, engine, timeout_s=10) == ()
    assert has_ended(engine[0][0])
