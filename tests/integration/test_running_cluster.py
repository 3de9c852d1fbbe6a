"""``rlhfless ab`` on a cluster that runs: the arm's environment reaches its workers, and a busy cluster is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from tests.integration.conftest import Cluster

WAIT_S = 120.0

_DRIVER = """
import os, sys, ray
from hydra.core.override_parser.overrides_parser import OverridesParser
from verl_rlhfless.ab.cluster import running_cluster

folder = sys.argv[3]
with running_cluster(sys.argv[1], int(sys.argv[2]), {"RLHFLESS_OBSERVER_DIR": folder}) as cluster:
    assert ray.is_initialized()
assert not ray.is_initialized()
parsed = OverridesParser.create().parse_overrides(list(cluster.overrides))
env_vars = {one.key_or_group.rsplit(".", 1)[1]: one.value() for one in parsed}  # as verl hands them to ray.init
ray.init(address=sys.argv[1], runtime_env={"env_vars": env_vars}, log_to_driver=False)
worker = ray.get(ray.remote(lambda: dict(os.environ)).options(num_cpus=0).remote(), timeout=60)
assert worker["RLHFLESS_OBSERVER_DIR"] == folder and worker["RLHFLESS_RUN_ID"] == cluster.run_id
assert cluster.child_environment()["RAY_ADDRESS"] == sys.argv[1]
print("arrived")
"""


_BLIND = """
import verl_rlhfless.ab.cluster as cluster
cluster._can_write = lambda marker: False
"""


def drive(address: str, num_gpus: int, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(prefix="a b,[c]") as folder:
        command = [sys.executable, "-c", before + _DRIVER, address, str(num_gpus), folder]
        inherited = {**os.environ, **environment}
        return subprocess.run(command, env=inherited, capture_output=True, text=True, timeout=WAIT_S, check=False)


def test_what_an_arm_needs_reaches_the_workers_of_its_job(ray_cluster: Cluster) -> None:
    done = drive(ray_cluster.address, 4)
    assert done.stdout.strip().endswith("arrived"), done.stderr


def test_a_cluster_that_is_too_small_or_used_by_others_is_refused(
    ray_cluster: Cluster, foreign_job: Callable[[int], Any]
) -> None:
    assert "the recipe needs 5 GPUs and the cluster has 4" in drive(ray_cluster.address, 5).stderr
    foreign_job(1)
    assert "1 of 4 GPUs are used by others" in drive(ray_cluster.address, 2).stderr


def test_a_cluster_that_asks_for_a_token_says_how_to_give_it(ray_cluster: Cluster) -> None:
    told = drive(ray_cluster.address, 4, RAY_AUTH_MODE="disabled").stderr
    assert f"RAY_ADDRESS={ray_cluster.address}: " in told and "Set RAY_AUTH_MODE=token: it asks for a token." in told


def test_a_folder_that_a_node_does_not_share_is_refused(ray_cluster: Cluster) -> None:
    told = drive(ray_cluster.address, 4, before=_BLIND).stderr
    assert "cannot be written on node" in told and "Give an --out that all nodes share." in told
