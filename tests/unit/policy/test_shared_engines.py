"""Replicas beside the trainer, on its own GPUs: chosen in a step for which leases do not pay, within every limit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from verl_rlhfless.live.devices import PoolBounds, declared_pool
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.policy.goal import Goal
from verl_rlhfless.policy.invest import plan_parked_fleet
from verl_rlhfless.policy.perf import EngineLimits
from verl_rlhfless.policy.plan import plan_fleet
from verl_rlhfless.policy.prediction import exact
from verl_rlhfless.policy.snapshot import Batch, PoolSnapshot, RolloutPlan

SHORT = np.full(64, 40)
LONG_TAIL = np.concatenate([np.full(62, 40), np.full(2, 2000)])
LIMITS = EngineLimits(32, 8192)


def pool(trainer_gpus: int = 4, *, resume_s: float = 5.0, num_parked: int = 4, replica_gpus: int = 4) -> PoolSnapshot:
    declared = declared_pool(PoolBounds((1,), replica_gpus, trainer_gpus, LIMITS, 10**6), PaceModel(60.0, 2.0, 0.1))
    times = replace(declared.trainer.times, wake_s=0.1, cold_start_s=20.0, resume_s=resume_s)
    trainer = replace(declared.trainer, num_gpus=trainer_gpus, times=times)
    warm, beside = {1: num_parked}, {1: min(num_parked, trainer_gpus)}
    ways = replace(declared, keeps_trainer=False, has_resident=True, shares_engines=True)
    return replace(ways, trainer=trainer, warm=warm, warm_beside=beside)


def planned(pool: PoolSnapshot, lengths: np.ndarray = SHORT, goal: Goal | None = None) -> RolloutPlan:
    batch = Batch(1, tuple("abcdefgh"), np.repeat(np.arange(8), 8), np.full(64, 50), 2000)
    return plan_parked_fleet(pool, batch, exact(lengths), goal or Goal())


def test_a_short_rollout_is_not_worth_the_trainers_leaving_and_a_long_tail_is() -> None:
    short, long = planned(pool()), planned(pool(), LONG_TAIL)
    assert short.is_resident and short.reason.startswith("resident TP1")
    assert not long.is_resident and "less GPU time" in long.reason
    assert not planned(replace(pool(), has_resident=False)).is_resident


def test_what_a_trainer_takes_to_leave_and_come_back_decides() -> None:
    chosen = [planned(pool(resume_s=resume_s), LONG_TAIL).is_resident for resume_s in (1.0, 20.0, 300.0)]
    assert chosen == [False, False, True]


def test_the_choice_is_never_worse_than_either_way_alone() -> None:
    for resume_s in (0.1, 1.0, 5.0, 50.0):
        for lengths in (SHORT, LONG_TAIL):
            both = planned(pool(resume_s=resume_s), lengths)
            leased = planned(replace(pool(resume_s=resume_s), has_resident=False), lengths)
            assert both.objective is not None and leased.objective is not None
            assert both.objective <= leased.objective * 1.05, "what does not repay a transition is not done"


def test_they_fit_on_the_trainers_gpus_even_where_more_could_be_leased() -> None:
    time_alone = Goal(cost_weight=0.0)
    for trainer_gpus in (1, 2, 3):
        plan = planned(pool(trainer_gpus, resume_s=500.0, replica_gpus=8), goal=time_alone)
        assert plan.is_resident and len(plan.fleet) == trainer_gpus


@pytest.mark.parametrize(("limits", "allowed"), [((1, 2), (1, 2)), ((3, None), (3, 4)), ((2, 2), (2, 2))])
def test_the_users_limits_hold(limits: tuple[int, int | None], allowed: tuple[int, int]) -> None:
    plan = planned(pool(resume_s=100.0), goal=Goal(min_replicas=limits[0], max_replicas=limits[1]))
    assert plan.is_resident and allowed[0] <= len(plan.fleet) <= allowed[1]
    assert not planned(pool(2, resume_s=100.0), goal=Goal(min_replicas=3)).is_resident


def test_the_forecast_is_of_a_step_without_moves() -> None:
    plan = planned(pool(resume_s=100.0))
    assert plan.is_resident and plan.predicted_rollout_s is not None and plan.predicted_step_s is not None
    assert plan.predicted_rollout_s < plan.predicted_step_s < 100.0
    assert plan.predicted_gpu_s == pytest.approx(4 * plan.predicted_step_s)


@pytest.mark.parametrize("num_parked", [1, 2, 3])
def test_only_engines_that_sleep_share_and_more_of_them_grow_on_leases(num_parked: int) -> None:
    few = pool(resume_s=500.0, num_parked=num_parked)
    assert planned(few).is_resident and len(planned(few).fleet) == num_parked
    must_grow = planned(few, goal=Goal(min_replicas=num_parked + 1))
    assert not must_grow.is_resident and len(must_grow.fleet) == num_parked + 1
    assert not planned(pool(resume_s=500.0, num_parked=0)).is_resident


def test_engines_that_sleep_on_other_gpus_are_not_planned_beside_the_trainer() -> None:
    few = replace(pool(resume_s=500.0), warm_beside={1: 2})
    assert planned(few).is_resident and len(planned(few).fleet) == 2
    assert not planned(few, goal=Goal(min_replicas=3)).is_resident
    assert not planned(replace(few, warm_beside={})).is_resident


def test_the_trainers_own_engines_are_all_or_none() -> None:
    own = replace(pool(resume_s=100.0), shares_engines=False)
    batch = Batch(1, tuple("abcdefgh"), np.repeat(np.arange(8), 8), np.full(64, 50), 2000)
    plan = plan_fleet(own, batch, exact(SHORT), Goal(), can_fuse=False)
    assert plan.is_resident and plan.fleet == (1,) * 4 and plan.predicted_rollout_s is None
