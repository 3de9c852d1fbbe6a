"""A driver that is killed in the middle of a rollout leaves no lease, no engine process and no shared memory behind."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from benchmarks.scheduled import scheduled
from tests.temporary_files import files_of_engines
from verl_rlhfless.ab.cluster import private_cluster
from verl_rlhfless.demo import recipe
from verl_rlhfless.demo.assets import Assets
from verl_rlhfless.demo.run import DemoOptions, arm_command, arm_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def _wait_until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.1)


def test_nothing_outlives_a_killed_driver(assets: Assets, tmp_path: Path) -> None:
    files_before = files_of_engines()
    command = arm_command(scheduled(1), assets, DemoOptions(out=tmp_path, steps=1), tmp_path)

    def is_rolling_out() -> bool:
        return any("replica_ready" in log.read_text() for log in tmp_path.glob("events-*.jsonl"))

    with private_cluster(recipe.NUM_GPUS, arm_environment(tmp_path)) as cluster:
        with (tmp_path / "train.log").open("w") as log:
            driver = subprocess.Popen(command, env=cluster.child_environment(), stdout=log, stderr=log)
            try:
                _wait_until(lambda: is_rolling_out() or driver.poll() is not None, "a replica that serves", 600)
                assert driver.poll() is None
                _wait_until(  # only the replica's: the trainer gave its own back when the replica had one
                    lambda: ray.available_resources()["GPU"] == recipe.NUM_GPUS - 1, "the trainer to leave", 60
                )
            finally:
                driver.kill()
                driver.wait()
        _wait_until(lambda: ray.available_resources().get("GPU") == recipe.NUM_GPUS, "all leases to end", 60)
        _wait_until(lambda: not cluster.leftovers(), "the engine and its memory to go", 60)
        assert files_of_engines() <= files_before
