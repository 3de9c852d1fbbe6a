"""Who gets GPUs, who waits for whom, and what is accounted for when."""

from __future__ import annotations

import pytest
import simpy

from verl_rlhfless.errors import LeaseImpossibleError
from verl_rlhfless.sim.cluster import CLUSTERS
from verl_rlhfless.sim.leases import Lease, LeaseBook


class World:
    """A book on a node that stays and one that may be preempted, with everything that it granted."""

    def __init__(self) -> None:
        self.env = simpy.Environment()
        self.book = LeaseBook(self.env, CLUSTERS["h100-16-spot"])
        self.granted: list[Lease] = []

    def replica(self, tp: int) -> None:
        """Ask for a replica."""
        self.book.request("replica", tp, lambda lease, _is_warm: self.granted.append(lease), 0.1)

    def pass_s(self, seconds: float) -> None:
        """Let time pass."""
        self.env.run(until=self.env.now + seconds)


def test_what_inference_may_use_is_on_nodes_that_stay_and_nobody_asked_for_it() -> None:
    world = World()
    book = world.book
    assert (book.num_free, book.num_fusible) == (16, 8)
    book.request_gpus("fuse", 3, world.granted.append, 0.1)
    assert (book.num_free, book.num_fusible) == (16, 5)
    world.pass_s(1.0)
    assert (book.num_free, book.num_fusible) == (13, 5)
    book.release(world.granted[0])
    assert (book.num_free, book.num_fusible) == (16, 8)


def test_gpus_that_can_never_be_granted_are_refused_and_nobody_waits_behind_them() -> None:
    world = World()
    with pytest.raises(LeaseImpossibleError, match="fuse asks for 12 GPUs outside preemptible nodes"):
        world.book.request_gpus("fuse", 12, world.granted.append, 0.1)
    world.replica(8)
    world.pass_s(1.0)
    assert len(world.granted) == 1


@pytest.mark.parametrize("after_s", [0.05, 1.0], ids=["not queued yet", "queued"])
def test_a_withdrawn_request_is_not_granted_and_lets_the_next_one_pass(after_s: float) -> None:
    world = World()
    world.book.set_node(1, is_up=False)
    world.replica(4)
    world.pass_s(1.0)
    ask = world.book.request_gpus("fuse", 8, world.granted.append, 0.1)
    world.replica(4)
    world.pass_s(after_s)
    assert len(world.granted) == 1
    world.book.withdraw(ask)
    world.pass_s(1.0)
    assert [lease.role for lease in world.granted] == ["replica", "replica"]
    assert world.book.num_fusible == 0


def test_an_engine_cannot_sleep_on_a_node_that_is_gone() -> None:
    world = World()
    for _ in range(2):
        world.replica(8)
    world.pass_s(1.0)
    world.book.set_node(1, is_up=False)
    for lease in world.granted:
        world.book.release(lease, 8)
    world.book.set_node(1, is_up=True)
    assert world.book.warm_gpus() == {8: 8}


def test_a_lease_is_settled_until_it_ends_and_not_again() -> None:
    world = World()
    for _ in range(2):
        world.replica(4)
    world.pass_s(1.0)
    first, second = world.granted
    world.book.release(first)
    settled = [[lease.lease_id for lease in world.book.settle()[0]] for _ in range(2)]
    world.book.release(second)
    settled += [[lease.lease_id for lease in world.book.settle()[0]] for _ in range(2)]
    assert settled == [[first.lease_id, second.lease_id], [second.lease_id], [second.lease_id], []]


def test_engines_that_sleep_are_counted_on_their_own_gpus_while_nobody_leases_these() -> None:
    world = World()
    book = world.book
    for tp in (4, 4, 8):
        world.replica(tp)
    world.pass_s(100.0)
    assert [lease.gpus[0] for lease in world.granted] == [(0, 0), (0, 4), (1, 0)]
    for lease, parked_tp in zip(world.granted, (4, None, None), strict=True):
        book.release(lease, parked_tp)
    world.pass_s(10.0)
    assert book.settle_parked() == pytest.approx(4 * 10.0)
    world.pass_s(3.0)
    world.replica(4)  # granted after 0.1 s where one sleeps
    world.pass_s(50.0)
    assert world.granted[-1].gpus[0] == (0, 0)
    assert book.settle_parked() == pytest.approx(4 * 3.1)
    assert book.settle_parked() == 0.0
