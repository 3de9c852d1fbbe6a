"""Parking, chunks of inference, cuts for it, and plans that share their starts: bounds, monotonicity, permutation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.policy.test_policies import POOL, batches
from verl_rlhfless.policy.fuse import CallCost, next_chunk
from verl_rlhfless.policy.fusion_cut import Inference, price_cuts
from verl_rlhfless.policy.goal import Goal
from verl_rlhfless.policy.invest import plan_parked_fleet
from verl_rlhfless.policy.park import ParkView, decide_park, worth_waiting_s
from verl_rlhfless.policy.plan import plan_fleet
from verl_rlhfless.policy.prediction import exact
from verl_rlhfless.policy.snapshot import Batch, PoolSnapshot
from verl_rlhfless.policy.stages import Lane, depth_edges

SECONDS = st.floats(0.01, 100)
MEASURED = st.lists(SECONDS, max_size=4).map(tuple)
PARKINGS = st.builds(
    ParkView,
    can_sleep=st.booleans(),
    uses_ahead=st.integers(0, 3),
    num_parked=st.integers(0, 3),
    starts_s=st.lists(SECONDS, min_size=1, max_size=4).map(tuple),
    wakes_s=MEASURED,
    relaunches_s=MEASURED,
    same_device_wait_s=SECONDS,
    host_available_bytes=st.integers(0, 4),
    host_reserved_bytes=st.integers(0, 4),
)


@settings(max_examples=300)
@given(PARKINGS, st.sampled_from(["auto", "always", "never"]))
def test_no_engine_is_parked_that_nobody_wakes_or_the_host_has_no_room_for(view: ParkView, mode: str) -> None:
    decision = decide_park(mode, view)
    assert decision.reason and decision == decide_park(mode, view)
    if decision.park:
        assert mode != "never" and view.can_sleep and view.num_parked < view.uses_ahead
        assert view.host_available_bytes >= view.host_reserved_bytes
        assert decide_park("always", view).park


@settings(max_examples=300)
@given(PARKINGS, st.floats(0, 100), st.integers(0, 4))
def test_slower_starts_more_uses_and_more_memory_never_end_an_engine_that_would_be_parked(
    view: ParkView, more_s: float, more: int
) -> None:
    slower = replace(view, starts_s=tuple(start_s + more_s for start_s in view.starts_s))
    wanted = replace(view, uses_ahead=view.uses_ahead + more)
    roomy = replace(view, host_available_bytes=view.host_available_bytes + more)
    for other in (slower, wanted, roomy):
        assert decide_park("auto", other).park >= decide_park("auto", view).park


@given(PARKINGS)
def test_the_wait_for_the_right_devices_is_within_what_is_allowed_and_what_a_wake_saves(view: ParkView) -> None:
    wait_s = worth_waiting_s(view)
    assert 0 <= wait_s <= view.same_device_wait_s
    assert wait_s <= max(view.relaunches_s, default=0.0)


COSTS = st.one_of(st.none(), st.builds(CallCost, st.floats(0, 3), st.floats(1e-4, 1e-2)))


@settings(max_examples=200)
@given(st.lists(st.integers(1, 2000), max_size=30), st.integers(1, 8), COSTS, st.floats(0, 60), st.floats(0, 60))
def test_a_chunk_is_whole_quanta_of_what_waits_and_longer_where_there_is_more_time(
    tokens: list[int], quantum: int, cost: CallCost | None, remaining_s: float, more_s: float
) -> None:
    count = next_chunk(np.array(tokens, dtype=np.int64), quantum, cost, remaining_s)
    assert 0 <= count <= len(tokens) and count % quantum == 0
    assert next_chunk(np.array(tokens, dtype=np.int64), quantum, cost, remaining_s + more_s) >= count
    assert next_chunk(np.array([*tokens, 500]), quantum, cost, remaining_s) >= count
    if cost is not None and count > quantum:
        assert cost.call_s + cost.token_s * sum(tokens[:count]) <= remaining_s


@settings(max_examples=60)
@given(
    st.sampled_from([(1, 8), (2, 4), (2, 8), (4, 4)]),
    st.integers(1, 300),
    st.integers(200, 16_000),
    st.integers(0, 10**6),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8)),
)
def test_free_gpus_never_make_a_cut_dearer_and_every_cut_decodes_at_least_as_long_as_none(
    fleet: tuple[int, int],
    alive: int,
    depth: int,
    finished: int,
    waiting: tuple[float, float],
    gpus: tuple[int, int, int],
) -> None:
    edges = depth_edges(depth)
    left = alive * np.exp(-3 * edges[1:] / depth)
    lane = Lane(edges, left, 300.0, 0.0, -np.expm1(-left), 0.5)
    free, running, more = gpus
    taken, rest = sorted(share * finished for share in waiting)
    pool = replace(POOL, trainer=replace(POOL.trainer, num_gpus=2))  # so slow that every token counts
    some = Inference(512, finished, rest, free, running)
    cuts = price_cuts(pool, lane, fleet, some)
    assert cuts.counts[-1] == fleet[1] and cuts.saved_s >= 0
    assert (cuts.total_s >= cuts.rollout_s).all() and (cuts.rollout_s > 0).all()
    assert (cuts.rollout_s >= cuts.rollout_s[:, -1:] * (1 - 1e-9)).all()
    assert np.ptp(cuts.rollout_s[:, -1]) <= 1e-9 * cuts.rollout_s[0, -1]
    for better in (
        replace(some, free_gpus=free + more),
        replace(some, running_gpus=running + more),
        replace(some, waiting_tokens=taken),
    ):
        assert (price_cuts(pool, lane, fleet, better).total_s <= cuts.total_s * (1 + 1e-9)).all()


def shuffled(batch: Batch, order: list[int]) -> tuple[Batch, np.ndarray]:  # type: ignore[type-arg]
    """Return the batch with its groups in another order, and which sample each of its samples was."""
    samples = np.concatenate([np.flatnonzero(batch.group_of == group) for group in order])
    names = tuple(batch.prompt_ids[group] for group in order)
    group_of = np.repeat(np.arange(len(order)), np.bincount(batch.group_of)[order])
    return replace(batch, prompt_ids=names, group_of=group_of, prompt_tokens=batch.prompt_tokens[samples]), samples


@settings(max_examples=40)
@given(batches(), st.floats(0, 1), st.randoms(use_true_random=False))
def test_a_planned_fleet_does_not_depend_on_the_order_of_the_prompts(case, weight, random) -> None:  # type: ignore[no-untyped-def]
    batch, lengths = case
    order = random.sample(range(len(batch.prompt_ids)), len(batch.prompt_ids))
    other, samples = shuffled(batch, order)
    goal = Goal(cost_weight=weight)
    plan, again = plan_fleet(POOL, batch, exact(lengths), goal), plan_fleet(POOL, other, exact(lengths[samples]), goal)
    assert again.fleet == plan.fleet and again.is_resident == plan.is_resident
    assert again.objective == pytest.approx(plan.objective)
    assert again.predicted_step_s == pytest.approx(plan.predicted_step_s)


def parked(num_parked: int, start_s: float) -> PoolSnapshot:
    """Return a pool of engines with one GPU, of which so many are asleep and no others were started yet."""
    times = replace(POOL.trainer.times, wake_s=0.1, cold_start_s=start_s)
    trainer = replace(POOL.trainer, times=times)
    return replace(POOL, perf={1: POOL.perf[1]}, trainer=trainer, has_resident=False, warm={1: num_parked})


@settings(max_examples=40)
@given(batches(), st.integers(1, 4), st.floats(0.1, 60), st.floats(0, 60), st.floats(0.05, 0.95))
def test_a_plan_that_shares_its_starts_says_how_many_and_is_no_better_for_longer_ones(
    case: tuple[Batch, np.ndarray],  # type: ignore[type-arg]
    num_parked: int,
    start_s: float,
    more_s: float,
    weight: float,
) -> None:
    batch, lengths = case
    pools = [parked(num_parked, seconds) for seconds in (start_s, start_s + more_s)]
    soon, late = (plan_parked_fleet(pool, batch, exact(lengths), Goal(cost_weight=weight)) for pool in pools)
    assert soon.objective is not None and late.objective is not None
    assert soon.objective <= late.objective * 1.01, "as good as equal counts as equal"
    for plan in (soon, late):
        assert len(plan.fleet) <= POOL.num_gpus
        assert ((plan.replica_of >= 0) & (plan.replica_of < len(plan.fleet))).all()
        num_started = max(0, len(plan.fleet) - num_parked)
        assert plan.reason.endswith(f"; {num_started} started now wake in later rollouts") == (num_started > 0)
