"""Resizing a leased fleet in mid-rollout: what is empty ends, what is not stays, and waiting work goes first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.unit.policy.paced import POOL
from verl_rlhfless.policy.elastic import Resizing, empty_replicas
from verl_rlhfless.policy.goal import Goal
from verl_rlhfless.policy.predict import LengthModel
from verl_rlhfless.policy.routing import Routing
from verl_rlhfless.policy.snapshot import (
    FINISHED,
    GONE,
    READY,
    RUNNING,
    STARTING,
    WAITING,
    Batch,
    Move,
    ReplicaView,
    RolloutView,
)

FLEET = (1, 1)
BATCH = Batch(1, tuple("abcd"), np.repeat(np.arange(4), 4), np.full(16, 200), 200)


def view(state: Any, replica_of: Any, states: tuple[str, ...] = (READY, READY), generated: int = 60) -> RolloutView:
    states_of, of = np.array(state, dtype=np.int8), np.array(replica_of)
    running = np.bincount(of[states_of == RUNNING], minlength=len(states))
    waiting = np.bincount(of[states_of == WAITING], minlength=len(states))
    replicas = tuple(
        ReplicaView(r, 1, s, int(waiting[r]), int(running[r]), 260 * int(running[r])) for r, s in enumerate(states)
    )
    done = np.where(states_of == WAITING, 0, generated)
    return RolloutView(5.0, BATCH, POOL, done, states_of, of, replicas, 2, 0, 0, 0)


def react(now: RolloutView, price: float = 1.0, **parts: Any) -> Any:
    arm = Routing(FLEET, "length_bucket", parts.get("migration", "cut_and_migrate"), is_resident=False)
    plan = replace(arm.plan(LengthModel(), POOL, BATCH), price=price)
    policy = Resizing(arm.policy(LengthModel(), BATCH), Goal(), parts.get("consolidates", True))
    return policy.react(now, plan)


ONE_LEFT = view([RUNNING] * 4 + [FINISHED] * 12, [0] * 4 + [1] * 12)


def test_an_empty_replica_is_given_back_and_the_reason_says_which() -> None:
    reaction = react(ONE_LEFT)
    assert reaction.releases == (1,) and not reaction.moves
    assert "replica 1 has nothing left" in reaction.reason


def test_running_samples_are_not_moved_onto_a_replica_that_is_about_to_end() -> None:
    arm = Routing(FLEET, "length_bucket", "cut_and_migrate")
    many = view([RUNNING] * 8 + [FINISHED] * 8, [0] * 8 + [1] * 8, generated=10)
    assert arm.policy(LengthModel(), BATCH).react(many, arm.plan(LengthModel(), POOL, BATCH)).moves
    assert react(many).moves == () and react(many).releases == (1,)


def test_waiting_samples_go_to_the_empty_replica_which_then_stays() -> None:
    reaction = react(view([RUNNING] * 8 + [WAITING] * 4 + [FINISHED] * 4, [0] * 12 + [1] * 4))
    assert {move.replica for move in reaction.moves} == {1} and reaction.releases == ()


def test_a_thin_tail_is_gathered_and_the_replica_that_it_leaves_ends_at_once() -> None:
    thin = view([RUNNING] + [FINISHED] * 7 + [RUNNING] + [FINISHED] * 7, [0] * 8 + [1] * 8, generated=20)
    reaction = react(thin, price=0.01)
    (move,) = reaction.moves
    assert reaction.releases == (1 - move.replica,)


def test_a_dear_second_keeps_the_tail_where_it_is() -> None:
    busy = view([RUNNING] * 16, [0] * 8 + [1] * 8)
    reaction = react(busy, price=1000.0)
    assert not reaction.moves and not reaction.releases


def test_without_migration_nothing_is_cut_and_empty_replicas_still_end() -> None:
    thin = view([RUNNING] + [FINISHED] * 7 + [RUNNING] + [FINISHED] * 7, [0] * 8 + [1] * 8, generated=20)
    assert react(thin, price=0.01, migration="off", consolidates=False).moves == ()
    assert react(ONE_LEFT, migration="off", consolidates=False).releases == (1,)


@pytest.mark.parametrize("state", [STARTING, GONE])
def test_only_a_ready_replica_can_end(state: str) -> None:
    assert empty_replicas(view([RUNNING] * 4 + [FINISHED] * 12, [0] * 16, (READY, state))) == ()


def test_a_replica_with_requests_of_others_is_not_empty() -> None:
    busy = replace(ONE_LEFT.replicas[1], num_running=1)
    assert empty_replicas(replace(ONE_LEFT, replicas=(ONE_LEFT.replicas[0], busy))) == ()


def test_a_replica_that_samples_are_on_their_way_to_is_not_empty() -> None:
    assert empty_replicas(ONE_LEFT, (Move(np.array([0]), 1),)) == ()
    assert empty_replicas(ONE_LEFT, (Move(np.arange(4), 1),)) == (0,)
