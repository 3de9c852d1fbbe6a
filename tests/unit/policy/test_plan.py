"""The planner: what it chooses where the answer is known, and what it says where there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.policy.plan import Goal, plan_fleet, time_price
from verl_rlhfless.policy.predict import LengthModel, learn, predict
from verl_rlhfless.policy.prediction import exact
from verl_rlhfless.policy.snapshot import PoolSnapshot, RolloutPlan
from verl_rlhfless.policy.stages import options_for

LONG = steps(1, 128, 8, mean=2000.0, cap=16384)
SHORT = steps(1, 64, 4, mean=60.0, cap=512)


def plan(goal: Goal, data=LONG, wake_s: float = 2.0) -> tuple[RolloutPlan, PoolSnapshot]:  # type: ignore[no-untyped-def]
    batch = data[0].batch
    pool = cell(data, wake_s=wake_s).pool
    pool = replace(pool, warm=dict.fromkeys(pool.perf, 16))
    model = learn(LengthModel(), batch, data[0].lengths)
    return plan_fleet(pool, batch, predict(model, batch), goal), pool


def test_a_long_tail_is_worth_an_elastic_fleet() -> None:
    chosen, pool = plan(Goal())
    assert not chosen.is_resident
    assert sum(chosen.fleet) <= pool.num_gpus
    assert "less GPU time" in chosen.reason


def test_a_short_rollout_stays_resident_and_says_why() -> None:
    chosen, pool = plan(Goal(), SHORT, wake_s=30.0)
    assert chosen.is_resident
    assert sum(chosen.fleet) == pool.trainer.num_gpus
    assert "saving 0" in chosen.reason


def test_more_weight_on_cost_never_costs_more() -> None:
    weights = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    cost = [plan(Goal(cost_weight=w, payback=0.0))[0].predicted_gpu_s for w in weights]
    time = [plan(Goal(cost_weight=w, payback=0.0))[0].predicted_step_s for w in weights]
    assert cost[-1] <= cost[0]
    assert time[-1] >= time[0]


def test_not_slower_means_not_slower_than_the_best_static_fleet() -> None:
    fast, _ = plan(Goal(is_notslower=True))
    default, _ = plan(Goal())
    assert fast.predicted_step_s <= default.predicted_step_s


def test_a_deadline_is_met() -> None:
    free = plan(Goal(cost_weight=1.0))[0].predicted_step_s
    deadline = 0.7 * free
    assert plan(Goal(cost_weight=1.0, max_step_s=deadline))[0].predicted_step_s <= deadline


def test_a_budget_is_met() -> None:
    free = plan(Goal(cost_weight=0.05))[0].predicted_gpu_s
    assert plan(Goal(cost_weight=0.05, max_gpu_s=0.8 * free))[0].predicted_gpu_s <= 0.8 * free


@pytest.mark.parametrize(
    ("goal", "key"),
    [
        (Goal(max_step_s=1.0), "max_step_s"),
        (Goal(max_gpu_s=1.0), "max_usd_per_step"),
    ],
)
def test_an_impossible_constraint_says_what_would_be_feasible(goal: Goal, key: str) -> None:
    with pytest.raises(ConfigError, match=r"Feasible: \d") as caught:
        plan(goal)
    assert caught.value.key.endswith(key)


def test_a_refused_budget_speaks_of_money_when_the_price_is_known() -> None:
    with pytest.raises(ConfigError, match=r"Feasible: \d+\.\d+ USD"):
        plan(Goal(max_gpu_s=1.0, usd_per_gpu_s=0.001))


def test_limits_on_replicas_hold_for_every_elastic_fleet() -> None:
    assert len(plan(Goal(min_replicas=5, payback=0.0))[0].fleet) >= 5
    few, _ = plan(Goal(max_replicas=2, payback=0.0))
    assert few.is_resident or len(few.fleet) <= 2


@pytest.mark.parametrize(("least", "most"), [(0, None), (3, 2)])
def test_replica_limits_that_exclude_every_fleet_are_refused(least: int, most: int | None) -> None:
    with pytest.raises(ConfigError, match="min_replicas"):
        Goal(min_replicas=least, max_replicas=most)


def test_time_saved_earlier_may_be_spent_and_time_lost_is_caught_up() -> None:
    costs = {slack: plan(Goal(is_notslower=True, slack_s=slack))[0] for slack in (-5.0, 0.0, 30.0)}
    assert costs[30.0].predicted_gpu_s <= costs[0.0].predicted_gpu_s <= costs[-5.0].predicted_gpu_s
    assert costs[-5.0].predicted_step_s <= costs[30.0].predicted_step_s


def test_elastic_steps_that_turn_out_longer_make_the_planner_stay_resident() -> None:
    assert not plan(Goal())[0].is_resident
    assert plan(Goal(caution=3.0))[0].is_resident


def test_a_deadline_and_a_budget_that_exclude_each_other_say_so() -> None:
    fastest = plan(Goal(cost_weight=0.0))[0]
    cheapest = plan(Goal(cost_weight=1.0))[0]
    with pytest.raises(ConfigError, match="Within it the least is"):
        plan(Goal(max_step_s=fastest.predicted_step_s * 1.01, max_gpu_s=cheapest.predicted_gpu_s * 1.01))


def test_a_cold_engine_is_not_free() -> None:
    batch = LONG[0].batch
    pool = cell(LONG).pool
    prior = predict(learn(LengthModel(), batch, LONG[0].lengths), batch)
    warm = plan_fleet(replace(pool, warm=dict.fromkeys(pool.perf, 16)), batch, prior, Goal(cost_weight=0.0))
    cold = plan_fleet(replace(pool, warm={1: 16}), batch, prior, Goal(cost_weight=0.0))
    assert cold.predicted_step_s > warm.predicted_step_s


def test_every_sample_has_one_replica_and_siblings_stay_together_where_they_can() -> None:
    chosen, _ = plan(Goal())
    batch = LONG[0].batch
    assert ((chosen.replica_of >= 0) & (chosen.replica_of < len(chosen.fleet))).all()
    homes = [len(set(chosen.replica_of[batch.group_of == g].tolist())) for g in range(len(batch.prompt_ids))]
    assert np.mean(homes) == 1.0
    assert sorted(chosen.order.tolist()) == list(range(batch.num_samples))


def replicas_of_a_group(num_groups: int, prompt_tokens: int, cap: int) -> float:
    """Return the mean number of replicas on which a group of 8 begins where every plan is resident."""
    data = steps(1, num_groups, 8, cap=cap)
    batch = replace(data[0].batch, prompt_tokens=np.full(8 * num_groups, prompt_tokens))
    chosen = plan_fleet(cell(data).pool, batch, predict(LengthModel(), batch), Goal(payback=1e9))
    assert chosen.is_resident
    return float(np.mean([len(set(chosen.replica_of[batch.group_of == g].tolist())) for g in range(num_groups)]))


def test_siblings_of_unknown_length_part_on_a_resident_fleet_where_that_is_worth_computing_their_prompt_again() -> None:
    assert replicas_of_a_group(128, prompt_tokens=100, cap=16384) >= 2.0
    assert replicas_of_a_group(128, prompt_tokens=8000, cap=512) == 1.0
    assert replicas_of_a_group(16, prompt_tokens=1000, cap=2048) == 1.0  # few requests: uneven work hardly matters


def beside_a_trainer(num_gpus: int, sizes: tuple[int, ...] = (1, 2, 4, 8)) -> PoolSnapshot:
    """Return a pool whose replicas have ``num_gpus`` beside a trainer that keeps four."""
    pool = cell(LONG).pool
    perf = {tp: pool.perf[tp] for tp in sizes}
    trainer = replace(pool.trainer, num_gpus=4)
    return replace(pool, num_gpus=num_gpus, perf=perf, trainer=trainer, has_resident=False, keeps_trainer=True)


def plan_on(pool: PoolSnapshot, goal: Goal | None = None) -> RolloutPlan:
    return plan_fleet(pool, LONG[0].batch, exact(LONG[0].lengths), goal or Goal())


@pytest.mark.parametrize("num_gpus", [1, 3, 4, 6])
def test_sizes_wider_than_the_budget_are_left_out(num_gpus: int) -> None:
    pool = beside_a_trainer(num_gpus)
    assert options_for(pool).gpus.max() <= num_gpus
    chosen = plan_on(pool)
    assert 0 < sum(chosen.fleet) <= num_gpus and np.isfinite(chosen.predicted_step_s)


def test_a_budget_on_which_no_size_fits_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_sizes=4: no size fits on 3 GPUs"):
        plan_on(beside_a_trainer(3, (4, 8)))


@pytest.mark.parametrize(("slack_s", "why"), [(0.0, "none is as fast as static's"), (-5.0, "to catch up 5.0 s")])
def test_the_fastest_fleet_catches_up_only_what_was_lost(slack_s: float, why: str) -> None:
    pool = replace(plan(Goal())[1], has_resident=False)
    slow = replace(pool, trainer=replace(pool.trainer, times=replace(pool.trainer.times, wake_s=30.0)))
    assert plan_on(slow, Goal(is_notslower=True, slack_s=slack_s)).reason.startswith(f"elastic: the fastest: {why}, ")


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_a_weight_outside_0_and_1_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="cost_weight"):
        Goal(cost_weight=weight)


def test_a_second_is_worth_what_all_gpus_that_are_held_meanwhile_cost_by_the_weight_of_cost() -> None:
    pool = beside_a_trainer(8)  # 8 GPUs for replicas, 4 of the trainer
    assert time_price(pool, Goal(cost_weight=0.2)) == pytest.approx(4 * (8 + 4) + 4)
    assert time_price(cell(LONG).pool, Goal(cost_weight=0.2)) == pytest.approx(4 * 16)


def test_a_second_of_a_rollout_that_must_not_be_slower_is_dearer_than_of_one_that_may() -> None:
    default, hurried = plan(Goal())[0], plan(Goal(is_notslower=True))[0]
    assert hurried.price > default.price == time_price(cell(LONG).pool, Goal())


def test_what_is_as_fast_as_static_must_repay_the_transition_too() -> None:
    goals = [Goal(is_notslower=True, payback=payback) for payback in (1.0, 50.0)]
    assert [plan_on(plan(Goal())[1], goal).is_resident for goal in goals] == [False, True]


@pytest.mark.parametrize("weight", [0.5, 0.9])
def test_what_is_predicted_long_has_the_first_and_widest_replicas(weight: float) -> None:
    warm = plan(Goal())[1]
    chosen = plan_on(warm, Goal(cost_weight=weight))
    lengths = [float(LONG[0].lengths[chosen.replica_of == r].mean()) for r in range(len(chosen.fleet))]
    assert chosen.fleet[0] > chosen.fleet[-1] and lengths[0] > 2 * lengths[-1]
