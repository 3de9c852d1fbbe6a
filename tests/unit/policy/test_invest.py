"""Parked engines are what a plan says they are, and a start is shared by the rollouts that it serves."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.live.devices import PoolBounds, declared_pool
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.policy.goal import Goal
from verl_rlhfless.policy.invest import plan_parked_fleet
from verl_rlhfless.policy.perf import EngineLimits
from verl_rlhfless.policy.plan import plan_fleet
from verl_rlhfless.policy.prediction import exact
from verl_rlhfless.policy.snapshot import Batch, PoolSnapshot

LENGTHS = np.clip(np.exp(np.random.default_rng(0).normal(3.3, 0.75, 64)), 5, 160).astype(np.int64)
BATCH = Batch(1, tuple("abcdefgh"), np.repeat(np.arange(8), 8), np.full(64, 165), 160)
POOL = declared_pool(PoolBounds((1,), 4, 4, EngineLimits(32, 8192), 10**6), PaceModel(120.0, 4.0, 0.4))


def pool(num_parked: int, start_s: float) -> PoolSnapshot:
    times = replace(POOL.trainer.times, wake_s=0.1, cold_start_s=start_s)
    trainer = replace(POOL.trainer, num_gpus=4, times=times)
    return replace(POOL, keeps_trainer=False, has_resident=False, trainer=trainer, warm={1: num_parked})


@pytest.mark.parametrize("num_parked", [1, 2, 3])
def test_one_parked_engine_is_not_woken_for_several_replicas(num_parked: int) -> None:
    plan = plan_fleet(pool(num_parked, start_s=60.0), BATCH, exact(LENGTHS), Goal(), can_fuse=False)
    assert plan.predicted_rollout_s is not None
    assert len(plan.fleet) <= num_parked or plan.predicted_rollout_s > 60.0


def test_a_start_that_pays_over_later_rollouts_is_made_and_the_forecast_holds_all_of_it() -> None:
    few = pool(1, start_s=13.0)
    plan = plan_parked_fleet(few, BATCH, exact(LENGTHS), Goal())
    assert len(plan.fleet) > len(plan_fleet(few, BATCH, exact(LENGTHS), Goal(), can_fuse=False).fleet) == 1
    assert "wake in later rollouts" in plan.reason
    assert plan.predicted_rollout_s is not None and plan.predicted_rollout_s > 13.0 + 10.0


@pytest.mark.parametrize("num_parked", [1, 2])
def test_a_parked_fleet_grows_by_the_engines_that_it_lacks(num_parked: int) -> None:
    assert len(plan_parked_fleet(pool(3, start_s=9.6), BATCH, exact(LENGTHS), Goal()).fleet) == 3
    plan = plan_parked_fleet(pool(num_parked, start_s=9.6), BATCH, exact(LENGTHS), Goal())
    assert len(plan.fleet) == 3 and f"{3 - num_parked} started now" in plan.reason


@pytest.mark.parametrize("keeps_trainer", [False, True])
@pytest.mark.parametrize("num_parked", [1, 2])
def test_the_forecast_of_a_step_whose_start_is_shared_is_that_of_the_same_fleet_alone(
    num_parked: int, keeps_trainer: bool
) -> None:
    few = replace(pool(num_parked, start_s=13.0), keeps_trainer=keeps_trainer)
    shared = plan_parked_fleet(few, BATCH, exact(LENGTHS), Goal())
    same = Goal(min_replicas=len(shared.fleet), max_replicas=len(shared.fleet))
    alone = plan_fleet(few, BATCH, exact(LENGTHS), same, can_fuse=False)
    assert shared.fleet == alone.fleet and "started now" in shared.reason
    lanes = 0.03  # a start that counts in part may be worth other lanes on the same fleet
    assert shared.predicted_step_s == pytest.approx(alone.predicted_step_s, rel=lanes)
    assert shared.predicted_gpu_s == pytest.approx(alone.predicted_gpu_s, rel=lanes)
    assert shared.predicted_rollout_s == pytest.approx(alone.predicted_rollout_s, rel=lanes)


def test_a_parked_engine_of_two_gpus_is_one_replica_that_need_not_start() -> None:
    wide = declared_pool(PoolBounds((2,), 8, 4, EngineLimits(32, 8192), 10**6), PaceModel(120.0, 4.0, 0.4))
    trainer = pool(1, start_s=9.6).trainer
    few = replace(wide, keeps_trainer=False, has_resident=False, trainer=trainer, warm={2: 2})
    plan = plan_parked_fleet(few, BATCH, exact(LENGTHS), Goal(cost_weight=0.3))
    assert f"; {len(plan.fleet) - 1} started now" in plan.reason and len(plan.fleet) > 1


@pytest.mark.parametrize("start_s", [2.0, 9.6, 40.0])
@pytest.mark.parametrize("cost_weight", [0.2, 0.5, 0.8])
def test_the_more_is_parked_the_better_is_the_plan(start_s: float, cost_weight: float) -> None:
    goal = Goal(cost_weight=cost_weight)
    plans = [plan_parked_fleet(pool(n, start_s), BATCH, exact(LENGTHS), goal) for n in (1, 2, 3, 4)]
    reached = [plan.objective for plan in plans if plan.objective is not None]
    assert len(reached) == 4
    assert all(b <= a * 1.007 for a, b in pairwise(reached)), "objectives this close are equal: the faster is taken"


def test_a_start_that_takes_far_longer_than_rollouts_is_not_made() -> None:
    plan = plan_parked_fleet(pool(1, start_s=600.0), BATCH, exact(LENGTHS), Goal())
    assert len(plan.fleet) == 1 and "later" not in plan.reason


def test_nothing_is_shared_under_a_deadline() -> None:
    few = pool(1, start_s=13.0)
    deadline = 1.0 + (plan_fleet(few, BATCH, exact(LENGTHS), Goal(), can_fuse=False).predicted_step_s or 0.0)
    plan = plan_parked_fleet(few, BATCH, exact(LENGTHS), Goal(max_step_s=deadline))
    assert len(plan.fleet) == 1 and plan.predicted_step_s is not None and plan.predicted_step_s <= deadline
    with pytest.raises(ConfigError, match="max_step_s"):
        plan_parked_fleet(pool(1, start_s=13.0), BATCH, exact(LENGTHS), Goal(max_step_s=1.0))
