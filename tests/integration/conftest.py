"""A fresh local Ray cluster per test module, with four declared GPUs, and a second Ray job that competes for them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

_WAIT_S = 60.0


@dataclass(frozen=True)
class Cluster:
    address: str
    num_gpus: int

    def free_gpus(self) -> float:
        return float(ray.available_resources().get("GPU", 0))

    def live_groups(self) -> dict[str, str]:
        """Return ``{name: state}`` of every placement group that is not removed."""
        groups = placement_group_table().values()
        return {group["name"]: group["state"] for group in groups if group["state"] != "REMOVED"}

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Poll: Ray's view of free resources lags some 0.1 s behind a confirmed release."""
        deadline = time.monotonic() + _WAIT_S
        while not condition():
            assert time.monotonic() < deadline, (
                f"waited {_WAIT_S:g} s for {what}; free GPUs {self.free_gpus()}, {self.live_groups()}"
            )
            time.sleep(0.02)


@dataclass
class ForeignJob:
    """Another driver on the same cluster that holds GPUs and runs on them until it is told to leave."""

    process: subprocess.Popen[str]
    devices: set[str]
    job_id: str

    def leave(self) -> None:
        """Tell it to end; returns at once."""
        assert self.process.stdin is not None
        self.process.stdin.close()


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Cluster]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = ray.init(
        "local",  # never join a cluster that happens to run on this host
        num_gpus=4,
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
        logging_level="ERROR",
    )
    cluster = Cluster(address=context.address_info["gcs_address"], num_gpus=4)
    try:
        yield cluster
        assert cluster.live_groups() == {}, "a test left placement groups behind"
    finally:
        ray.shutdown()


@pytest.fixture
def nothing_left(ray_cluster: Cluster) -> Iterator[None]:
    """After the test every GPU is free again and no placement group is pending or alive."""
    before = ray_cluster.live_groups()
    free = ray_cluster.free_gpus()
    yield
    assert ray_cluster.live_groups() == before
    ray_cluster.wait_until(lambda: ray_cluster.free_gpus() == free, f"{free} free GPUs again")


@pytest.fixture
def foreign_job(ray_cluster: Cluster) -> Iterator[Callable[[int], ForeignJob]]:
    """Return ``start(num_gpus)``, which starts a second Ray job and returns when it runs on its GPUs."""
    with contextlib.ExitStack() as jobs:

        def start(num_gpus: int) -> ForeignJob:
            job = _start_foreign_job(ray_cluster.address, num_gpus)
            jobs.callback(_end, job)
            return job

        yield start


def _start_foreign_job(address: str, num_gpus: int) -> ForeignJob:
    script = Path(__file__).with_name("foreign_job.py")
    process = subprocess.Popen(
        [sys.executable, str(script), address, str(num_gpus)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()  # the job gives up by itself when it gets no GPUs
    assert line, f"the foreign job ended with {process.wait(_WAIT_S)} before it ran"
    report: dict[str, Any] = json.loads(line)
    return ForeignJob(process, set(report["devices"]), report["job_id"])


def _end(job: ForeignJob) -> None:
    job.leave()
    try:
        job.process.wait(_WAIT_S)
    finally:
        job.process.kill()
