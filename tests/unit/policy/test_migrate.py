"""Changes of a running fleet: what pays, what may start, who moves where, and what fresh replicas get."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.migrate import Change, consolidate
from verl_rlhfless.policy.paper_rules import local_cut
from verl_rlhfless.policy.prediction import Prediction, exact
from verl_rlhfless.policy.snapshot import (
    FINISHED,
    GONE,
    READY,
    RUNNING,
    Batch,
    PoolSnapshot,
    ReplicaView,
    RolloutView,
)

POOL = cell(steps(1, 4, 2)).pool


def ready(num_left: int, olds: tuple[int, ...], news: tuple[int, ...]) -> tuple[RolloutView, Change]:
    """Return a rollout whose ``num_left`` samples are spread over the old replicas, and what fresh ones change."""
    batch = Batch(1, ("p",), np.zeros(16, dtype=np.int64), np.full(16, 100), 8192)
    state = np.where(np.arange(16) < num_left, RUNNING, FINISHED).astype(np.int8)
    of = np.arange(16) % len(olds)
    held = np.bincount(of[:num_left], minlength=len(olds)).tolist() + [0] * len(news)
    replicas = tuple(
        ReplicaView(r, tp, READY if held[r] or r >= len(olds) else GONE, 0, held[r], 3000 * held[r])
        for r, tp in enumerate((*olds, *news))
    )
    view = RolloutView(100.0, batch, POOL, np.full(16, 3000), state, of, replicas, 4, 0, 0, 0)
    lengths = Prediction(np.full(16, np.log(4000.0)), np.full(16, 0.5), 8192)
    return view, consolidate(view, lengths, 16.0, 0.02, len(olds))


@pytest.mark.parametrize(
    ("num_left", "olds", "news", "num_moved", "released"),
    [
        (1, (2,), (2,), 0, (1,)),
        (8, (2,), (2,), 4, ()),
        (3, (2,), (2, 2, 2, 2), 2, (3, 4)),
        (2, (2, 2), (4, 4, 4), 2, (4,)),
        (8, (2, 2), (4, 4), 8, ()),
    ],
)
def test_fresh_replicas_get_samples_or_end_and_the_rest_of_the_rollout_takes_time(
    num_left: int, olds: tuple[int, ...], news: tuple[int, ...], num_moved: int, released: tuple[int, ...]
) -> None:
    view, change = ready(num_left, olds, news)
    assert sum(len(move.samples) for move in change.moves) == num_moved
    assert change.releases == released
    assert {move.replica for move in change.moves} == set(range(len(olds), len(view.replicas))) - set(released)
    assert change.remaining_s > 1.0 and not change.starts and change.reason


Lane = tuple[int, int, int, int]
"""Replicas, their size, samples on each, and tokens that each of these still gets."""


def rollout(*lanes: Lane, free: int = 0, generated: int = 100, pool: PoolSnapshot = POOL) -> RolloutView:
    """Return a rollout of which every sample runs."""
    fleet = [(tp, num, left) for count, tp, num, left in lanes for _ in range(count)]
    of = np.repeat(np.arange(len(fleet)), [num for _, num, _ in fleet])
    batch = Batch(1, ("p",), np.zeros(len(of), dtype=np.int64), np.full(len(of), 100), 32768)
    replicas = tuple(ReplicaView(r, tp, READY, 0, num, 0) for r, (tp, num, _) in enumerate(fleet))
    have, state = np.full(len(of), generated), np.full(len(of), RUNNING, dtype=np.int8)
    return RolloutView(100.0, batch, pool, have, state, of, replicas, free, 0, 0, 0)


def change(
    *lanes: Lane,
    price: float,
    free: int = 0,
    generated: int = 100,
    hysteresis: float = 0.02,
    started: int = 0,
    pool: PoolSnapshot = POOL,
) -> Change:
    """Return the change of a rollout whose lengths are known and of whose replicas the last ``started`` came later."""
    view = rollout(*lanes, free=free, generated=generated, pool=pool)
    left = np.concatenate([np.full(count * num, tokens) for count, _, num, tokens in lanes])
    return consolidate(view, exact(view.generated + left), price, hysteresis, len(view.replicas) - started)


def move_counts(change: Change) -> dict[int, int]:
    """Return how many samples go to each replica."""
    return {move.replica: len(move.samples) for move in change.moves}


TAIL: Lane = (2, 1, 4, 20_000)
"""A few samples so long that a wider replica pays for its cold start."""


def test_a_rollout_starts_replicas_once() -> None:
    assert change(TAIL, price=64.0, free=14).starts == (4,)
    assert change(TAIL, price=64.0, free=14, started=1).starts == ()


@pytest.mark.parametrize(("free", "starts"), [(0, ()), (3, ()), (4, (4,))])
def test_nothing_starts_on_gpus_that_are_not_free(free: int, starts: tuple[int, ...]) -> None:
    assert change(TAIL, price=64.0, free=free).starts == starts


def test_a_change_must_gain_the_hysteresis_and_a_start_ten_times_as_much() -> None:
    thin: Lane = (2, 1, 4, 2000)
    assert [bool(change(thin, price=1.0, hysteresis=least).moves) for least in (0.3, 0.9)] == [True, False]
    assert [bool(change(TAIL, price=64.0, free=14, hysteresis=least).starts) for least in (0.02, 0.05)] == [True, False]


@pytest.mark.parametrize(("longest", "reason"), [(3000, ""), (10_000, "4 x TP1 shrinks to 2")])
def test_replicas_that_end_before_the_last_one_shrink_for_less(longest: int, reason: str) -> None:
    assert change((4, 1, 32, 2000), (1, 2, 1, longest), price=16.0, generated=1000).reason == reason


def test_of_two_changes_the_one_that_gains_more_is_made() -> None:
    assert change((2, 1, 1, 1000), (3, 1, 6, 200), price=16.0).reason == "3 x TP1 shrinks to 1"


def test_a_few_samples_join_other_replicas_when_that_saves_much() -> None:
    joined = change((4, 2, 16, 4000), (2, 2, 1, 4000), price=1.0)
    assert joined.reason == "TP2 joins TP2"
    assert sum(move_counts(joined).values()) == 2 and set(move_counts(joined)) <= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("lanes", "price"),
    [
        (((2, 1, 16, 1000), (3, 1, 2, 200)), 64.0),
        (((4, 2, 16, 4000), (1, 2, 1, 1000)), 64.0),
    ],
    ids=["a little", "nothing"],
)
def test_what_was_kept_apart_stays_apart_when_joining_saves_little(lanes: tuple[Lane, ...], price: float) -> None:
    assert "joins" not in change(*lanes, price=price).reason


@pytest.mark.parametrize(
    "lanes",
    [((1, 1, 4, 4000), (3, 4, 2, 12_000)), ((2, 2, 1, 1000), (3, 4, 2, 200)), ((1, 1, 4, 4000), (2, 2, 6, 4000))],
)
@pytest.mark.parametrize("price", [0.1, 1.0])
def test_no_sample_moves_to_a_slower_replica_however_cheap_that_is(lanes: tuple[Lane, ...], price: float) -> None:
    view, moves = rollout(*lanes), change(*lanes, price=price).moves
    assert moves
    for move in moves:
        sources = view.replica_of[move.samples].tolist()
        assert all(view.replicas[source].tp <= view.replicas[move.replica].tp for source in sources)


def test_what_joins_is_computed_again_side_by_side_before_the_rest_goes_on() -> None:
    lanes: tuple[Lane, ...] = ((1, 1, 16, 4000), (3, 2, 1, 4000))
    slow = {
        tp: replace(perf, efficiencies=replace(perf.efficiencies, prefill=perf.efficiencies.prefill / 4))
        for tp, perf in POOL.perf.items()
    }
    pools = (POOL, replace(POOL, perf=slow))
    soon, late = (change(*lanes, price=64.0, generated=10_000, pool=pool) for pool in pools)
    assert sum(move_counts(soon).values()) == sum(move_counts(late).values()) == 16
    more_s = slow[2].prefill_s_per_token - POOL.perf[2].prefill_s_per_token
    assert late.remaining_s - soon.remaining_s == pytest.approx(16 * 10_100 * more_s / 3)


def test_a_fresh_replica_gets_the_samples_that_lose_least_when_they_are_computed_again() -> None:
    view = rollout((1, 2, 8, 3000))
    generated = np.array([900, 100, 800, 200, 700, 300, 600, 400])
    view = replace(view, generated=generated, replicas=(*view.replicas, ReplicaView(1, 2, READY, 0, 0, 0)))
    (move,) = consolidate(view, exact(generated + 3000), 16.0, 0.02, 1).moves
    assert move.replica == 1 and move.samples.tolist() == [1, 3, 5, 7]


def test_past_tau_everywhere_the_fullest_replica_of_the_lowest_id_takes_the_rest() -> None:
    state = np.full(40, FINISHED, dtype=np.int8)
    state[[0, 10, 11, 20, 21, 30]] = RUNNING
    view = replace(rollout((4, 1, 10, 100)), state=state)
    (move,) = local_cut(view, 0.8)
    assert move.replica == 1 and move.samples.tolist() == [0, 20, 21, 30]
