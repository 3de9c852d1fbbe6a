"""How much memory may still be had: the machine's, or what the limits of control groups leave of it."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from verl_rlhfless.live import available_memory
from verl_rlhfless.live.available_memory import available_bytes
from verl_rlhfless.live.host_memory import measure_host_memory
from verl_rlhfless.live.observer import HostWatch
from verl_rlhfless.live.parked_memory import measure_parked
from verl_rlhfless.live.server import ElasticServer

GIB = 2**30
V1_UNLIMITED = 9223372036854771712


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder of control groups on a machine with 100 GiB to spare."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    monkeypatch.setattr(available_memory, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(available_memory, "_CGROUPS", tmp_path / "cgroup")
    return tmp_path / "cgroup"


def join(cgroups: Path, membership: str) -> None:
    (cgroups.parent / "membership").write_text(membership)


def v2_group(folder: Path, limit: int | str, used: int = 0, file_pages: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\nshmem {2 * GIB}\ninactive_file {file_pages}\nactive_file 7\n")


def v1_group(folder: Path, limit: int, used: int = 0, file_pages: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 1\ninactive_file 5\ntotal_inactive_file {file_pages}\n")


def test_without_control_groups_it_is_the_machines(cgroups: Path) -> None:
    assert available_bytes() == 100 * GIB


def test_a_limit_leaves_what_is_not_used_and_the_file_pages_to_be_had_back(cgroups: Path) -> None:
    join(cgroups, "0::/\n")  # a container with a view of its own group only
    v2_group(cgroups, limit=16 * GIB, used=9 * GIB, file_pages=3 * GIB)
    assert available_bytes() == 10 * GIB


def test_no_limit_leaves_the_machines(cgroups: Path) -> None:
    join(cgroups, "0::/user.slice/run.scope\n")
    (cgroups / "user.slice").mkdir(parents=True)  # the root group has no limit file at all
    v2_group(cgroups / "user.slice" / "run.scope", limit="max", used=9 * GIB)
    assert available_bytes() == 100 * GIB


def test_a_limit_that_the_machine_cannot_give_leaves_the_machines(cgroups: Path) -> None:
    join(cgroups, "0::/run\n")
    v2_group(cgroups / "run", limit=500 * GIB, used=GIB)
    assert available_bytes() == 100 * GIB


def test_the_tightest_limit_above_counts(cgroups: Path) -> None:
    join(cgroups, "0::/pod/container\n")
    v2_group(cgroups / "pod" / "container", limit=64 * GIB, used=GIB)
    v2_group(cgroups / "pod", limit=32 * GIB, used=30 * GIB)  # most of it by another container
    v2_group(cgroups / "other", limit=GIB)
    assert available_bytes() == 2 * GIB


def test_nothing_is_left_of_a_group_that_is_over_its_limit(cgroups: Path) -> None:
    join(cgroups, "0::/\n")
    v2_group(cgroups, limit=GIB, used=2 * GIB)
    assert available_bytes() == 0


def test_the_first_version_of_control_groups_counts_subgroups(cgroups: Path) -> None:
    join(cgroups, "5:cpu,cpuacct:/\n4:memory:/jobs/1\n1:name=systemd:/\n0::/\n")
    v1_group(cgroups / "memory" / "jobs" / "1", limit=V1_UNLIMITED, used=GIB)
    v1_group(cgroups / "memory" / "jobs", limit=8 * GIB, used=6 * GIB, file_pages=GIB)
    v1_group(cgroups / "memory", limit=V1_UNLIMITED, used=50 * GIB)
    assert available_bytes() == 3 * GIB


def test_all_that_a_group_uses_counts_where_nothing_says_what_it_is(cgroups: Path) -> None:
    join(cgroups, "4:memory:/\n")
    v1_group(cgroups / "memory", limit=8 * GIB, used=GIB, file_pages=GIB)
    (cgroups / "memory" / "memory.stat").unlink()
    assert available_bytes() == 7 * GIB


@pytest.mark.parametrize("path", ["/kubepods/pod1/container1", "/../../pod1/container1"])
def test_a_container_that_knows_the_hosts_path_finds_its_limit_at_the_top(cgroups: Path, path: str) -> None:
    join(cgroups, f"4:memory:{path}\n0::{path}\n")
    v1_group(cgroups / "memory", limit=8 * GIB, used=GIB)
    assert available_bytes() == 7 * GIB


def test_the_start_up_check_and_parking_keep_within_the_limit(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    join(cgroups, "0::/\n")
    v2_group(cgroups, limit=16 * GIB, used=9 * GIB)
    node = {"NodeID": "node-0", "Resources": {"object_store_memory": GIB}}
    monkeypatch.setattr("ray.nodes", lambda: [node])
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node-0"))
    assert measure_host_memory().available_bytes == 7 * GIB
    assert measure_parked([(0, 0)], []).host_available_bytes == 7 * GIB
    assert asyncio.run(ElasticServer.host_available_bytes(None)) == 7 * GIB  # type: ignore[arg-type]  # asks nothing of it


def test_the_observer_counts_what_its_container_took(cgroups: Path) -> None:
    join(cgroups, "0::/\n")
    v2_group(cgroups, limit=16 * GIB, used=9 * GIB)
    out = io.StringIO()
    watch = HostWatch(out)
    v2_group(cgroups, limit=16 * GIB, used=11 * GIB)
    watch.look(0.0)
    assert json.loads(out.getvalue())["memory_peak_bytes"] == 2 * GIB


@pytest.mark.parametrize(("stored", "is_there"), [(8 * GIB, True), (9 * GIB, False)])
def test_what_is_free_in_shared_memory_is_measured_and_whether_the_object_store_takes_it(
    monkeypatch: pytest.MonkeyPatch, stored: int, is_there: bool
) -> None:
    node = {"NodeID": "node-0", "Resources": {"object_store_memory": stored}}
    monkeypatch.setattr("ray.nodes", lambda: [node])
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node-0"))
    usage = {"/dev/shm": SimpleNamespace(total=8 * GIB, free=5 * GIB)}
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage[path])
    memory = measure_host_memory()
    assert (memory.shm_bytes, memory.is_store_in_shm) == (5 * GIB, is_there)
