"""The planner: which fleet a step's rollout starts with, elastic or on the trainer's own lease.

Minimises ``(1 - cost_weight) * T / T_ref + cost_weight * C / C_ref`` over one lane or two (samples predicted long on
their own, usually wider replicas), each with staged shrinking and growing ahead (``stages``). ``T_ref`` and ``C_ref``
are the predicted step time and GPU-seconds of the best uniform static fleet on the same budget. Differs from RLHFless
(arXiv 2602.22718, actor scaling): tensor-parallel sizes may differ between replicas and change as samples finish, and
grants, starts, loads and the trainer's suspension are priced.

Invariants: never more GPUs than the budget; elastic only when the predicted gain repays the transition; every
decision has a reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.policy.dispatch import balanced_groups, least_requests, longest_first
from verl_rlhfless.policy.predict import Prediction
from verl_rlhfless.policy.snapshot import Batch, FloatArray, IntArray, PoolSnapshot, RolloutPlan
from verl_rlhfless.policy.stages import Frontier, Lane, Options, depth_edges, frontier, options_for, stay

LONG_SHARES = (0.01, 0.05, 0.2)
"""Shares of the groups (or samples), longest predicted first, that may get a lane of their own."""

_HURRY = 12.0
"""Price of time during a rollout that must not be slower, as a multiple: only changes that cost next to no time pay."""

_TIE = 0.007
"""Objectives this close are equal as far as a prediction can tell: the faster fleet is taken."""

_PRICE_FACTORS = np.array([0.0, 0.25, 1.0, 2.0, 12.0])


@dataclass(frozen=True, slots=True)
class Goal:
    """What to optimise.

    Attributes:
        cost_weight: 0 = only time, 1 = only cost.
        max_step_s: Deadline of a step.
        max_gpu_s: Budget of a step in GPU-seconds.
        is_notslower: Least cost with a step no longer than the best static fleet's.
        hysteresis: Least relative gain for which a change during the rollout is worth it.
        payback: The gain of elasticity must be at least this many times what suspending and resuming the trainer costs.
        can_split: Whether samples predicted long may get their own lane.
    """

    cost_weight: float = 0.5
    max_step_s: float | None = None
    max_gpu_s: float | None = None
    is_notslower: bool = False
    hysteresis: float = 0.02
    payback: float = 1.0
    can_split: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.cost_weight <= 1.0:
            raise ConfigError(
                "rlhfless.planner.cost_weight", self.cost_weight, "must be from 0 to 1", "Use 0.5 for both."
            )


@dataclass(frozen=True, slots=True)
class _Candidate:
    fleet: tuple[int, ...]
    num_long: int
    long_share: float
    step_s: float
    gpu_s: float
    is_resident: bool
    price: float


@dataclass(frozen=True)
class Reference:
    """The best uniform static fleet: its size, predicted step seconds and GPU-seconds, and what leaving it costs."""

    tp: int
    step_s: float
    gpu_s: float
    transition_gpu_s: float


def time_price(pool: PoolSnapshot, goal: Goal) -> float:
    """Return how many GPU-seconds one second is worth.

    ``(1 - w) / w * C_ref / T_ref``, and a static fleet costs the budget.
    """
    weight = max(goal.cost_weight, 1e-6)
    return (1 - weight) / weight * pool.trainer.num_gpus


def plan_fleet(pool: PoolSnapshot, batch: Batch, prior: Prediction, goal: Goal) -> RolloutPlan:
    """Return the fleet with the least weighted time and cost for the predicted lengths.

    Raises:
        ConfigError: The deadline or the budget cannot be met; the message says what could be.
    """
    options = options_for(pool, tuple((tp, pool.trainer.num_gpus // tp) for tp in pool.perf))
    units = _Units.build(batch, prior)
    ref = static_reference(pool, options, units, batch, prior)
    price = time_price(pool, goal)
    candidates = [_Candidate((ref.tp,) * (pool.trainer.num_gpus // ref.tp), 0, 0.0, ref.step_s, ref.gpu_s, True, price)]
    candidates += _elastic(pool, options, units, (batch, prior, goal))
    chosen, why = _choose(candidates, ref, goal)
    if chosen.is_resident:
        replica_of = _place(batch, prior, chosen, units, pool)
        reason = f"resident TP{ref.tp}: {why}; saving 0"
    else:
        replica_of = _place(batch, prior, chosen, units, pool)
        reason = f"elastic: {why}, {1 - chosen.gpu_s / ref.gpu_s:.0%} less GPU time than static TP{ref.tp}"
    return RolloutPlan(
        fleet=chosen.fleet,
        replica_of=replica_of,
        order=longest_first(np.arange(batch.num_samples), prior.mu),
        is_resident=chosen.is_resident,
        is_static=chosen.is_resident,
        price=_HURRY * price if goal.is_notslower else price,
        predicted_step_s=chosen.step_s,
        predicted_gpu_s=chosen.gpu_s,
        reason=reason,
    )


@dataclass(frozen=True, slots=True)
class _Units:
    """What is planned as a whole: a group while its siblings look alike, else each sample.

    ``order`` is longest predicted first.
    """

    size: IntArray
    prompt: FloatArray
    group: IntArray
    unit_of: IntArray
    order: IntArray
    edges: FloatArray
    alive: FloatArray

    @classmethod
    def build(cls, batch: Batch, prior: Prediction) -> _Units:
        _, first, group, size = np.unique(batch.group_of, return_index=True, return_inverse=True, return_counts=True)
        if not np.array_equal(prior.mu[first][group], prior.mu):
            first = unit_of = np.arange(batch.num_samples)
            size = np.ones(batch.num_samples, dtype=np.int64)
        else:
            unit_of = group
        order = np.lexsort((first, -(prior.mu[first] + prior.sigma[first])))
        edges = depth_edges(prior.cap)
        alive = replace(prior, mu=prior.mu[first], sigma=prior.sigma[first]).alive_at((edges[1:] + edges[:-1]) / 2)
        prompt = batch.prompt_tokens[first].astype(float)
        return cls(size, prompt, batch.group_of[first], unit_of, order, edges, alive * size[:, None])

    def longest(self, share: float) -> int:
        """Return how many units are the longest ``share`` of all, at least one."""
        return max(1, round(share * len(self.order)))

    def lane(self, rows: IntArray) -> Lane:
        """Return the population of some units; a prompt is prefilled once."""
        count = float(self.size[rows].sum())
        context = float((self.size[rows] * self.prompt[rows]).sum()) / max(count, 1.0)
        _, once = np.unique(self.group[rows], return_index=True)
        return Lane(self.edges, self.alive[rows].sum(axis=0), context, float(self.prompt[rows][once].sum()))


def static_reference(pool: PoolSnapshot, options: Options, units: _Units, batch: Batch, prior: Prediction) -> Reference:
    """Return the best uniform static fleet on the trainer's GPUs, stock's way (hybrid wake, reshard, sleep)."""
    trainer, times = pool.trainer, pool.trainer.times
    time_s, _ = stay(pool, options, units.lane(units.order))
    after_s = _phases_s(pool, batch, prior)
    best: Reference | None = None
    for tp in sorted(pool.perf):
        rollout = float(time_s[options.index(tp, trainer.num_gpus // tp)])
        wake = times.hybrid_wake_s if tp in pool.warm or not pool.warm else times.cold_start_s
        step_s = wake + trainer.reshard_s + rollout + times.hybrid_sleep_s + after_s
        if best is None or step_s < best.step_s:
            best = Reference(tp, step_s, step_s * trainer.num_gpus, _transition_s(pool) * trainer.num_gpus)
    assert best is not None
    return best


def _transition_s(pool: PoolSnapshot) -> float:
    """Return the leased seconds to publish the weights and to suspend and resume the trainer."""
    trainer = pool.trainer
    return trainer.publish_s + 2 * trainer.state_copy_s + trainer.times.resume_s


def _phases_s(pool: PoolSnapshot, batch: Batch, prior: Prediction) -> float:
    tokens = float(batch.prompt_tokens.sum() + prior.mean().sum())
    context = tokens / batch.num_samples
    return pool.trainer.inference_s(tokens, context) + pool.trainer.update_s(tokens, context)


def _elastic(
    pool: PoolSnapshot, options: Options, units: _Units, request: tuple[Batch, Prediction, Goal]
) -> list[_Candidate]:
    batch, prior, goal = request
    trainer, times = pool.trainer, pool.trainer.times
    after_s = _phases_s(pool, batch, prior)
    fixed_s = _transition_s(pool) + times.grant_s + times.park_s + times.grant_s + after_s
    fixed_g = (_transition_s(pool) + after_s) * trainer.num_gpus
    start = _start_s(pool, options)
    prices = _PRICE_FACTORS * time_price(pool, goal)
    whole = frontier(pool, options, units.lane(units.order), prices)
    found = []
    for p in range(len(prices)):
        time_s = whole.time_s[p] + start
        gpu_s = whole.gpu_s[p] + start * options.gpus
        for m in np.unique([np.argmin(gpu_s + price * time_s) for price in prices]).tolist():
            fleet = (int(options.tp[m]),) * int(options.count[m])
            found.append(_Candidate(fleet, 0, 0.0, fixed_s + time_s[m], fixed_g + gpu_s[m], False, prices[p]))
    if goal.can_split and len(units.order) >= 8:
        for share in LONG_SHARES:
            cut = units.longest(share)
            lanes = tuple(
                frontier(pool, options, units.lane(rows), prices) for rows in (units.order[:cut], units.order[cut:])
            )
            found += _pairs(pool, options, (lanes[0], lanes[1]), (share, start, prices, fixed_s, fixed_g))
    return found


def _pairs(
    pool: PoolSnapshot,
    options: Options,
    lanes: tuple[Frontier, Frontier],
    context: tuple[float, FloatArray, FloatArray, float, float],
) -> list[_Candidate]:
    share, start, prices, fixed_s, fixed_g = context
    time_s = [(lane.time_s + start).ravel() for lane in lanes]
    gpu_s = [(lane.gpu_s + start * options.gpus).ravel() for lane in lanes]
    gpus = np.tile(options.gpus, len(prices))
    fits = gpus[:, None] + gpus[None, :] <= pool.num_gpus
    both_s = np.maximum(time_s[0][:, None], time_s[1][None, :])
    both_g = np.where(fits, gpu_s[0][:, None] + gpu_s[1][None, :], 1e15)
    found = []
    for price in prices:
        at = int(np.argmin(both_g + price * both_s))
        long, short = divmod(at, both_s.shape[1])
        if not fits[long, short]:
            continue
        m, o = long % len(options.tp), short % len(options.tp)
        fleet = (int(options.tp[m]),) * int(options.count[m]) + (int(options.tp[o]),) * int(options.count[o])
        step_s, cost = fixed_s + both_s[long, short], fixed_g + both_g[long, short]
        found.append(_Candidate(fleet, int(options.count[m]), share, float(step_s), float(cost), False, price))
    return found


def _start_s(pool: PoolSnapshot, options: Options) -> FloatArray:
    """Return [M] leased seconds until an option's replicas are usable."""
    times = pool.trainer.times
    load = np.array([pool.perf[int(tp)].load_s for tp in options.tp])
    warm = np.array([pool.warm.get(int(tp), 0) for tp in options.tp])
    start_s: FloatArray = np.where(options.gpus <= warm, times.wake_s, times.cold_start_s) + load
    return start_s


