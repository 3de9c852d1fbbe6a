"""The planner: which fleet a step's rollout starts with, elastic or on the trainer's own lease.

Minimises ``(1 - cost_weight) * T / T_ref + cost_weight * C / C_ref`` over the candidates of ``fleets``, where
``T_ref`` and ``C_ref`` are the predicted step time and GPU-seconds of the best uniform static fleet on the same
budget. Differs from RLHFless (arXiv 2602.22718, actor scaling): tensor-parallel sizes may differ between replicas and
change as samples finish, and grants, starts, loads, the trainer's suspension and fused inference are priced.

Invariants: never more GPUs than the budget; elastic only when the predicted gain repays the transition; every
decision has a reason.
"""

from __future__ import annotations

import numpy as np

from verl_rlhfless.policy.dispatch import longest_first
from verl_rlhfless.policy.fleets import Candidate, LaneFleet, elastic_fleets
from verl_rlhfless.policy.goal import Goal, infeasible, too_few, too_wide
from verl_rlhfless.policy.lane_placement import place_lanes
from verl_rlhfless.policy.prediction import Prediction
from verl_rlhfless.policy.snapshot import Batch, PoolSnapshot, RolloutPlan
from verl_rlhfless.policy.stages import Options, options_for
from verl_rlhfless.policy.step_costs import Reference, StepCosts, static_counts, static_gpus
from verl_rlhfless.policy.units import Units

__all__ = ["Goal", "plan_fleet", "static_steps_s", "time_price"]

_HURRY = 3.0
"""Price of time during a rollout that must not be slower, as a multiple: a change must save much for what it slows."""

_TIE = 0.002
"""Objectives this close are equal as far as a prediction can tell: the faster fleet is taken."""

_LEAST_WEIGHT = 1e-6
"""Least weight of cost, so that a second is worth finitely many GPU-seconds."""


def time_price(pool: PoolSnapshot, goal: Goal) -> float:
    """Return how many GPU-seconds one second is worth.

    The objective is ``(1 - w) * T / T_ref + w * C / C_ref``, so that a second weighs as much as
    ``(1 - w) / w * C_ref / T_ref`` GPU-seconds, and a static fleet leases its GPUs all the time: ``C_ref / T_ref`` is
    their number. A trainer that keeps its lease beside the replicas costs its own GPUs in every second, too.
    """
    weight = max(goal.cost_weight, _LEAST_WEIGHT)
    held = pool.trainer.num_gpus if pool.keeps_trainer else 0
    return (1 - weight) / weight * (static_gpus(pool) + held) + held


def static_steps_s(pool: PoolSnapshot, batch: Batch, prior: Prediction) -> dict[int, float]:
    """Return the predicted seconds of a step of each uniform static fleet: tensor-parallel size -> seconds."""
    costs = StepCosts.of(pool, Units.build(batch, prior), can_fuse=False)
    return {fleet.tp: fleet.step_s for fleet in costs.static_fleets(_options(pool, Goal()))}


def plan_fleet(
    pool: PoolSnapshot, batch: Batch, prior: Prediction, goal: Goal, *, can_fuse: bool = True
) -> RolloutPlan:
    """Return the fleet with the least weighted time and cost for the predicted lengths.

    Raises:
        ConfigError: The deadline or the budget cannot be met, the message says what could be; or no size fits.
    """
    options = _options(pool, goal)
    units = Units.build(batch, prior)
    costs = StepCosts.of(pool, units, can_fuse=can_fuse)
    ref, price = costs.static_reference(options), time_price(pool, goal)
    resident = _resident_fleets(options, costs, ref, goal) if pool.has_resident else []
    transition_gpu_s = 0.0 if pool.keeps_trainer else costs.transition_s * pool.trainer.num_gpus
    chosen, why = _choose([*resident, *elastic_fleets(options, costs, goal, price)], (ref, transition_gpu_s), goal)
    if chosen.is_resident:
        reason = f"resident TP{chosen.fleet[0]}: {why}; saving 0"
    else:
        saved = 1 - chosen.gpu_s / ref.gpu_s
        amount = f"{abs(saved):.0%} {'less' if saved >= 0 else 'more'}"
        reason = f"elastic: {why}, {amount} GPU time than static TP{ref.tp}"
    return RolloutPlan(
        fleet=chosen.fleet,
        replica_of=place_lanes(pool, batch, chosen, (units, prior)),
        order=longest_first(np.arange(batch.num_samples), prior.mu),
        is_resident=chosen.is_resident,
        is_static=chosen.is_resident,
        price=_HURRY * price if goal.is_notslower else price,
        predicted_step_s=chosen.step_s,
        predicted_gpu_s=chosen.gpu_s,
        predicted_rollout_s=None
        if chosen.is_resident and not pool.shares_engines
        else costs.rollout_s(chosen.step_s / goal.caution, is_shared=chosen.is_resident),
        static_step_s=ref.step_s,
        objective=goal.objective(chosen.step_s / ref.step_s, chosen.gpu_s / ref.gpu_s),
        reason=reason,
    )


