"""Candidate fleets: one lane that may change as samples finish, or two to three lanes side by side.

A lane is a run of units, longest predicted first, on replicas of one tensor-parallel size; lanes that run side by
side may only shrink. For each deadline and each partition every lane takes its cheapest fleet that meets the
deadline; the candidates are what no other one beats in both time and cost.

Invariants: no candidate leases more than the budget, at its start or later; its replicas fit on the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from verl_rlhfless.policy.goal import Goal
from verl_rlhfless.policy.packing import packs
from verl_rlhfless.policy.snapshot import FloatArray, IntArray, PoolSnapshot
from verl_rlhfless.policy.stages import Frontier, Options, frontier, shrinking
from verl_rlhfless.policy.step_costs import StepCosts
from verl_rlhfless.policy.units import Units

LONG_SHARES = (0.01, 0.05, 0.2, 0.5)
"""Shares of the units, longest predicted first, after which a lane may end."""

_MAX_LANES = 3
_NUM_DEADLINES = 12
_CROWDING = np.array([0.0, 0.3, 1.0, 3.0])
"""Prices of holding a GPU until the deadline. The higher one is, the fewer GPUs each lane takes for itself: with some
price, all lanes together fit into the budget."""

_PRICE_FACTORS = np.array([0.0, 0.25, 1.0, 2.0, 12.0])
_FASTEST = 1e6
"""One more price of time if the trainer keeps its lease. Each second costs its GPUs too, so that the fastest fleet may
be the cheapest."""


@dataclass(frozen=True, slots=True)
class LaneFleet:
    """``count`` replicas of ``tp`` GPUs for the next ``num_units`` units."""

    num_units: int
    tp: int
    count: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A fleet with the predicted seconds and GPU-seconds of the whole step."""

    lanes: tuple[LaneFleet, ...]
    step_s: float
    gpu_s: float
    is_resident: bool = False

    @property
    def fleet(self) -> tuple[int, ...]:
        """Tensor-parallel size of each replica."""
        return tuple(lane.tp for lane in self.lanes for _ in range(lane.count))


def elastic_fleets(options: Options, costs: StepCosts, goal: Goal, price: float) -> list[Candidate]:
    """Return the elastic candidates that no other one beats in both time and cost.

    Args:
        options: What a lane may run on.
        costs: Pool, units, and everything beside the rollout.
        goal: Limits on replicas.
        price: GPU-seconds that one second is worth.
    """
    pool, units = costs.pool, costs.units
    prices = np.append(_PRICE_FACTORS * price, [_FASTEST] if pool.keeps_trainer else [])
    start_s = costs.start_s(options)
    whole = _Choices.of(frontier(pool, options, units.lane(units.order), prices), options, start_s)
    plans = [_Plans(whole.time_s, whole.gpu_s, ((len(units.order),),) * len(whole.time_s), whole.option[:, None])]
    if len(units.order) >= 2:
        plans += _split(pool, options, units, (prices, start_s))
    found = []
    for plan in plans:
        saved_s, added_gpu_s = costs.fused(plan.time_s, plan.gpu_s)
        step_s = goal.caution * (costs.elastic_s + plan.time_s - saved_s)
        gpu_s = costs.trainer_gpu_s(step_s) + plan.gpu_s + added_gpu_s
        replicas = options.count[plan.option].sum(axis=1)
        fits = (replicas >= goal.min_replicas) & (replicas <= (goal.max_replicas or pool.num_gpus))
        for i in np.flatnonzero(fits).tolist():
            found.append((float(step_s[i]), float(gpu_s[i]), plan, i))
    return _unbeaten(found, options, pool)


@dataclass(frozen=True)
class _Choices:
    """[Q] ways to run one lane: seconds and GPU-seconds with the start, and the option to start with."""

    time_s: FloatArray
    gpu_s: FloatArray
    option: IntArray

    @classmethod
    def of(cls, future: Frontier, options: Options, start_s: FloatArray) -> _Choices:
        time_s = (future.time_s + start_s).ravel()
        gpu_s = (future.gpu_s + start_s * options.gpus).ravel()
        return cls(time_s, gpu_s, np.tile(np.arange(len(start_s)), len(future.time_s)))