def _choose(candidates: list[_Candidate], ref: Reference, goal: Goal) -> tuple[_Candidate, str]:
    weight = goal.cost_weight

    def objective(c: _Candidate) -> float:
        return (1 - weight) * c.step_s / ref.step_s + weight * c.gpu_s / ref.gpu_s

    allowed = [
        c
        for c in candidates
        if (goal.max_step_s is None or c.step_s <= goal.max_step_s)
        and (goal.max_gpu_s is None or c.gpu_s <= goal.max_gpu_s)
    ]
    if not allowed:
        raise _infeasible(candidates, goal)
    if goal.is_notslower:
        most = ref.gpu_s - goal.payback * ref.transition_gpu_s
        fast = [c for c in allowed if c.step_s <= ref.step_s * (1.0 - goal.hysteresis) and c.gpu_s <= most]
        best = min(fast, key=lambda c: (c.gpu_s, c.step_s), default=candidates[0])
        return best, "least cost with a step no longer than static's"
    least = min(objective(c) for c in allowed)
    best = min((c for c in allowed if objective(c) <= least * (1 + _TIE)), key=lambda c: (c.step_s, c.gpu_s))
    resident = candidates[0]
    gain = (objective(resident) - objective(best)) * ref.gpu_s / max(weight, 1e-6)
    if best is not resident and resident in allowed and gain < goal.payback * ref.transition_gpu_s:
        return resident, f"a gain worth {gain:.0f} GPU s does not repay a transition of {ref.transition_gpu_s:.0f}"
    why = "no elastic fleet is better" if best.is_resident else f"objective {objective(best):.2f} against 1.00"
    return best, why


