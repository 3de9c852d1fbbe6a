"""The planner of live runs: each step's fleet from predicted lengths, and from what earlier steps really took."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.live.announcement import Announcement
from verl_rlhfless.live.routing_settings import RoutingSettings
from verl_rlhfless.live.speed import SpeedMeter
from verl_rlhfless.policy.goal import Goal
from verl_rlhfless.policy.invest import plan_parked_fleet
from verl_rlhfless.policy.learnt import CostModel, Standby, StepTimes, apply, learn_speed, learn_step
from verl_rlhfless.policy.plan import plan_fleet
from verl_rlhfless.policy.predict import LengthModel
from verl_rlhfless.policy.prediction import Prediction
from verl_rlhfless.policy.snapshot import Batch, IntArray, PoolSnapshot, RolloutPlan
from verl_rlhfless.types import FleetDecision, Forecast, ReplicaSpec

logger = logging.getLogger(__name__)

_LOSSES = 3
"""Plans in a row that expect to lose against verl's own replicas, after which the user is told."""


class LivePlanner:
    """Plans, and learns what plans should count with.

    Attributes:
        routing: The run's settings.
        costs: What was measured so far.
        speed: Measures the engines while they run.
        next: The plan of the step that is announced next, and the pool that it was made for.
    """

    def __init__(self, routing: RoutingSettings, costs: CostModel) -> None:
        self.routing = routing
        self.costs, self.speed = costs, SpeedMeter()
        self.next: tuple[RolloutPlan, PoolSnapshot] | None = None
        self._has_planned = False
        self._num_losses = 0

    def plan(self, announced: Announcement, lengths: LengthModel, standby: Standby) -> FleetDecision:
        """Return the fleet for a step.

        The first plan of a run refuses limits that no fleet meets; later ones come as near as they can and say so.

        Args:
            announced: The step.
            lengths: What is known of response lengths.
            standby: What waits for a replica.

        Raises:
            ConfigError: No fleet meets the deadline or the budget.
        """
        pool, batch = apply(self.costs, self.routing.planning_pool(), standby), announced.batch()
        prediction = self.routing.arm(announced, ()).predict(lengths, batch)
        goal = self.routing.goal()
        try:
            plan = self._plan_fleet(pool, batch, prediction, goal)
        except ConfigError as error:
            if not self._has_planned:
                raise
            logger.warning("rlhfless: step %d: %s", announced.step, error)
            weight = 1.0 if goal.max_step_s is None else 0.0
            nearest = replace(goal, max_step_s=None, max_gpu_s=None, cost_weight=weight)
            plan = self._plan_fleet(pool, batch, prediction, nearest)
            plan = replace(plan, reason=f"{plan.reason}; the nearest to a limit that can't be met: {error}")
        if lengths.level is not None:  # a plan without history says little
            self._count_losses(plan, announced.step, may_share=pool.has_resident)
        # during the rollout a further replica would find no warm server: the fleet has taken them
        self._has_planned, self.next = True, (plan, replace(pool, warm={}))
        return _decision(plan, announced.step)

    def _plan_fleet(self, pool: PoolSnapshot, batch: Batch, prediction: Prediction, goal: Goal) -> RolloutPlan:
        if self.routing.config.pool.park == "never":
            return plan_fleet(pool, batch, prediction, goal, can_fuse=False)
        return plan_parked_fleet(pool, batch, prediction, goal)

    def _count_losses(self, plan: RolloutPlan, step: int, *, may_share: bool) -> None:
        """Tell the user, once a run of losses, that leases don't pay.

        Not where the plan had the choice to share the trainer's GPUs, nor where the trainer stays: it has no other.
        """
        assert plan.objective is not None
        loses = plan.objective > 1 and not self.routing.keeps_trainer and not may_share
        self._num_losses = self._num_losses + 1 if loses else 0
        if self._num_losses == _LOSSES:
            logger.warning(
                "rlhfless: step %d: the last %d plans expect leased replicas to lose against verl's own (time and cost "
                "weighted: %.2f against 1.00). +rlhfless=resident keeps verl's replicas, with our routing.",
                step,
                _LOSSES,
                plan.objective,
            )

    async def learn(self, done: tuple[Batch, IntArray], times: StepTimes) -> None:
        """Take what a step took; ``done`` holds its prompts and lengths."""
        declared = self.routing.planning_pool()
        self.costs = learn_step(self.costs, declared, done, times)
        self.costs = await asyncio.to_thread(learn_speed, self.costs, declared.perf, self.speed.samples)


def _decision(plan: RolloutPlan, step: int) -> FleetDecision:
    """Return the decision that a plan is, with what it expects."""
    rollout_s, step_s = plan.predicted_rollout_s, plan.predicted_step_s
    gpu_s, static_step_s = plan.predicted_gpu_s, plan.static_step_s
    assert rollout_s is not None and step_s is not None and gpu_s is not None and static_step_s is not None
    forecast = Forecast(rollout_s, step_s, gpu_s, static_step_s)
    return FleetDecision(step, tuple(ReplicaSpec(tp) for tp in plan.fleet), plan.reason, forecast, plan.is_resident)
