"""A plan that starts engines for more than one rollout: what is parked afterwards wakes in the next ones.

A planner that counts a start against one rollout alone never grows a fleet of parked engines. Differs from RLHFless
(arXiv 2602.22718), where a function ends with its rollout.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from verl_rlhfless.policy.goal import Goal
from verl_rlhfless.policy.plan import plan_fleet
from verl_rlhfless.policy.prediction import Prediction
from verl_rlhfless.policy.snapshot import Batch, PoolSnapshot, RolloutPlan

ROLLOUTS = 8
"""Rollouts that an engine is expected to serve: fleets follow the lengths, which change slowly."""


def plan_parked_fleet(pool: PoolSnapshot, batch: Batch, prior: Prediction, goal: Goal) -> RolloutPlan:
    """Return the fleet with the least weighted time and cost when a start is shared by the rollouts that it serves.

    What the plan predicts is this step's whole time and cost. A deadline or a budget holds for each step, so nothing is
    shared then.

    Raises:
        ConfigError: The deadline or the budget cannot be met.
    """
    times = pool.trainer.times
    later_s = (1 - 1 / ROLLOUTS) * max(0.0, times.cold_start_s - times.wake_s)
    if goal.max_step_s is not None or goal.max_gpu_s is not None or not any(pool.warm.values()):
        return plan_fleet(pool, batch, prior, goal, can_fuse=False)
    shared = replace(times, cold_start_s=times.cold_start_s - later_s)
    plan = plan_fleet(replace(pool, trainer=replace(pool.trainer, times=shared)), batch, prior, goal, can_fuse=False)
    fresh = {tp: max(0, count - pool.warm.get(tp, 0) // tp) for tp, count in Counter(plan.fleet).items()}
    if not any(fresh.values()) or plan.predicted_rollout_s is None:
        return plan
    assert plan.predicted_step_s is not None and plan.predicted_gpu_s is not None
    leased = sum(plan.fleet)
    wait_s = later_s * sum(tp * count for tp, count in fresh.items()) / leased
    held = leased + (pool.trainer.num_gpus if pool.keeps_trainer else 0)
    return replace(
        plan,
        predicted_rollout_s=plan.predicted_rollout_s + wait_s,
        predicted_step_s=plan.predicted_step_s + wait_s,
        predicted_gpu_s=plan.predicted_gpu_s + wait_s * held,
        reason=f"{plan.reason}; {sum(fresh.values())} started now wake in later rollouts",
    )