def _infeasible(candidates: list[_Candidate], goal: Goal) -> ConfigError:
    fastest = min(c.step_s for c in candidates)
    cheapest = min(c.gpu_s for c in candidates)
    if goal.max_step_s is not None and fastest > goal.max_step_s:
        return ConfigError(
            "rlhfless.planner.max_step_s",
            goal.max_step_s,
            "no fleet of this budget is that fast",
            f"Feasible: {fastest:.1f} s.",
        )
    if goal.max_gpu_s is not None and cheapest > goal.max_gpu_s:
        return ConfigError(
            "rlhfless.planner.max_usd_per_step",
            goal.max_gpu_s,
            "no fleet needs that few GPU-seconds",
            f"Feasible: {cheapest:.0f} GPU-seconds.",
        )
    least = min(c.gpu_s for c in candidates if goal.max_step_s is None or c.step_s <= goal.max_step_s)
    return ConfigError(
        "rlhfless.planner.max_step_s",
        goal.max_step_s,
        "no fleet meets the deadline within the budget",
        f"Within it the least is {least:.0f} GPU-seconds.",
    )


def _place(batch: Batch, prior: Prediction, chosen: _Candidate, units: _Units, pool: PoolSnapshot) -> IntArray:
    """Return the replica of each sample: groups stay together, lanes apart, load evened out inside a lane."""
    count = len(chosen.fleet)
    if batch.num_samples <= count:
        return least_requests(batch, count)
    load = prior.mean()
    if not chosen.num_long:
        return balanced_groups(batch, load, [1.0] * count)
    is_long = np.isin(units.unit_of, units.order[: units.longest(chosen.long_share)])
    replica_of = np.empty(batch.num_samples, dtype=np.int64)
    for mask, offset, size in ((is_long, 0, chosen.num_long), (~is_long, chosen.num_long, count - chosen.num_long)):
        part = _subset(batch, mask)
        replica_of[mask] = offset + balanced_groups(part, load[mask], [1.0] * size)
    return replica_of


def _subset(batch: Batch, mask: NDArray[np.bool_]) -> Batch:
    names, group_of = np.unique(batch.group_of[mask], return_inverse=True)
    ids = tuple(batch.prompt_ids[g] for g in names.tolist())
    return Batch(batch.step, ids, group_of.astype(np.int64), batch.prompt_tokens[mask], batch.max_response_tokens)
