"""What a lease asks Ray for, and how it names and orders what it gets."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import NodeDiedError

from verl_rlhfless.errors import LeaseReleaseError, LeaseTimeoutError
from verl_rlhfless.live import lease as lease_module
from verl_rlhfless.live import leased_node
from verl_rlhfless.live.lease import Lease, LeaseRequest, share_devices
from verl_rlhfless.types import LeasedNode


def lease(*nodes: LeasedNode) -> Lease:
    request = LeaseRequest("r0", "replica", tuple(len(node.device_ids) for node in nodes))
    return Lease(request, None, 10.0, nodes)  # type: ignore[arg-type]


def test_a_request_is_one_bundle_per_node_under_a_name_that_an_observer_can_parse() -> None:
    request = LeaseRequest("global_pool-1", "trainer", (4, 2), resource="NPU")
    assert request.group_name == "rlhfless/trainer/global_pool-1"
    assert request.bundles() == [{"NPU": 4.0}, {"NPU": 2.0}]
    assert request.num_gpus == 6
    assert str(request) == "lease rlhfless/trainer/global_pool-1 of 4 + 2 NPU"


def test_a_pinned_request_names_each_bundles_node() -> None:
    request = LeaseRequest("r1", "replica", (1, 2), node_ips=("10.0.0.2", "10.0.0.1"))
    assert request.bundles() == [{"GPU": 1.0, "node:10.0.0.2": 0.001}, {"GPU": 2.0, "node:10.0.0.1": 0.001}]
    with pytest.raises(ValueError):
        LeaseRequest("r2", "replica", (1, 2), node_ips=("10.0.0.2",)).bundles()


def test_nodes_are_sorted_by_address_as_verl_sorts_placement_groups() -> None:
    got = lease(LeasedNode("b", "10.0.0.20", ("3",)), LeasedNode("a", "10.0.0.1", ("1", "0")))
    assert [node.ip for node in got.nodes] == ["10.0.0.1", "10.0.0.20"]


def test_a_node_reports_devices_in_the_order_of_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_node_id=lambda: "a", get_accelerator_ids=lambda: {"GPU": ["10", "9", "2"]})
    monkeypatch.setattr(leased_node.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(leased_node.ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    assert leased_node.leased_node("GPU") == LeasedNode("a", "10.0.0.1", ("2", "9", "10"))


def test_device_keys_compare_sets_per_node() -> None:
    key = lease(LeasedNode("a", "10.0.0.1", ("0", "1")), LeasedNode("b", "10.0.0.2", ("2",))).device_key()
    assert key == lease(LeasedNode("b", "10.0.0.2", ("2",)), LeasedNode("a", "10.0.0.1", ("1", "0"))).device_key()
    assert key != lease(LeasedNode("a", "10.0.0.1", ("0", "2")), LeasedNode("b", "10.0.0.2", ("1",))).device_key()
    assert key != lease(LeasedNode("a", "10.0.0.1", ("0", "1", "2"))).device_key()


def test_two_bundles_on_one_node_are_one_set() -> None:
    split = lease(LeasedNode("a", "10.0.0.1", ("0", "1")), LeasedNode("a", "10.0.0.1", ("2",)))
    assert split.device_key() == lease(LeasedNode("a", "10.0.0.1", ("2", "1", "0"))).device_key()


def test_gpu_seconds_are_of_devices_from_grant_to_release() -> None:
    held = lease(LeasedNode("a", "10.0.0.1", ("0", "1")), LeasedNode("b", "10.0.0.2", ("2",)))
    held.released_s = held.granted_s + 4.0
    assert held.gpu_s == 3 * 4.0


def test_leases_share_devices_if_one_node_has_one_in_both() -> None:
    one = lease(LeasedNode("a", "10.0.0.1", ("0", "1")), LeasedNode("b", "10.0.0.2", ("2",))).device_key()
    others = {("b", "2"): True, ("a", "1"): True, ("a", "2"): False, ("b", "0"): False, ("c", "0"): False}
    for (node, device), is_shared in others.items():
        other = lease(LeasedNode(node, "10.0.0.3", (device, "7"))).device_key()
        assert share_devices(one, other) is share_devices(other, one) is is_shared, (node, device)


@pytest.mark.parametrize(("timeout_s", "num_waits"), [(0.0, 1), (2.5, 3)])
def test_a_lease_waits_at_least_as_long_as_it_may_and_then_says_who_holds_the_gpus(
    monkeypatch: pytest.MonkeyPatch, timeout_s: float, num_waits: int
) -> None:
    waits: list[int] = []
    group: Any = SimpleNamespace(wait=waits.append)
    monkeypatch.setattr(lease_module, "_who_holds", lambda resource: "0 of 4 GPU are available.")
    with pytest.raises(LeaseTimeoutError, match=rf"not granted within {timeout_s:g} s\. 0 of 4 GPU are available"):
        lease_module._wait_granted(LeaseRequest("busy", "replica", (1,)), group, timeout_s, None)
    assert waits == [1] * num_waits, "Ray takes whole seconds"


def test_a_port_in_use_is_passed_over_and_a_full_range_is_an_error() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        assert leased_node.free_port((port, port + 50)) > port
        with pytest.raises(OSError, match="no free port"):
            leased_node.free_port((port, port + 1))
    assert leased_node.free_port() > 0


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Ray's table answers, one entry per look; the last one stays."""
    answers: list[str] = []
    monkeypatch.setattr(lease_module, "remove_placement_group", lambda group: None)
    monkeypatch.setattr(lease_module, "_RELEASE_POLL_S", 0.0)
    monkeypatch.setattr(
        lease_module,
        "placement_group_table",
        lambda group: {"state": answers.pop(0) if len(answers) > 1 else answers[0]},
    )
    return answers


