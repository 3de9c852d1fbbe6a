"""Whatever an engine leaves behind is found by name and ended, and nobody else's process is touched."""

from __future__ import annotations

import subprocess
import sys
from multiprocessing import shared_memory

import psutil
import pytest

from verl_rlhfless.process_tree import ProcessTree, all_segments, end_server, end_tree, inspect_tree, process_key

_CHILD = """
import subprocess, sys
from multiprocessing import resource_tracker, shared_memory
segment = shared_memory.SharedMemory(name=sys.argv[1], create=True, size=4096)
resource_tracker.unregister(segment._name, "shared_memory")
grandchild = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print("up", flush=True)
sys.stdin.read()
"""


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie that nobody reaped yet."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def engine_like():
    """A child process with a child of its own and a segment that it never unlinks."""
    name = f"psm_test_{psutil.Process().pid}"
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "up\n"
    yield process, name
    process.kill()
    process.wait()
    if name in all_segments():
        shared_memory.SharedMemory(name=name).unlink()


def test_tree_ends_completely(engine_like) -> None:
    process, segment = engine_like
    tree = inspect_tree(psutil.Process().pid)
    pids = {pid for pid, _ in tree.children}
    assert process.pid in pids and len(pids) >= 2 and segment in tree.segments
    ours = {process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))}
    mine = ProcessTree(tuple(child for child in tree.children if child[0] in ours), (segment,))
    assert end_tree(mine, timeout_s=10) == ()
    assert all(map(has_ended, ours))
    assert segment not in all_segments()


def test_reused_pid_is_left_alone(engine_like) -> None:
    process, _ = engine_like
    stale = ProcessTree(((process.pid, psutil.Process(process.pid).create_time() - 100.0),), ())
    assert end_tree(stale, timeout_s=1) == ()
    assert process.poll() is None


def test_server_ends_with_what_it_runs_now(engine_like) -> None:
    process, segment = engine_like
    ours = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    assert end_server(process_key(process.pid), ProcessTree((), ()), timeout_s=10) == ()
    assert all(map(has_ended, ours))
    assert segment not in all_segments()


def test_server_that_is_gone_still_loses_what_it_was_known_to_run(engine_like) -> None:
    process, segment = engine_like
    tree = inspect_tree(process.pid)
    server = process_key(process.pid)
    process.kill()
    process.wait()
    assert end_server(server, ProcessTree(tree.children, (segment,)), timeout_s=10) == ()
    assert all(has_ended(pid) for pid, _ in tree.children)
    assert segment not in all_segments()
