"""Cut-and-migrate: when the samples that are left should run on fewer, or on other, replicas.

Every change is priced: continuation recomputes what a moved sample has, the target's batch grows, new replicas start
on leased time; against that stands the lease time given back and the tail that ends earlier. The future of each lane
comes from ``stages``, so that "stay for now and shrink later" competes with "shrink now".

Invariants: only unfinished samples move, each at most once per reaction; nothing moves for a gain below the
hysteresis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from verl_rlhfless.policy.dispatch import spread
from verl_rlhfless.policy.predict import Prediction
from verl_rlhfless.policy.snapshot import GONE, READY, STARTING, FloatArray, IntArray, Move, RolloutView
from verl_rlhfless.policy.stages import (
    Frontier,
    Lane,
    Options,
    depth_edges,
    frontier,
    options_for,
    rank_share,
    shrinking,
)

_LANE_SAMPLES = 1024

_ALIKE = 2.0
"""Replicas whose numbers of samples differ by less than this factor (or count) share their work."""

_MERGE_GAIN = 0.05
"""Least relative gain of a merge: it cannot be undone, and lanes were kept apart because lengths differ."""

_START_GAIN = 0.05
"""Least relative gain of starts on what is left: the rollout waits for them, and they cannot be undone."""

_SLACK_PRICE = 0.15
"""Price of time, as a share, of a crew that ends before the last one: its time is worth little, but it may slip."""


@dataclass(frozen=True, slots=True)
class Change:
    """What to move, start and release, how long the rollout still takes, and why (empty = nothing changes)."""

    remaining_s: float
    starts: tuple[int, ...] = ()
    moves: tuple[Move, ...] = ()
    reason: str = ""
    releases: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Crew:
    """The live replicas of one tensor-parallel size and the samples on them."""

    tp: int
    replicas: tuple[int, ...]
    samples: IntArray


@dataclass(frozen=True, slots=True)
class _Prospect:
    """A crew, its population, its best futures, and the option that it runs on now."""

    crew: _Crew
    lane: Lane
    future: Frontier
    at: int

    @property
    def end_s(self) -> float:
        return float(self.future.time_s[-1, self.at])

    @property
    def gpu_s(self) -> float:
        return float(self.future.gpu_s[-1, self.at])


def consolidate(view: RolloutView, prediction: Prediction, price: float, limits: tuple[float, int]) -> Change:
    """Return the change of the running fleet that gains most.

    Args:
        view: The rollout now.
        prediction: Lengths given what has been generated.
        price: GPU-seconds that one second is worth.
        limits: Least gain as a share of what runs meanwhile, and how many replicas the rollout began with.
    """
    held = num_held(view)
    crews = _crews(view, held)
    hysteresis, num_first = limits
    later = view.replicas[num_first:]
    fresh = [r.replica for r in later if r.state == READY and not held[r.replica]]
    is_starting = any(r.state == STARTING for r in view.replicas)
    if fresh and not is_starting:
        return _hand_over(view, prediction, crews, fresh, price)
    how = _how(view, crews, price)
    prospects = _prospects(view, prediction, crews, how)
    last = max(prospects, key=lambda prospect: prospect.end_s)
    if is_starting:
        return Change(last.end_s)
    merged = _merge(view, prediction, prospects, how)
    if merged is not None:
        return merged
    best: tuple[float, Change] | None = None
    for prospect in prospects:
        priced = -1 if prospect is last else 0
        gain = float(prospect.future.gain[priced, prospect.at])
        to = _better(view, prospect, how, (priced, hysteresis, not later))
        if to is None or (best is not None and gain <= best[0]):
            continue
        change = _apply(view, prediction, prospect.crew, (*to, last.end_s))
        if sum(change.starts) <= view.free_gpus:
            best = (gain, change)
    return best[1] if best is not None else Change(last.end_s)


def _how(view: RolloutView, crews: list[_Crew], price: float) -> tuple[Options, FloatArray]:
    """Return where crews may run, and the prices of time: of a crew that has slack, and of the last one."""
    now = tuple((crew.tp, len(crew.replicas)) for crew in crews)
    if len(crews) == 1:
        return options_for(view.pool, now), np.array([price])
    sizes = tuple(sorted({tp for tp, _ in now}))
    return options_for(view.pool, now, sizes), np.array([_SLACK_PRICE, 1.0]) * price


def _prospects(
    view: RolloutView, prediction: Prediction, crews: list[_Crew], how: tuple[Options, FloatArray]
) -> list[_Prospect]:
    """Return what becomes of each crew; one that is alone may also start replicas and change their size."""
    options, prices = how
    lanes = [lane_of(view, prediction, crew.samples) for crew in crews]
    if len(crews) > 1:
        futures = shrinking(view.pool, options, lanes, prices)
    else:
        futures = [frontier(view.pool, options, lanes[0], prices)]
    at = [options.index(crew.tp, len(crew.replicas)) for crew in crews]
    return [_Prospect(*parts) for parts in zip(crews, lanes, futures, at, strict=True)]


def _better(
    view: RolloutView, prospect: _Prospect, how: tuple[Options, FloatArray], rule: tuple[int, float, bool]
) -> tuple[int, int] | None:
    """Return the tensor-parallel size and the count that a crew should go on with, ``None`` where it stays as it is.

    Args:
        view: The rollout now.
        prospect: The crew's.
        how: Where crews may run, and the prices of time.
        rule: Which price counts, the least gain, and whether replicas may start.
    """
    (options, prices), (priced, least_gain, can_start) = how, rule
    crew, at, to = prospect.crew, prospect.at, int(prospect.future.first[priced, prospect.at])
    tp, count, gain = int(options.tp[to]), int(options.count[to]), prospect.future.gain[priced, at]
    if tp == crew.tp and count <= len(crew.replicas):
        count = max(count, _least_replicas(view, tp, len(crew.samples)))
        return (tp, count) if count < len(crew.replicas) and gain >= least_gain else None
    if not can_start or gain < 10 * least_gain:
        return None  # one start per rollout: no flapping
    without = shrinking(view.pool, options, [prospect.lane], prices)[0]
    pays = _worth(prospect.future, prices[-1], at) <= (1 - _START_GAIN) * _worth(without, prices[-1], at)
    return (tp, count) if pays else None


def _crews(view: RolloutView, held: IntArray) -> list[_Crew]:
    """Return the crews: replicas of one size whose numbers of samples are alike (lanes of one size stay apart).

    Args:
        view: The rollout now.
        held: [R] unfinished samples of each replica.
    """
    live = [r for r in view.replicas if r.state != GONE and held[r.replica]]
    crews: list[list[int]] = []
    for r in sorted(live, key=lambda r: (r.tp, held[r.replica], r.replica)):
        last = crews[-1][-1] if crews else None
        is_alike = last is not None and view.replicas[last].tp == r.tp
        if is_alike and held[r.replica] <= _ALIKE * held[crews[-1][0]] + _ALIKE:
            crews[-1].append(r.replica)
        else:
            crews.append([r.replica])
    crew_of = np.full(len(view.replicas) + 1, -1)  # the last for samples that have no replica
    for crew, ids in enumerate(crews):
        crew_of[ids] = crew
    alive = view.alive
    crew_of_sample = crew_of[view.replica_of[alive]]
    return [
        _Crew(view.replicas[ids[0]].tp, tuple(sorted(ids)), alive[crew_of_sample == crew])
        for crew, ids in enumerate(crews)
    ]


def lane_of(view: RolloutView, prediction: Prediction, samples: IntArray) -> Lane:
    """Return the population of ``samples`` by further tokens, given what each has."""
    count = len(samples)
    samples = samples[:: max(1, count // _LANE_SAMPLES)]  # a survival curve needs no more
    reached = view.generated[samples].astype(float)
    edges = depth_edges(max(1, int(prediction.cap - reached.min())))
    middle = (edges[:-1] + edges[1:]) / 2
    part = prediction.of(samples)
    now = np.maximum(part.alive_at(np.minimum(reached, prediction.cap - 1)[:, None]), 1e-12)
    alive = np.minimum(part.alive_at(reached[:, None] + middle) / now, 1.0)
    times = count / len(samples)
    context = float((reached + view.batch.prompt_tokens[samples]).mean())
    is_any = 1 - (1 - alive).prod(axis=0) ** times
    return Lane(edges, alive.sum(axis=0) * times, context, 0.0, is_any, rank_share(part.mu, part.sigma))


def _merge(
    view: RolloutView, prediction: Prediction, prospects: list[_Prospect], how: tuple[Options, FloatArray]
) -> Change | None:
    """Return the best move of one lane's samples onto another lane's replicas, ``None`` when apart is better."""
    options, prices = how
    pairs = [(a, b) for a, b in permutations(prospects, 2) if _may_join(view, a.crew, b.crew)]
    if not pairs:
        return None
    apart = prices[-1] * max(one.end_s for one in prospects) + sum(one.gpu_s for one in prospects)
    lanes = [lane_of(view, prediction, np.concatenate((a.crew.samples, b.crew.samples))) for a, b in pairs]
    best: tuple[float, _Crew, _Crew, float] | None = None
    for (joins, stays), both in zip(pairs, shrinking(view.pool, options, lanes, prices), strict=True):
        target, others = stays.crew, [one for one in prospects if one is not joins and one is not stays]
        moved_s = _moved_s(view, joins.crew.samples, target)
        end_s = float(both.time_s[-1, stays.at]) + moved_s
        gpu_s = float(both.gpu_s[-1, stays.at]) + moved_s * target.tp * len(target.replicas)
        gpu_s += sum(one.gpu_s for one in others)
        worth = prices[-1] * max([end_s, *(one.end_s for one in others)]) + gpu_s
        if worth < apart * (1 - _MERGE_GAIN) and (best is None or worth < best[0]):
            best = (worth, joins.crew, target, end_s)
    if best is None:
        return None
    _, crew, target, end_s = best
    moves = moves_onto(view, prediction, crew.samples, target.replicas)
    return Change(end_s, (), moves, f"TP{crew.tp} joins TP{target.tp}")


def _may_join(view: RolloutView, crew: _Crew, target: _Crew) -> bool:
    both = len(crew.samples) + len(target.samples)
    is_slower = target.tp < crew.tp
    return not is_slower and _least_replicas(view, target.tp, both) <= len(target.replicas)


def _least_replicas(view: RolloutView, tp: int, num_samples: int) -> int:
    """Return how many replicas run all samples at once: on fewer what is cut would queue last, however long it is."""
    return -(-num_samples // view.pool.perf[tp].limits.max_num_seqs)


def _worth(future: Frontier, price: float, option: int) -> float:
    """Return the GPU-seconds that a future takes, with those that its time is worth."""
    return float(price * future.time_s[-1, option] + future.gpu_s[-1, option])


def _moved_s(view: RolloutView, samples: IntArray, target: _Crew) -> float:
    """Return the seconds that a crew's replicas need to take ``samples``, side by side."""
    context = float((view.generated + view.batch.prompt_tokens)[samples].mean())
    one_s = view.pool.perf[target.tp].move_s(context, view.pool.has_kv_transfer)
    return len(samples) * one_s / len(target.replicas)