def _options(pool: PoolSnapshot, goal: Goal) -> Options:
    """Return what a lane may run on: the static fleets and the asked numbers of replicas among them.

    Raises:
        ConfigError: No size fits on a node.
    """
    static = static_counts(pool)
    if not static:
        raise too_wide(min(pool.perf), static_gpus(pool), pool.gpus_per_node)
    has_own = pool.has_resident and not pool.shares_engines
    limits = set() if has_own else {goal.min_replicas, goal.max_replicas or goal.min_replicas}
    asked = [(tp, count) for tp in pool.perf for count in limits if tp * count <= pool.num_gpus]
    return options_for(pool, (*static.items(), *asked))


def _resident_fleets(options: Options, costs: StepCosts, ref: Reference, goal: Goal) -> list[Candidate]:
    """Return what a step may run on without leasing: stock's static fleet, or sleeping engines that fit on its GPUs."""
    pool, num_units = costs.pool, len(costs.units.order)
    if not pool.shares_engines:
        static = LaneFleet(num_units, ref.tp, pool.trainer.num_gpus // ref.tp)
        return [Candidate((static,), ref.step_s, ref.gpu_s, is_resident=True)]
    return [
        Candidate((LaneFleet(num_units, tp, count),), step_s, step_s * pool.trainer.num_gpus, is_resident=True)
        for tp, count, step_s in zip(
            options.tp.tolist(), options.count.tolist(), costs.shared_step_s(options).tolist(), strict=True
        )
        if np.isfinite(step_s) and goal.min_replicas <= count <= (goal.max_replicas or pool.num_gpus)
    ]


def _choose(candidates: list[Candidate], static: tuple[Reference, float], goal: Goal) -> tuple[Candidate, str]:
    """Return the best candidate and why; ``static`` holds the reference and the GPU-seconds of leaving it."""
    if not candidates:
        raise too_few(goal)
    allowed = [c for c in candidates if goal.allows(c.step_s, c.gpu_s)]
    if not allowed:
        raise infeasible(goal, [(c.step_s, c.gpu_s) for c in candidates])
    return (_choose_notslower if goal.is_notslower else _choose_weighted)(allowed, static, goal)


def _choose_notslower(allowed: list[Candidate], static: tuple[Reference, float], goal: Goal) -> tuple[Candidate, str]:
    """Return the cheapest candidate that is as fast as the static fleet and repays leaving it, else the fastest."""
    ref, transition_gpu_s = static
    limit_s = ref.step_s + goal.slack_s
    paying = [c for c in allowed if c.is_resident or c.gpu_s <= ref.gpu_s - goal.payback * transition_gpu_s]
    best = min((c for c in paying if c.step_s <= limit_s), key=lambda c: (c.gpu_s, c.step_s), default=None)
    if best is None:
        fastest = min(paying or allowed, key=lambda c: (c.step_s, c.gpu_s))
        why = f"to catch up {-goal.slack_s:.1f} s" if goal.slack_s < 0 else "none is as fast as static's"
        return fastest, f"the fastest: {why}"
    return best, "least cost with a step no longer than static's"


def _choose_weighted(allowed: list[Candidate], static: tuple[Reference, float], goal: Goal) -> tuple[Candidate, str]:
    """Return the candidate with the least objective; the best resident one if an elastic one does not repay leaving."""
    ref, transition_gpu_s = static

    def objective(c: Candidate) -> float:
        return goal.objective(c.step_s / ref.step_s, c.gpu_s / ref.gpu_s)

    least = min(objective(c) for c in allowed)
    ties = [c for c in allowed if objective(c) <= least * (1 + _TIE)]
    best = min(ties, key=lambda c: (round(c.step_s, 3), c.gpu_s))  # a millisecond is no time that GPUs may cost
    resident = min((c for c in allowed if c.is_resident), key=objective, default=None)
    if resident is not None and not best.is_resident:
        gain = (objective(resident) - objective(best)) * ref.gpu_s / max(goal.cost_weight, _LEAST_WEIGHT)
        if gain < goal.payback * transition_gpu_s:
            needed = f"{goal.payback:.1f} x {transition_gpu_s:.0f} of transition"
            return resident, f"a gain worth {gain:.0f} GPU s does not repay {needed}"
    why = "no elastic fleet is better" if best.is_resident else f"objective {objective(best):.2f} against 1.00"
    return best, why