@dataclass(frozen=True)
class _Plans:
    """[N] plans: rollout seconds and GPU-seconds, units of each lane, option of each lane [N, lanes]."""

    time_s: FloatArray
    gpu_s: FloatArray
    num_units: tuple[tuple[int, ...], ...]
    option: IntArray

    def lanes(self, index: int, options: Options) -> tuple[LaneFleet, ...]:
        return tuple(
            LaneFleet(units, int(options.tp[m]), int(options.count[m]))
            for units, m in zip(self.num_units[index], self.option[index].tolist(), strict=True)
        )


def _split(
    pool: PoolSnapshot, options: Options, units: Units, prices_start: tuple[FloatArray, FloatArray]
) -> list[_Plans]:
    """Return plans of two and three lanes for a row of deadlines."""
    prices, start_s = prices_start
    count = len(units.order)
    cuts = sorted({0, count, *(max(1, round(share * count)) for share in LONG_SHARES)})
    spans = [span for span in combinations(range(len(cuts)), 2) if span != (0, len(cuts) - 1)]
    lanes = [units.lane(units.order[cuts[i] : cuts[j]]) for i, j in spans]
    ways = [_Choices.of(future, options, start_s) for future in shrinking(pool, options, lanes, prices)]
    time_s, gpu_s = np.stack([w.time_s for w in ways]), np.stack([w.gpu_s for w in ways])
    option = ways[0].option
    gpus = options.gpus[option]
    woken, parked = _woken(pool, options, option)
    late_s = pool.trainer.times.cold_start_s - pool.trainer.times.wake_s
    fastest = float(time_s.min(axis=1).max())
    slowest = float(time_s[np.arange(len(ways)), gpu_s.argmin(axis=1)].max())
    deadlines = np.geomspace(fastest, max(slowest, fastest * 1.01), _NUM_DEADLINES)[:, None]
    held = (_CROWDING * deadlines)[:, :, None, None] * gpus  # [D, C, 1, Q]
    worth = np.where(time_s <= deadlines[:, :, None, None] * (1 + 1e-9), gpu_s + held, np.inf)
    best = worth.argmin(axis=3)
    is_met = np.isfinite(worth.min(axis=3))
    span = np.arange(len(ways))
    best_s, best_g, best_n = time_s[span, best], gpu_s[span, best], gpus[best]
    plans = []
    for inner in (c for size in range(1, _MAX_LANES) for c in combinations(range(1, len(cuts) - 1), size)):
        bounds = (0, *inner, len(cuts) - 1)
        of = [spans.index(pair) for pair in pairwise(bounds)]
        fits = is_met[:, :, of].all(axis=2) & (best_n[:, :, of].sum(axis=2) <= pool.num_gpus)
        widths = tuple(cuts[j] - cuts[i] for i, j in pairwise(bounds))
        chosen = best[:, :, of][fits]
        started = np.maximum(0, woken[:, chosen].sum(axis=2) - parked).sum(axis=0) * late_s
        plans.append(
            _Plans(
                best_s[:, :, of][fits].max(axis=1, initial=0.0) + started / gpus[chosen].sum(axis=1),
                best_g[:, :, of][fits].sum(axis=1) + started,
                (widths,) * len(chosen),
                option[chosen],
            )
        )
    return plans


def _woken(pool: PoolSnapshot, options: Options, option: IntArray) -> tuple[IntArray, IntArray]:
    """Return the GPUs on which a lane's way wakes parked engines, [sizes, Q], and those that are parked, [sizes, 1].

    Each lane alone counts on all of them: what lanes together lack has to be started.
    """
    sizes = [tp for tp, _ in options.sizes]
    parked = np.array([[pool.warm.get(tp, 0)] for tp in sizes], dtype=np.int64)
    is_of = options.tp[option] == np.array(sizes)[:, None]
    return np.where(is_of, np.minimum(options.gpus[option], parked), 0), parked


def _unbeaten(found: list[tuple[float, float, _Plans, int]], options: Options, pool: PoolSnapshot) -> list[Candidate]:
    kept: list[Candidate] = []
    for step_s, gpu_s, plan, index in sorted(found, key=lambda row: row[:2]):
        if not kept or gpu_s < kept[-1].gpu_s:
            one = Candidate(plan.lanes(index, options), step_s, gpu_s)
            if packs(one.fleet, pool.num_gpus, pool.gpus_per_node):
                kept.append(one)
    return kept
