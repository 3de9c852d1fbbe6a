"""What a plan is to achieve: the weight of cost against time, and limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl_rlhfless.errors import ConfigError

_KEY = "rlhfless.planner"


@dataclass(frozen=True, slots=True)
class Goal:
    """What to optimise.

    Attributes:
        cost_weight: 0 = only time, 1 = only cost.
        max_step_s: Deadline of a step.
        max_gpu_s: Budget of a step in GPU-seconds.
        is_notslower: Least cost with a step no longer than the best static fleet's; ``cost_weight`` does not count.
        slack_s: With ``is_notslower``, seconds by which the step may still be longer because earlier ones were shorter;
            negative where earlier ones were longer.
        caution: Factor by which elastic steps were longer than predicted, compared with static ones.
        hysteresis: Least relative gain for which a change during the rollout is worth it.
        payback: The gain of elasticity must be at least this many times what suspending and resuming the trainer costs.
        min_replicas / max_replicas: Limits of an elastic fleet at its start.
        usd_per_gpu_s: Price with which a refused budget is told in money; ``None`` = told in GPU-seconds.
    """

    cost_weight: float = 0.5
    max_step_s: float | None = None
    max_gpu_s: float | None = None
    is_notslower: bool = False
    slack_s: float = 0.0
    caution: float = 1.0
    hysteresis: float = 0.02
    payback: float = 1.0
    min_replicas: int = 1
    max_replicas: int | None = None
    usd_per_gpu_s: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.cost_weight <= 1.0:
            raise ConfigError(f"{_KEY}.cost_weight", self.cost_weight, "must be from 0 to 1", "Use 0.5 for both.")
        most = self.max_replicas
        if self.min_replicas < 1 or (most is not None and most < self.min_replicas):
            rule = f"must be >= 1 and at most {_KEY}.max_replicas={most}"
            raise ConfigError(f"{_KEY}.min_replicas", self.min_replicas, rule, "Correct one of the two.")

    def allows(self, step_s: float, gpu_s: float) -> bool:
        """Return whether a step meets deadline and budget."""
        in_time = self.max_step_s is None or step_s <= self.max_step_s
        return in_time and (self.max_gpu_s is None or gpu_s <= self.max_gpu_s)

    def objective(self, relative_s: float, relative_gpu_s: float) -> float:
        """Return the weighted sum of time and cost, each relative to the best static fleet's."""
        return (1 - self.cost_weight) * relative_s + self.cost_weight * relative_gpu_s


def infeasible(goal: Goal, choices: Sequence[tuple[float, float]]) -> ConfigError:
    """Return the error for a deadline or a budget that none of ``choices``, (step_s, gpu_s), meets."""
    fastest, cheapest = min(step_s for step_s, _ in choices), min(gpu_s for _, gpu_s in choices)
    deadline, budget = goal.max_step_s, goal.max_gpu_s
    if deadline is not None and fastest > deadline:
        return ConfigError(
            f"{_KEY}.max_step_s",
            deadline,
            "no fleet on this budget of GPUs is that fast",
            f"Feasible: {fastest:.1f} s.",
        )
    if budget is not None and cheapest > budget:
        told = _money(goal, budget)
        rule = "no fleet costs that little"
        return ConfigError(f"{_KEY}.max_usd_per_step", told, rule, f"Feasible: {_money(goal, cheapest)}.")
    least = min(gpu_s for step_s, gpu_s in choices if deadline is None or step_s <= deadline)
    rule = "no fleet meets the deadline within the budget"
    return ConfigError(f"{_KEY}.max_step_s", deadline, rule, f"Within it the least is {_money(goal, least)}.")


def too_few(goal: Goal) -> ConfigError:
    """Return the error for limits on replicas that no fleet on the budget meets."""
    rule = f"no fleet on this budget of GPUs has that many and at most {_KEY}.max_replicas={goal.max_replicas}"
    return ConfigError(f"{_KEY}.min_replicas", goal.min_replicas, rule, "Lower it, or raise rlhfless.pool.max_gpus.")


def too_wide(tp: int, num_gpus: int, gpus_per_node: int) -> ConfigError:
    """Return the error for tensor-parallel sizes of which even the least, ``tp``, does not fit."""
    rule = f"no size fits on {num_gpus} GPUs in nodes of {gpus_per_node}: the least is {tp}"
    action = "Allow a smaller one, or raise rlhfless.pool.max_gpus."
    return ConfigError(f"{_KEY}.tensor_parallel_sizes", tp, rule, action)


def _money(goal: Goal, gpu_s: float) -> str:
    if goal.usd_per_gpu_s is None:
        return f"{gpu_s:.0f} GPU-seconds"
    return f"{gpu_s * goal.usd_per_gpu_s:.4f} USD ({gpu_s:.0f} GPU-seconds)"
