"""Leases on a real Ray cluster: granted, refused, timed out, interrupted, released; never anything left."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import ray

from tests.integration.conftest import Cluster, ForeignJob
from verl_rlhfless.errors import LeaseTimeoutError, RlhflessError
from verl_rlhfless.live.lease import Lease, LeaseRequest

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers can't import a test module
pytestmark = pytest.mark.usefixtures("nothing_left")

ALL_DEVICES = {"0", "1", "2", "3"}


def request(name: str, *gpus_per_node: int, node_ips: tuple[str, ...] | None = None) -> LeaseRequest:
    return LeaseRequest(name, "replica", gpus_per_node, node_ips=node_ips)


def devices(lease: Lease) -> set[str]:
    return {device for node in lease.nodes for device in node.device_ids}


def test_a_lease_holds_the_devices_that_it_names(ray_cluster: Cluster) -> None:
    before_s = time.time()
    with Lease.acquire(request("hold-a", 3), 30) as wide, Lease.acquire(request("hold-b", 1), 30) as narrow:
        assert len(wide.nodes) == 1 and len(wide.nodes[0].device_ids) == 3
        assert devices(wide) | devices(narrow) == ALL_DEVICES
        assert wide.nodes[0].node_id == ray.get_runtime_context().get_node_id()
        assert ray_cluster.live_groups() == {"rlhfless/replica/hold-a": "CREATED", "rlhfless/replica/hold-b": "CREATED"}
        ray_cluster.wait_until(lambda: ray_cluster.free_gpus() == 0, "Ray to see both leases")
        assert before_s <= wide.granted_s <= narrow.granted_s <= time.time()
        assert wide.released_s is None


def test_a_released_lease_is_free_for_others_and_may_be_released_again(ray_cluster: Cluster) -> None:
    lease = Lease.acquire(request("release", 4), 30)
    lease.release(30)
    assert lease.released_s is not None and lease.granted_s <= lease.released_s <= time.time()
    released_s = lease.released_s
    lease.release(30)
    assert lease.released_s == released_s
    ray_cluster.wait_until(lambda: ray_cluster.free_gpus() == 4, "the GPUs in ray.available_resources()")
    with Lease.acquire(request("after-release", 4), 30) as again:
        assert devices(again) == ALL_DEVICES


def test_a_lease_over_two_bundles_reports_each_of_them(ray_cluster: Cluster) -> None:
    with Lease.acquire(request("two-bundles", 2, 2), 30) as lease:
        assert [len(node.device_ids) for node in lease.nodes] == [2, 2]
        assert lease.device_key() == ((lease.nodes[0].node_id, frozenset(ALL_DEVICES)),)


def test_a_time_out_names_what_is_missing_and_leaves_nothing_pending(ray_cluster: Cluster) -> None:
    with Lease.acquire(LeaseRequest("busy", "trainer", (2,)), 30):
        actor = ray.remote(Occupant).options(num_gpus=1, num_cpus=0).remote()
        ray.get(actor.ping.remote(), timeout=60)
        ray_cluster.wait_until(lambda: ray_cluster.free_gpus() == 1, "one free GPU")
        with pytest.raises(LeaseTimeoutError) as refused:
            Lease.acquire(request("late", 2), 1)
        assert ray_cluster.live_groups() == {"rlhfless/trainer/busy": "CREATED"}
        ray.kill(actor)
    message = str(refused.value)
    assert "rlhfless/replica/late of 2 GPU" in message
    assert "1 of 4 GPU are available" in message
    assert "rlhfless/trainer/busy (2)" in message
    assert "outside placement groups (1)" in message


def test_a_lease_waits_for_another_job_to_leave(foreign_job: Callable[[int], ForeignJob], ray_cluster: Cluster) -> None:
    job = foreign_job(3)
    left_s: list[float] = []

    def leave() -> None:
        left_s.append(time.time())
        job.leave()

    threading.Timer(1.0, leave).start()
    with Lease.acquire(request("patient", 4), 60) as lease:
        assert devices(lease) == ALL_DEVICES
        assert left_s and lease.granted_s > left_s[0]


def test_a_rollout_that_is_over_waits_for_no_gpus_and_leaves_nothing_pending(ray_cluster: Cluster) -> None:
    over = threading.Event()
    with Lease.acquire(request("holds-every-gpu", 4), 30):
        threading.Timer(1.5, over.set).start()
        began_s = time.monotonic()
        with pytest.raises(
            LeaseTimeoutError, match=r"given up.*rollout is over.*rlhfless/replica/holds-every-gpu \(4\)"
        ):
            Lease.acquire(request("wanted-no-more", 1), 60, over=over)
        assert time.monotonic() - began_s < 30
        assert list(ray_cluster.live_groups()) == ["rlhfless/replica/holds-every-gpu"]


@pytest.fixture
def interrupts() -> Iterator[None]:
    """A shell starts its background jobs with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_waiting_leaves_nothing_pending(ray_cluster: Cluster, interrupts: None) -> None:
    with Lease.acquire(request("holds-all", 4), 30):
        threading.Timer(1.0, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            Lease.acquire(request("interrupted", 1), 60)
        assert list(ray_cluster.live_groups()) == ["rlhfless/replica/holds-all"]


def test_an_error_inside_the_block_releases_the_lease(ray_cluster: Cluster) -> None:
    with pytest.raises(ZeroDivisionError), Lease.acquire(request("error", 2), 30) as lease:
        raise ZeroDivisionError
    assert lease.released_s is not None


def test_a_lease_holds_its_gpus_though_nothing_runs_in_it(ray_cluster: Cluster) -> None:
    with (
        Lease.acquire(request("alone", 4), 30),
        pytest.raises(LeaseTimeoutError, match=r"held by: rlhfless/replica/alone \(4\)"),
    ):
        Lease.acquire(request("thief", 1), 1)


def test_an_impossible_lease_waits_because_a_cluster_may_grow(ray_cluster: Cluster) -> None:
    with pytest.raises(LeaseTimeoutError, match="4 of 4 GPU are available; held by: nobody"):
        Lease.acquire(request("grow", 5), 1)


def test_a_lease_can_be_pinned_to_a_node(ray_cluster: Cluster) -> None:
    ip = ray.util.get_node_ip_address()
    with Lease.acquire(request("pinned", 1, node_ips=(ip,)), 30) as lease:
        assert lease.nodes[0].ip == ip
    with pytest.raises(LeaseTimeoutError, match=r"on 203\.0\.113\.9"):
        Lease.acquire(request("elsewhere", 1, node_ips=("203.0.113.9",)), 1)


def test_a_name_is_never_used_twice(ray_cluster: Cluster) -> None:
    Lease.acquire(request("once", 1), 30).release(30)
    with pytest.raises(RlhflessError, match="rlhfless/replica/once"):
        Lease.acquire(request("once", 1), 30)


def test_the_master_port_is_free_and_inside_the_asked_range(ray_cluster: Cluster) -> None:
    with Lease.acquire(request("port", 1), 30) as lease:
        address, port = lease.master_address((40_000, 40_100))
        assert address == lease.nodes[0].ip
        assert 40_000 <= port < 40_100


class Occupant:
    def ping(self) -> None: ...
