"""Placements where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.errors import ReplicaError
from verl_rlhfless.policy.dispatch import balanced_groups, equal_length_blocks, place_orphans, rebind, spread
from verl_rlhfless.policy.snapshot import GONE, READY, RUNNING, Batch, ReplicaView, RolloutView

POOL = cell(steps(1, 4, 2)).pool


def batch(sizes: list[int]) -> Batch:
    of = np.repeat(np.arange(len(sizes)), sizes)
    return Batch(1, tuple(f"p{i}" for i in range(len(sizes))), of, np.full(len(of), 10), 1000)


def test_rlhfless_blocks_hold_equally_many_samples_however_long_they_are() -> None:
    assert equal_length_blocks(batch([1] * 4), np.array([1000.0, 1.0, 3.0, 2.0]), 2).tolist() == [1, 0, 1, 0]


def test_the_heaviest_groups_are_placed_first_so_that_light_ones_even_the_rest_out() -> None:
    load = np.array([1.0, 1.0, 1.0, 1.0, 4.0])
    placed = balanced_groups(batch([1] * 5), load, [1.0, 1.0])
    assert np.bincount(placed, weights=load).tolist() == [4.0, 4.0]


def test_a_replica_of_twice_the_speed_gets_twice_the_work() -> None:
    placed = balanced_groups(batch([1] * 9), np.ones(9), [2.0, 1.0])
    assert np.bincount(placed).tolist() == [6, 3]


def test_a_group_too_heavy_for_an_even_share_is_split_and_others_stay_together() -> None:
    placed = balanced_groups(batch([6, 2]), np.ones(8), [1.0, 1.0])
    assert np.bincount(placed[:6]).tolist() == [3, 3] and len(set(placed[6:].tolist())) == 1


def test_the_heaviest_samples_go_to_the_least_loaded_target() -> None:
    moves = spread(np.arange(3), [4, 7], [0.0, 2.5], np.array([1.0, 3.0, 2.0]))
    assert {move.replica: move.samples.tolist() for move in moves} == {4: [0, 1], 7: [2]}


@pytest.mark.parametrize(("context", "chosen"), [(0, 1), (200_000, 0)])
def test_a_session_leaves_home_only_where_that_costs_less_than_its_context(context: int, chosen: int) -> None:
    home = ReplicaView(0, 1, READY, 0, 8, 8000)
    empty = ReplicaView(1, 1, READY, 0, 0, 0)
    assert rebind(POOL, (home, empty), 0, context) == chosen


def orphaned(replicas: tuple[ReplicaView, ...]) -> RolloutView:
    of = np.zeros(4, dtype=np.int64)
    return RolloutView(1.0, batch([4]), POOL, np.full(4, 5), np.full(4, RUNNING, np.int8), of, replicas, 0, 0, 0, 0)


def test_lost_samples_go_where_there_is_least_to_do_for_each_gpu() -> None:
    gone = ReplicaView(0, 1, GONE, 0, 0, 0)
    view = orphaned((gone, ReplicaView(1, 1, READY, 0, 3, 0), ReplicaView(2, 4, READY, 2, 2, 0)))
    starts, moves = place_orphans(view, np.array([2]), (1, 1, 4))
    assert (starts, [(move.replica, move.samples.tolist()) for move in moves]) == ((), [(2, [2])])


def test_when_none_is_left_the_narrowest_of_the_fleet_is_started_again() -> None:
    starts, moves = place_orphans(orphaned((ReplicaView(0, 4, GONE, 0, 0, 0),)), np.arange(4), (4, 2))
    assert (starts, [(move.replica, move.samples.tolist()) for move in moves]) == ((2,), [(1, [0, 1, 2, 3])])


def test_when_none_is_left_and_none_may_be_started_that_is_said() -> None:
    with pytest.raises(ReplicaError, match="4 samples lost the last replica"):
        place_orphans(orphaned(()), np.arange(4), ())
