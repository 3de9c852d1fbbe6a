"""The planner: which fleet a step's rollout starts with, elastic or on the trainer's own lease.

Minimises ``(1 - cost_weight) * T / T_ref + cost_weight * C / C_ref`` over the candidates of ``fleets``, where
``T_ref`` and ``C_ref`` are the predicted step time and GPU-seconds of the best uniform static fleet on the same
budget. Differs from RLHFless (arXiv 2602.22718, actor scaling): tensor-parallel sizes may differ between replicas and
change as samples finish, and grants, starts, loads, the trainer's suspension and fused inference are priced.

Invariants: never more GPUs than the budget; elastic only when the predicted gain repays the transition; every
decision has a reason.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from verl_rlhfless.policy.affinity import affine_groups
from verl_rlhfless.policy.dispatch import least_requests, longest_first
from verl_rlhfless.policy.fleets import Candidate, LaneFleet, elastic_fleets
from verl_rlhfless.policy.goal import Goal, infeasible, too_few, too_wide
from verl_rlhfless.policy.predict import Prediction
from verl_rlhfless.policy.snapshot import Batch, FloatArray, IntArray, PoolSnapshot, RolloutPlan
from verl_rlhfless.policy.stages import Options, options_for, rank_share
from verl_rlhfless.policy.step_costs import Reference, StepCosts, static_fleets, static_gpus
from verl_rlhfless.policy.units import Units

__all__ = ["Goal", "plan_fleet", "static_step_s", "time_price"]

_HURRY = 3.0
"""Price of time during a rollout that must not be slower, as a multiple: a change must save much for what it slows."""

_TIE = 0.007
"""Objectives this close are equal as far as a prediction can tell: the faster fleet is taken."""


def time_price(pool: PoolSnapshot, goal: Goal) -> float:
    """Return how many GPU-seconds one second is worth.

    ``(1 - w) / w * C_ref / T_ref``, and a static fleet costs the budget. A trainer that keeps its lease costs as long.
    """
    weight = max(goal.cost_weight, 1e-6)
    held = pool.trainer.num_gpus if pool.keeps_trainer else 0
    return (1 - weight) / weight * (static_gpus(pool) + held) + held


def static_step_s(pool: PoolSnapshot, batch: Batch, prior: Prediction) -> float:
    """Return the predicted seconds of a step of the best uniform static fleet."""
    costs = StepCosts.of(pool, Units.build(batch, prior), can_fuse=False)
    return costs.static_reference(_options(pool, Goal())).step_s


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
        replica_of=_place(pool, batch, chosen, (units, prior)),
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
    static = static_fleets(pool)
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
    ref, transition_gpu_s = static

    def objective(c: Candidate) -> float:
        return goal.objective(c.step_s / ref.step_s, c.gpu_s / ref.gpu_s)

    if not candidates:
        raise too_few(goal)
    allowed = [c for c in candidates if goal.allows(c.step_s, c.gpu_s)]
    if not allowed:
        raise infeasible(goal, [(c.step_s, c.gpu_s) for c in candidates])
    if goal.is_notslower:
        limit_s = ref.step_s + goal.slack_s
        paying = [c for c in allowed if c.is_resident or c.gpu_s <= ref.gpu_s - goal.payback * transition_gpu_s]
        best = min((c for c in paying if c.step_s <= limit_s), key=lambda c: (c.gpu_s, c.step_s), default=None)
        if best is None:
            fastest = min(paying or allowed, key=lambda c: (c.step_s, c.gpu_s))
            why = f"to catch up {-goal.slack_s:.1f} s" if goal.slack_s < 0 else "none is as fast as static's"
            return fastest, f"the fastest: {why}"
        return best, "least cost with a step no longer than static's"
    least = min(objective(c) for c in allowed)
    ties = [c for c in allowed if objective(c) <= least * (1 + _TIE)]
    best = min(ties, key=lambda c: (round(c.step_s, 3), c.gpu_s))  # a millisecond is no time that GPUs may cost
    resident = min((c for c in allowed if c.is_resident), key=objective, default=None)
    if resident is not None and not best.is_resident:
        gain = (objective(resident) - objective(best)) * ref.gpu_s / max(goal.cost_weight, 1e-6)
        if gain < goal.payback * transition_gpu_s:
            needed = f"{goal.payback:.1f} x {transition_gpu_s:.0f} of transition"
            return resident, f"a gain worth {gain:.0f} GPU s does not repay {needed}"
    why = "no elastic fleet is better" if best.is_resident else f"objective {objective(best):.2f} against 1.00"
    return best, why


def _place(pool: PoolSnapshot, batch: Batch, chosen: Candidate, outlook: tuple[Units, Prediction]) -> IntArray:
    """Return the replica of each sample: groups stay together, lanes apart, load evened out in a lane.

    On a resident fleet nobody gains from replicas that end early, and groups are split where that evens out enough.
    """
    (units, prior), count = outlook, len(chosen.fleet)
    if batch.num_samples <= count:
        return least_requests(batch, count)
    load = units.mean[units.unit_of]
    rank = np.empty(len(units.order), dtype=np.int64)
    rank[units.order] = np.arange(len(units.order))
    replica_of = np.empty(batch.num_samples, dtype=np.int64)
    replica = unit = 0
    for lane in chosen.lanes:
        mask = (rank[units.unit_of] >= unit) & (rank[units.unit_of] < unit + lane.num_units)
        part = _subset(batch, mask)
        slots = pool.perf[lane.tp].limits.max_num_seqs
        if part.num_samples > lane.count * slots and not chosen.is_resident:  # some queue, and an early end saves
            rows = units.order[unit : unit + lane.num_units]
            ranked = rank_share(units.mu[rows], units.sigma[rows])
            replica_of[mask] = replica + fill_slots(load[mask], (lane.count, slots), ranked)
        else:
            worth, more = _prefill_load(pool, lane, part, load[mask])
            if chosen.is_resident:
                part = _split_groups(part, _num_pieces(part, load[mask], (lane.count, more), _unknown(prior)))
            replica_of[mask] = replica + affine_groups(part, load[mask], lane.count, worth)
        replica, unit = replica + lane.count, unit + lane.num_units
    return replica_of


def fill_slots(load: FloatArray, fleet: tuple[int, int], ranked: float) -> IntArray:
    """Return the replica of each sample where samples queue: the first ones are filled, so that the others end early.

    Longest first, each to the first replica with a slot on which it ends in time, else to the slot that is free first.
    In time is when the last sample ends if all go to the slot that is free first; sooner as far as lengths are not
    known, which evens load out; a thousandth is no delay. Siblings are alike, so that most of them stay together.

    Args:
        load: [B] predicted tokens of each sample.
        fleet: Equal replicas, and samples that each runs at once.
        ranked: How well the samples are known apart (``rank_share``).
    """
    num_replicas, slots = fleet
    order, replica_of = longest_first(np.arange(len(load)), load).tolist(), np.empty(len(load), dtype=np.int64)
    in_time = 0.0
    for _ in range(2):
        ends = [[0.0] * slots for _ in range(num_replicas)]
        free, used = np.zeros(num_replicas), [0.0] * num_replicas
        next_free = [(0.0, 0.0, replica) for replica in range(num_replicas)]  # what came since makes entries stale
        for sample in order:
            tokens = float(load[sample])
            fits = free + tokens <= in_time * (1 + 1e-3)
            replica = int(fits.argmax())
            if not fits[replica]:
                while next_free[0][:2] != (ends[next_free[0][2]][0], used[next_free[0][2]]):
                    heapq.heappop(next_free)
                replica = next_free[0][2]
            heapq.heapreplace(ends[replica], ends[replica][0] + tokens)
            used[replica] += tokens
            free[replica] = ends[replica][0]
            heapq.heappush(next_free, (ends[replica][0], used[replica], replica))
            replica_of[sample] = replica
        in_time = ranked * max(map(max, ends))
    return replica_of


def _unknown(prior: Prediction) -> float:
    """Return the standard deviation, over the mean, of what nobody knows of a prompt's lengths."""
    return math.sqrt(math.expm1(min(prior.in_common * float(np.mean(prior.sigma * prior.sigma)), 4.0)))