def _apply(view: RolloutView, prediction: Prediction, crew: _Crew, to: tuple[int, int, float]) -> Change:
    tp, count, remaining_s = to
    now = len(crew.replicas)
    if tp != crew.tp:
        return Change(remaining_s, (tp,) * count, (), f"{now} x TP{crew.tp} will hand over to {count} x TP{tp}")
    if count > now:
        return Change(remaining_s, (tp,) * (count - now), (), f"{now} x TP{tp} grows to {count}")
    kept = fullest(view, crew.replicas, count)
    cut = crew.samples[~np.isin(view.replica_of[crew.samples], kept)]
    return Change(remaining_s, (), moves_onto(view, prediction, cut, kept), f"{now} x TP{tp} shrinks to {count}")


def fullest(view: RolloutView, replicas: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the ``count`` of some replicas with the most unfinished samples, by id."""
    held = num_held(view)
    return tuple(sorted(sorted(replicas, key=lambda r: (-held[r], r))[:count]))


def num_held(view: RolloutView) -> IntArray:
    """Return the unfinished samples of each replica, [R]."""
    of = view.replica_of[view.alive]
    return np.bincount(of[of >= 0], minlength=len(view.replicas))


def _hand_over(view: RolloutView, prediction: Prediction, crews: list[_Crew], fresh: list[int], price: float) -> Change:
    """Fill replicas that became ready: all samples of other sizes, or an even share of the same size.

    Replicas that get nothing are released.
    """
    tp = view.replicas[fresh[0]].tp
    same = next((crew for crew in crews if crew.tp == tp), None)
    if same is None:
        part, apart = np.sort(np.concatenate([crew.samples for crew in crews])), []
        after = _Crew(tp, tuple(fresh), part)
    else:
        share = len(fresh) / (len(fresh) + len(same.replicas))
        least_done = same.samples[np.lexsort((same.samples, view.generated[same.samples]))]
        part, apart = np.sort(least_done[: int(share * len(least_done))]), [crew for crew in crews if crew is not same]
        after = _Crew(tp, (*same.replicas, *fresh), same.samples)
    moves = moves_onto(view, prediction, part, tuple(fresh))
    filled = {move.replica for move in moves}
    idle = tuple(replica for replica in fresh if replica not in filled)
    after = replace(after, replicas=tuple(r for r in after.replicas if r not in idle))
    remaining_s = max(_end_s(view, prediction, crew, price) for crew in (after, *apart))
    reason = f"{len(part)} samples to {len(filled)} of {len(fresh)} new replicas of TP{tp}"
    return Change(remaining_s, (), moves, reason, idle)


def _end_s(view: RolloutView, prediction: Prediction, crew: _Crew, price: float) -> float:
    """Return how many seconds a crew that may shrink still takes."""
    count = len(crew.replicas)
    options = options_for(view.pool, ((crew.tp, count),), (crew.tp,))
    lane = lane_of(view, prediction, crew.samples)
    future = shrinking(view.pool, options, [lane], np.array([price]))[0]
    return float(future.time_s[-1, options.index(crew.tp, count)])


def moves_onto(
    view: RolloutView, prediction: Prediction, samples: IntArray, targets: tuple[int, ...]
) -> tuple[Move, ...]:
    """Return the moves that spread ``samples`` over ``targets`` by what each and they have left."""
    ids, left = view.alive, np.zeros(view.batch.num_samples)
    part = prediction.of(ids)
    left[ids] = np.maximum(part.mean(view.generated[ids]) - view.generated[ids], 1.0)
    load = [float(left[ids[view.replica_of[ids] == target]].sum()) for target in targets]
    return spread(samples, targets, load, left)
