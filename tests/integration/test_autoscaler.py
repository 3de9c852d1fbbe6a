"""Leases and Ray's own autoscaler (the version that KubeRay runs): demand adds a node, a returned lease lets it go."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import ray

from tests.ray_nodes import autoscaled, wait_until_gpus_are
from verl_rlhfless.errors import LeaseTimeoutError
from verl_rlhfless.live.lease import Lease, LeaseRequest

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers can't import a test module

WORKER_GPUS = 2


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A head without a GPU; at most one node more."""
    with autoscaled({}, head_gpus=0, worker_gpus=WORKER_GPUS, max_workers=1, idle_s=3):
        yield


def test_a_lease_brings_a_node_and_its_end_lets_the_node_go() -> None:
    wait_until_gpus_are([0])
    with Lease.acquire(LeaseRequest("scaled", "replica", (WORKER_GPUS,)), 90) as lease:
        wait_until_gpus_are([0, WORKER_GPUS])
        assert lease.nodes[0].node_id != ray.get_runtime_context().get_node_id()
    wait_until_gpus_are([0])


def test_what_no_node_may_be_added_for_is_refused_in_time_and_asked_for_no_longer() -> None:
    refused = pytest.raises(LeaseTimeoutError, match=r"second of 1 GPU: not granted within 5 s.*replica/first \(2\)")
    with Lease.acquire(LeaseRequest("first", "replica", (WORKER_GPUS,)), 90), refused:
        Lease.acquire(LeaseRequest("second", "replica", (1,)), 5)
    wait_until_gpus_are([0])
