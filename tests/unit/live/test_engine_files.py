"""Sockets of an engine have no name once it is up, and none of a server that is gone stays behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from verl_rlhfless.live import engine_files
from verl_rlhfless.live.engine_files import end_engine, reap_server, sockets_without_names
from verl_rlhfless.processes import process_key
from verl_rlhfless.shared_memory import queue_segments, unlink_segments


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as short:
        monkeypatch.setattr(engine_files, "_ROOT", Path(short))
        yield Path(short)


def _in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_sockets_that_are_connected_go_on_without_a_name(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        with sockets_without_names():
            server.bind(f"{os.environ['VLLM_RPC_BASE_PATH']}/x")
            server.listen()
            client.connect(server.getsockname())
        client.send(b"hello")
        assert server.accept()[0].recv(5) == b"hello"
    assert _in(folder) == []


def test_a_start_that_fails_leaves_nothing(folder: Path) -> None:
    with pytest.raises(RuntimeError), sockets_without_names():
        raise RuntimeError("the engine broke")
    assert _in(folder) == []


@pytest.mark.parametrize("before", [None, "/tmp"])
def test_later_processes_do_not_look_for_sockets_in_the_folder_that_is_gone(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    if before is not None:
        monkeypatch.setenv("VLLM_RPC_BASE_PATH", before)
    with sockets_without_names():
        pass
    assert os.environ.get("VLLM_RPC_BASE_PATH") == before


def test_names_are_short_enough_however_long_the_folder_for_temporary_files_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", f"/scratch/{'x' * 90}")
    with sockets_without_names(), socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{os.environ['VLLM_RPC_BASE_PATH']}/{uuid.uuid4()}")  # as vLLM names them


def _name(pid: int, create_time_s: float) -> str:
    return f"rlhfless-sockets-{os.stat('/proc/self/ns/pid').st_ino}-{pid}-{round(create_time_s * 1e3)}"


def _killed_during_a_start(folder: Path) -> tuple[int, float]:
    process = subprocess.Popen(["sleep", "60"])
    pid, create_time_s = process_key(process.pid)
    (folder / _name(pid, create_time_s)).mkdir()
    process.kill()
    process.wait()
    return pid, create_time_s


def test_the_reaper_removes_what_a_killed_server_left(folder: Path) -> None:
    server = _killed_during_a_start(folder)
    assert reap_server(server, (), timeout_s=1.0) == ()
    assert _in(folder) == []


_ENGINE = """
from multiprocessing import resource_tracker, shared_memory
import sys, time
memory = shared_memory.SharedMemory(name=sys.argv[1], create=True, size=4096)
resource_tracker.unregister(memory._name, "shared_memory")
print(flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("way", ["its server ends it", "a task on its node reaps it", "what is known of it is reaped"])
def test_an_engine_that_is_killed_during_its_start_leaves_no_shared_memory(way: str) -> None:
    name = f"psm_test_{os.getpid()}"
    engine = subprocess.Popen([sys.executable, "-c", _ENGINE, name], stdout=subprocess.PIPE)
    try:
        assert engine.stdout is not None and engine.stdout.readline()
        key, gone = process_key(engine.pid), (2**22 - 1, 1.0)
        if way == "its server ends it":
            assert end_engine((key,), 10.0) == ()
        else:
            server, known = (key, ()) if way == "a task on its node reaps it" else (gone, (key,))
            assert reap_server(server, known, 10.0) == ()
        assert name not in queue_segments()
    finally:
        engine.kill()
        engine.wait()
        unlink_segments([name])


_STARTING = """
from verl_rlhfless.live.vllm_plugin import install_in_vllm
from multiprocessing import resource_tracker, shared_memory
install_in_vllm()
memory = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(memory._name, "shared_memory")
print(memory.name)
"""


def _left_by_an_engine(folder: str) -> str:
    """Return the name of the segment that an engine leaves which is killed while a server starts it."""
    command = [sys.executable, "-c", _STARTING]
    environment = os.environ | {"VLLM_RPC_BASE_PATH": folder}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("way", ["its server goes on", "a task on its node reaps it", "the next start finds it"])
def test_what_an_engine_leaves_that_died_during_its_start_is_told_by_its_name(way: str, folder: Path) -> None:
    if way == "its server goes on":
        with sockets_without_names():
            name = _left_by_an_engine(os.environ["VLLM_RPC_BASE_PATH"])
            assert name in queue_segments()
    else:
        server = _killed_during_a_start(folder)
        name = _left_by_an_engine(str(next(folder.iterdir())))
        assert name in queue_segments()
        if way == "a task on its node reaps it":
            reap_server(server, (), timeout_s=1.0)
        else:
            with sockets_without_names():
                pass
    assert name not in queue_segments()


@pytest.mark.parametrize("whose", ["a living server's", "another container's", "another program's"])
def test_what_may_be_in_use_stays(whose: str, folder: Path) -> None:
    if whose == "a living server's":
        pid, create_time_s = process_key(os.getpid())
        name = _left_by_an_engine(str(folder / f"rlhfless-sockets-{pid}-{round(create_time_s * 1e3)}"))
    else:
        name = "psm_rlhfless-1-4194303-1-00" if whose == "another container's" else "psm_4194303-1-00"
        (Path("/dev/shm") / name).touch()
    try:
        reap_server(_killed_during_a_start(folder), (), timeout_s=1.0)
        engine_files._remove_orphans()
        assert name in queue_segments()
    finally:
        unlink_segments([name])


def test_the_next_start_removes_orphans_and_nothing_else(folder: Path) -> None:
    _killed_during_a_start(folder)
    living = subprocess.Popen(["sleep", "60"])
    try:
        pid, create_time_s = process_key(living.pid)
        of_another_container = "rlhfless-sockets-1-4194303-1000"  # where that pid may well live
        kept = [_name(pid, create_time_s), of_another_container, "rlhfless-sockets-of-someone", "other"]
        for name in kept:
            (folder / name).mkdir()
        with sockets_without_names():
            pass
    finally:
        living.kill()
        living.wait()
    assert sorted(_in(folder)) == sorted(kept)
