"""Requests go where they end early: by prediction, with siblings together while that pays, and never for nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.unit.policy.paced import POOL
from verl_rlhfless.policy.placement import pieces_of
from verl_rlhfless.policy.predict import LengthModel
from verl_rlhfless.policy.routing import Routing
from verl_rlhfless.policy.snapshot import (
    FINISHED,
    READY,
    RUNNING,
    STARTING,
    WAITING,
    Batch,
    ReplicaView,
    RolloutPlan,
    RolloutView,
)

FLEET = (1, 1)
MIXED = replace(POOL, perf={1: POOL.perf[1], 2: POOL.perf[1]})


def batch(groups: int = 4, n: int = 4, prompt: int = 200) -> Batch:
    return Batch(
        1, tuple(f"p{g}" for g in range(groups)), np.repeat(np.arange(groups), n), np.full(groups * n, prompt), 400
    )


def view(of: Batch, state: Any, replica_of: Any, generated: Any) -> RolloutView:
    replicas = tuple(ReplicaView(r, 1, READY, 0, 0, 0) for r in range(len(FLEET)))
    return RolloutView(
        5.0, of, POOL, np.array(generated), np.array(state, dtype=np.int8), np.array(replica_of), replicas, 0, 0, 0, 0
    )


def react(arm: Routing, now: RolloutView) -> Any:
    return arm.policy(LengthModel(), now.batch).react(now, arm.plan(LengthModel(), POOL, now.batch))


@pytest.mark.parametrize("dispatcher", ["stock", "length_bucket", "random"])
@pytest.mark.parametrize("keeps_groups", [True, False])
def test_every_sample_gets_a_replica_of_the_fleet(dispatcher: str, keeps_groups: bool) -> None:
    plan = Routing(FLEET, dispatcher, keeps_groups=keeps_groups).plan(LengthModel(), POOL, batch())
    assert sorted(plan.order.tolist()) == list(range(16))
    assert set(plan.replica_of.tolist()) <= {0, 1}
    assert plan.fleet == FLEET and plan.is_resident


@pytest.mark.parametrize("dispatcher", ["stock", "length_bucket", "random"])
def test_siblings_share_a_replica_when_prefixes_are_kept_together(dispatcher: str) -> None:
    plan = Routing(FLEET, dispatcher).plan(LengthModel(), POOL, batch(groups=8))
    assert all(len(set(plan.replica_of[batch(groups=8).group_of == g])) == 1 for g in range(8))


def test_a_group_is_split_when_its_decode_costs_more_than_its_prompt() -> None:
    plan = Routing(FLEET, "length_bucket").plan(LengthModel(), POOL, batch(groups=1, n=16, prompt=10))
    assert np.bincount(plan.replica_of).tolist() == [8, 8]


@pytest.mark.parametrize("pieces", [1, 2, 3, 16])
def test_pieces_of_groups_are_as_equal_as_can_be(pieces: int) -> None:
    groups = np.split(np.arange(23), [1, 4, 14])
    of = np.repeat(np.arange(4), [len(group) for group in groups])
    parts = [part for group in groups for part in np.array_split(group, min(pieces, len(group)))]
    assert pieces_of(of, pieces).tolist() == [int(part[0]) for part in parts]


def planned(fleet: tuple[int, ...] = FLEET, lanes: int = 2) -> RolloutPlan:
    """Return a plan that keeps each of the first groups apart."""
    of = np.minimum(batch().group_of, lanes - 1)
    known = {"price": 7.0, "predicted_step_s": 30.0, "reason": "two lanes"}
    return RolloutPlan(fleet, of, np.arange(16), is_resident=False, is_static=False, **known)


def test_a_planned_fleet_is_used_as_it_was_planned() -> None:
    plan = Routing(FLEET).plan_leased(planned(), LengthModel(), POOL, batch())
    assert (plan.replica_of == planned().replica_of).all()
    assert (plan.price, plan.predicted_step_s, plan.reason) == (7.0, 30.0, "two lanes")


def test_lanes_keep_their_size_of_replica_when_replicas_come_in_another_order() -> None:
    lanes = Routing((1, 2, 2)).plan_leased(planned((2, 2, 1), 3), LengthModel(), MIXED, batch()).replica_of
    assert (np.array((1, 2, 2))[lanes] == np.array((2, 2, 1))[planned((2, 2, 1), 3).replica_of]).all()
    assert sorted(set(lanes.tolist())) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arm", "fleet"),
    [
        (Routing(FLEET, "stock"), FLEET),
        (Routing(FLEET, "random"), FLEET),
        (Routing(FLEET, keeps_groups=False), FLEET),
        (Routing(FLEET), (1, 1, 1)),
    ],
    ids=["stock", "random", "one by one", "a replica less"],
)
def test_other_dispatchers_and_smaller_fleets_know_no_lanes(arm: Routing, fleet: tuple[int, ...]) -> None:
    plan = arm.plan_leased(planned(fleet), LengthModel(), POOL, batch())
    assert (plan.replica_of == arm.plan(LengthModel(), POOL, batch()).replica_of).all()
    assert (plan.replica_of != planned().replica_of).any() and plan.price == 7.0


def test_random_is_drawn_from_the_seed() -> None:
    first, again = (Routing(FLEET, "random", seed=3).plan(LengthModel(), POOL, batch(16)).replica_of for _ in range(2))
    other = Routing(FLEET, "random", seed=4).plan(LengthModel(), POOL, batch(16)).replica_of
    assert (first == again).all() and (first != other).any()


def test_longest_predicted_goes_first() -> None:
    memory = LengthModel(level=4.0, effects={"p2": 1.0, "p0": -1.0})
    order = Routing(FLEET, "length_bucket").plan(memory, POOL, batch()).order
    assert set(order[:4]) == {8, 9, 10, 11} and set(order[-4:]) == {0, 1, 2, 3}


def test_true_lengths_leave_the_longest_alone() -> None:
    truth = np.array([400, *[100] * 15])
    plan = Routing(FLEET, "length_bucket", keeps_groups=False, truth=truth).plan(LengthModel(), POOL, batch())
    assert (plan.replica_of == plan.replica_of[0]).sum() < 8


def test_waiting_samples_leave_the_replica_that_is_behind() -> None:
    of = batch(groups=4, n=4)
    state = [WAITING] * 4 + [RUNNING] * 4 + [FINISHED] * 8
    now = view(of, state, [0] * 16, [0] * 4 + [10] * 4 + [50] * 8)
    moves = react(Routing(FLEET, "length_bucket"), now).moves
    assert moves and all(move.replica == 1 for move in moves)
    assert set(np.concatenate([move.samples for move in moves]).tolist()) <= {0, 1, 2, 3}


def test_stock_and_random_leave_waiting_samples_where_they_are() -> None:
    of = batch(groups=4, n=4)
    now = view(of, [WAITING] * 8 + [FINISHED] * 8, [0] * 16, [0] * 8 + [50] * 8)
    assert not react(Routing(FLEET, "stock"), now).moves
    assert not react(Routing(FLEET, "random"), now).moves


def with_states(now: RolloutView, *states: str) -> RolloutView:
    return replace(now, replicas=tuple(replace(r, state=s) for r, s in zip(now.replicas, states, strict=True)))


@pytest.mark.parametrize("migration", ["cut_and_migrate", "rlhfuse", "rlhfless"])
@pytest.mark.parametrize("state", [WAITING, RUNNING])
def test_nothing_moves_while_no_replica_is_ready(migration: str, state: int) -> None:
    now = view(batch(), [FINISHED] * 6 + [state] * 10, [0] * 12 + [1] * 4, [50] * 6 + [0] * 10)
    assert not react(Routing(FLEET, migration=migration, tau=0.2), with_states(now, STARTING, STARTING)).moves


def test_a_replica_that_ran_dry_takes_what_waits_for_one_that_still_starts() -> None:
    now = view(batch(), [FINISHED] * 8 + [WAITING] * 8, [0] * 8 + [1] * 8, [50] * 8 + [0] * 8)
    moves = react(Routing(FLEET), with_states(now, READY, STARTING)).moves
    assert moves and all(move.replica == 0 for move in moves)


def test_nothing_is_sent_to_a_replica_that_still_starts() -> None:
    now = view(batch(), [WAITING] * 16, [0] * 16, [0] * 16)
    assert not react(Routing(FLEET), with_states(now, READY, STARTING)).moves


def running(on_first: int, generated: int = 60) -> RolloutView:
    state = [RUNNING] * on_first + [FINISHED] * (16 - on_first)
    return view(batch(), state, [0] * 16, [generated] * 16)


def test_running_samples_move_to_an_idle_replica_when_that_pays() -> None:
    reaction = react(Routing(FLEET, migration="cut_and_migrate"), running(6))
    (move,) = reaction.moves
    assert move.replica == 1 and 2 <= len(move.samples) <= 3
    assert reaction.reason == "cut_and_migrate"


@pytest.mark.parametrize("now", [running(1), running(0)], ids=["one left", "none left"])
def test_nothing_moves_when_nothing_is_gained(now: RolloutView) -> None:
    assert not react(Routing(FLEET, migration="cut_and_migrate"), now).moves


def test_without_migration_running_samples_stay() -> None:
    assert not react(Routing(FLEET), running(6)).moves


def test_the_papers_rules_can_be_chosen_by_name() -> None:
    spread = replace(running(4), replica_of=np.array([0, 0, 0, 1] * 4))
    assert [m.replica for m in react(Routing(FLEET, migration="rlhfuse", tau=0.5), spread).moves] == [0]
    assert not react(Routing(FLEET, migration="rlhfuse", tau=1.0), spread).moves
    late = replace(spread, replica_of=np.array([0, 0, 0, 1] + [0] * 4 + [1] * 8))
    assert [m.replica for m in react(Routing(FLEET, migration="rlhfless", tau=0.8), late).moves] == [0]


def test_a_large_batch_is_looked_at_less_often() -> None:
    small, large = (batch(groups=groups, n=16) for groups in (8, 1024))
    pauses = [
        react(
            Routing(FLEET), view(of, [FINISHED] * of.num_samples, [0] * of.num_samples, [9] * of.num_samples)
        ).next_look_s
        for of in (small, large)
    ]
    assert pauses == [5.5, 6.0]