def test_a_release_waits_until_ray_confirms_it(states: list[str]) -> None:
    states.extend(["CREATED", "CREATED", "REMOVED"])
    held = lease(LeasedNode("a", "10.0.0.1", ("0",)))
    held.release(60)
    assert states == ["REMOVED"] and held.released_s is not None


def test_a_release_that_ray_does_not_confirm_is_an_error_and_the_lease_still_counts(states: list[str]) -> None:
    states.append("CREATED")
    held = lease(LeasedNode("a", "10.0.0.1", ("0",)))
    with pytest.raises(LeaseReleaseError, match="lease rlhfless/replica/r0: still CREATED"):
        held.release(0)
    assert held.released_s is None


@pytest.mark.parametrize("is_granted", [False, True], ids=["not granted", "granted in that instant"])
def test_a_wait_ends_with_its_rollout_and_nothing_is_kept(
    states: list[str], monkeypatch: pytest.MonkeyPatch, is_granted: bool
) -> None:
    over, removed, waits = threading.Event(), [], []

    def wait(timeout_s: int) -> bool:
        waits.append(timeout_s)
        if len(waits) == 2:
            over.set()
        return is_granted and over.is_set()

    group = SimpleNamespace(wait=wait)
    states.append("REMOVED")
    monkeypatch.setattr(lease_module, "placement_group", lambda bundles, **_: group)
    monkeypatch.setattr(lease_module, "remove_placement_group", removed.append)
    monkeypatch.setattr(lease_module, "_who_holds", lambda resource: "0 of 4 GPU are available.")
    monkeypatch.setattr(lease_module, "_ask_nodes", lambda *_: [LeasedNode("a", "10.0.0.1", ("0",))])
    monkeypatch.setattr(lease_module.ray, "available_resources", lambda: {"GPU": 9.0})
    request = LeaseRequest(f"given-up-{is_granted}", "replica", (1,))
    with pytest.raises(LeaseTimeoutError, match=r"given up, because the rollout is over\. 0 of 4 GPU are available"):
        Lease.acquire(request, 300, over=over)
    assert removed == [group] and len(waits) == 2


def test_a_node_that_dies_between_grant_and_answer_is_a_lease_that_did_not_come(
    states: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any, **__: Any) -> None:
        raise NodeDiedError("10.0.0.7 is gone")

    removed: list[Any] = []
    group = SimpleNamespace(wait=lambda timeout_s: True)
    states.append("REMOVED")
    monkeypatch.setattr(lease_module, "placement_group", lambda bundles, **_: group)
    monkeypatch.setattr(lease_module, "remove_placement_group", removed.append)
    monkeypatch.setattr(lease_module, "PlacementGroupSchedulingStrategy", lambda **_: None)
    task = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda resource: "answer"))
    monkeypatch.setattr(lease_module, "_leased_node", task)
    monkeypatch.setattr(lease_module.ray, "available_resources", lambda: {"GPU": 9.0})
    monkeypatch.setattr(lease_module.ray, "get", lost)
    with pytest.raises(LeaseTimeoutError, match=r"lease rlhfless/trainer/on-a-lost-node .*10\.0\.0\.7 is gone"):
        Lease.acquire(LeaseRequest("on-a-lost-node", "trainer", (1,)), 300)
    assert removed == [group]