def _num_pieces(batch: Batch, load: FloatArray, fleet: tuple[int, float], unknown: float) -> int:
    """Return into how many pieces groups are split so that what is computed twice and uneven work are least.

    The work of ``G`` groups of ``L`` tokens, each in ``p`` pieces on ``R`` replicas, differs between these by a
    standard deviation of ``unknown * L * sqrt(G / R * (1 / p - 1 / R))``.

    Args:
        batch: The prompts.
        load: [B] predicted tokens of each sample.
        fleet: Equal replicas, and the tokens more that decode in the time of one prompt token.
        unknown: Standard deviation of a group's work that no prediction tells, over its mean.
    """
    (num_replicas, prefill_load), groups = fleet, np.bincount(batch.group_of)
    prompts = float((batch.prompt_tokens / groups[batch.group_of]).sum())
    squares = float((np.bincount(batch.group_of, weights=load) ** 2).sum())
    pieces = np.arange(1, max(2, min(num_replicas, int(groups.max())) + 1))
    again = (pieces - 1) * prefill_load * prompts / num_replicas
    uneven = unknown * np.sqrt(squares / num_replicas * np.maximum(1 / pieces - 1 / num_replicas, 0.0))
    return int(pieces[np.argmin(again + uneven)])


def _split_groups(batch: Batch, pieces: int) -> Batch:
    """Return the batch with every group as up to ``pieces`` groups of nearly equal size."""
    if pieces == 1:
        return batch
    order = np.argsort(batch.group_of, kind="stable")
    sizes = np.bincount(batch.group_of)
    within = np.empty(batch.num_samples, dtype=np.int64)
    within[order] = np.arange(batch.num_samples) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    piece = within * np.minimum(pieces, sizes)[batch.group_of] // sizes[batch.group_of]
    kept, group_of = np.unique(batch.group_of * pieces + piece, return_inverse=True)
    of = (kept // pieces).tolist()
    return replace(
        batch,
        prompt_ids=tuple(f"{batch.prompt_ids[g]} {part}" for g, part in zip(of, (kept % pieces).tolist(), strict=True)),
        group_of=group_of.astype(np.int64),
        prefixes=tuple(batch.prefixes[g] for g in of) if batch.prefixes else (),
    )


def _prefill_load(pool: PoolSnapshot, lane: LaneFleet, batch: Batch, load: FloatArray) -> tuple[float, float]:
    """Return how many tokens decode on one of a lane's replicas in the time that it needs for one prompt token.

    The second figure is that of tokens more, beside those that decode anyway: what an iteration takes whatever its
    size does not count.
    """
    perf, running = pool.perf[lane.tp], batch.num_samples / lane.count
    context = np.array(float((batch.prompt_tokens + load / 2).mean()))
    now_s, more_s = perf.fluid_iteration_s(np.array([running, running + 1]), context).tolist()
    return perf.prefill_s_per_token * running / now_s, perf.prefill_s_per_token / (more_s - now_s)


def _subset(batch: Batch, mask: NDArray[np.bool_]) -> Batch:
    names, group_of = np.unique(batch.group_of[mask], return_inverse=True)
    ids = tuple(batch.prompt_ids[g] for g in names.tolist())
    prefixes = tuple(batch.prefixes[g] for g in names.tolist()) if batch.prefixes else ()
    return replace(
        batch,
        prompt_ids=ids,
        group_of=group_of.astype(np.int64),
        prompt_tokens=batch.prompt_tokens[mask],
        prefixes=prefixes,
    )
