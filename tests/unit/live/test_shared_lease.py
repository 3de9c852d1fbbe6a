"""Parts of the trainer's lease: no device is in two of them, and their work is charged to the lease that pays."""

from __future__ import annotations

import pytest

from verl_rlhfless.errors import LeaseImpossibleError
from verl_rlhfless.live.shared_lease import SharedLease, TrainerDevices, payer
from verl_rlhfless.types import LeasedNode

TRAINER = "rlhfless/trainer/global_pool"


@pytest.fixture
def devices() -> TrainerDevices:
    nodes = (LeasedNode("one", "10.0.0.1", ("0", "1", "3")), LeasedNode("two", "10.0.0.2", ("0", "1")))
    return TrainerDevices(TRAINER, nodes)


def where(part: SharedLease) -> tuple[str, str, tuple[str, ...]]:
    (node,) = part.nodes
    return node.node_id, node.ip, node.device_ids


def test_no_device_is_in_two_parts_and_none_spans_two_nodes(devices: TrainerDevices) -> None:
    assert where(devices.take("a", 2)) == ("one", "10.0.0.1", ("0", "1"))
    assert where(devices.take("b", 2)) == ("two", "10.0.0.2", ("0", "1"))
    with pytest.raises(LeaseImpossibleError, match=r"replica c: .*no node with 2 devices left.*share_trainer=never"):
        devices.take("c", 2)
    assert where(devices.take("d", 1)) == ("one", "10.0.0.1", ("3",))


def test_devices_on_which_an_engine_sleeps_are_preferred_while_they_are_free(devices: TrainerDevices) -> None:
    slept_on = [(("other", frozenset({"0"})),), (("two", frozenset({"1"})),)]
    assert where(devices.take("a", 1, slept_on)) == ("two", "10.0.0.2", ("1",))
    assert where(devices.take("b", 1, slept_on)) == ("one", "10.0.0.1", ("0",))


def test_engines_that_sleep_on_the_same_device_or_elsewhere_are_not_counted(devices: TrainerDevices) -> None:
    slept_on = [(node, frozenset(ids)) for node, ids in (("one", "01"), ("one", "13"), ("two", "01"), ("two", "02"))]
    assert devices.num_together([(key,) for key in slept_on]) == 2
    assert devices.num_together([(("other", frozenset("0")),)]) == 0


def test_what_is_given_back_can_be_taken_again_under_another_name(devices: TrainerDevices) -> None:
    first = devices.take("a", 3)
    first.release()
    first.release(timeout_s=1.0)  # a second time changes nothing
    again, other = devices.take("a", 2), devices.take("b", 1)
    first.release()
    with pytest.raises(LeaseImpossibleError):
        devices.take("c", 3)
    assert first.released_s is not None and again.released_s is None
    assert again.device_key() == (("one", frozenset({"0", "1"})),) != other.device_key()
    assert len({first.name, again.name, other.name}) == 3


def test_the_work_on_a_part_is_charged_to_the_trainers_lease_and_costs_nothing_beside_it(
    devices: TrainerDevices,
) -> None:
    part = devices.take("a", 2)
    granted = {TRAINER, "rlhfless/replica/b"}
    assert payer(part.name, granted) == TRAINER and payer("rlhfless/replica/b", granted) == "rlhfless/replica/b"
    assert part.gpu_s == 0
