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
from verl_rlhfless.policy.prediction import Prediction
from verl_rlhfless.policy.snapshot import GONE, READY, STARTING, FloatArray, IntArray, Move, RolloutView
from verl_rlhfless.policy.stages import (
    Frontier,
    Lane,
    Options,
    depth_edges,
    frontier,
    middle_of,
    options_for,
    rank_share,
    shrinking,
)

_LANE_SAMPLES = 1024
"""About as many samples stand for all of a lane: a survival curve needs no more."""

_LEAST_ALIVE = 1e-12
"""Least probability that a sample got as far as it is, so that what follows from it is finite."""

_ALIKE = 2.0
"""Replicas whose numbers of samples differ by less than this factor (or count) share their work."""

_MERGE_GAIN = 0.05
"""Least relative gain of a merge: it cannot be undone, and lanes were kept apart because lengths differ."""

_START_GAIN = 0.05
"""Least relative gain of starts on what is left: the rollout waits for them, and they cannot be undone."""

_START_HYSTERESIS = 10
"""Starts must gain as many times what a shrinking must gain."""

_SLACK_PRICE = 0.15
"""Price of time, as a share, of a crew that ends before the last one: its time is worth little, but it may slip."""


@dataclass(frozen=True, slots=True)
class Change:
    """What to do with the running fleet.

    Attributes:
        remaining_s: Seconds that the rollout is predicted to take from now on.
        starts: Tensor-parallel size of each replica to start.
        moves: Samples to migrate.
        reason: Why; empty = nothing changes.
        releases: Replicas that end.
    """

    remaining_s: float
    starts: tuple[int, ...] = ()
    moves: tuple[Move, ...] = ()
    reason: str = ""
    releases: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Crew:
    """Live replicas of one tensor-parallel size with about equally many samples, and the ids of those."""

    tp: int
    replicas: tuple[int, ...]
    samples: IntArray


@dataclass(frozen=True, slots=True)
class _Prospect:
    """A crew, its population, its best futures [P, M], and the position of the option that it runs on now."""

    crew: _Crew
    lane: Lane
    future: Frontier
    at: int

    @property
    def end_s(self) -> float:
        return float(self.future.time_s[_LAST, self.at])

    @property
    def gpu_s(self) -> float:
        return float(self.future.gpu_s[_LAST, self.at])


_SLACK, _LAST = 0, -1
"""Positions of prices: that of a crew which ends before the last one, and that of the last one."""


@dataclass(frozen=True, slots=True)
class _Terms:
    """Where crews may run, and what a change must gain.

    Attributes:
        options: [M] fleets that a crew may go on with.
        prices: [P] GPU-seconds that one second is worth, at ``_SLACK`` and at ``_LAST``; just one for a crew alone.
        hysteresis: Least gain as a share of what runs meanwhile.
        can_start: Whether replicas may start.
    """

    options: Options
    prices: FloatArray
    hysteresis: float
    can_start: bool


def consolidate(view: RolloutView, prediction: Prediction, price: float, hysteresis: float, num_first: int) -> Change:
    """Return the change of the running fleet that gains most.

    While replicas start nothing changes; those that are up get samples. Else two crews merge, or one shrinks, grows or
    changes its tensor-parallel size.

    Args:
        view: The rollout now; some sample is unfinished and on a replica.
        prediction: Lengths given what has been generated.
        price: GPU-seconds that one second is worth.
        hysteresis: Least gain as a share of what runs meanwhile.
        num_first: How many replicas the rollout began with.
    """
    crews, held = _crews(view), view.num_held
    later = view.replicas[num_first:]
    fresh = [r.replica for r in later if r.state == READY and not held[r.replica]]
    is_starting = any(r.state == STARTING for r in view.replicas)
    if fresh and not is_starting:
        return _hand_over(view, prediction, crews, fresh, price)
    terms = _terms(view, crews, price, hysteresis, can_start=not later)  # one start per rollout: no flapping
    prospects = _prospects(view, prediction, crews, terms)
    if is_starting:
        return Change(_last(prospects).end_s)
    return _merge(view, prediction, prospects, terms) or _resize(view, prediction, prospects, terms)


def _terms(view: RolloutView, crews: list[_Crew], price: float, hysteresis: float, *, can_start: bool) -> _Terms:
    """Return the terms: a crew alone may run on any option, crews side by side on those of their sizes."""
    now = tuple((crew.tp, len(crew.replicas)) for crew in crews)
    if len(crews) == 1:
        return _Terms(options_for(view.pool, now), np.array([price]), hysteresis, can_start)
    options = options_for(view.pool, now, tuple(sorted({tp for tp, _ in now})))
    return _Terms(options, np.array([_SLACK_PRICE, 1.0]) * price, hysteresis, can_start)


def _prospects(view: RolloutView, prediction: Prediction, crews: list[_Crew], terms: _Terms) -> list[_Prospect]:
    """Return what becomes of each crew; one that is alone may also start replicas and change their size."""
    options, prices = terms.options, terms.prices
    lanes = [lane_of(view, prediction, crew.samples) for crew in crews]
    if len(crews) > 1:
        futures = shrinking(view.pool, options, lanes, prices)
    else:
        futures = [frontier(view.pool, options, lanes[0], prices)]
    at = [options.index(crew.tp, len(crew.replicas)) for crew in crews]
    return [_Prospect(*parts) for parts in zip(crews, lanes, futures, at, strict=True)]


def _last(prospects: list[_Prospect]) -> _Prospect:
    """Return the one that ends last."""
    return max(prospects, key=lambda prospect: prospect.end_s)


def _resize(view: RolloutView, prediction: Prediction, prospects: list[_Prospect], terms: _Terms) -> Change:
    """Return the change of one crew that gains most, or no change."""
    last = _last(prospects)
    best: tuple[float, Change] | None = None
    for prospect in prospects:
        priced = _LAST if prospect is last else _SLACK
        gain = float(prospect.future.gain[priced, prospect.at])
        to = _better(view, prospect, terms, priced)
        if to is None or (best is not None and gain <= best[0]):
            continue
        change = _apply(view, prediction, prospect.crew, to, last.end_s)
        if sum(change.starts) <= view.free_gpus:
            best = (gain, change)
    return best[1] if best is not None else Change(last.end_s)


def _better(view: RolloutView, prospect: _Prospect, terms: _Terms, priced: int) -> tuple[int, int] | None:
    """Return the tensor-parallel size and the count that a crew should go on with, ``None`` where it stays as it is.

    Args:
        view: The rollout now.
        prospect: The crew's.
        terms: Where it may run, and what a change must gain.
        priced: Position of the price that counts.
    """
    crew, at, options = prospect.crew, prospect.at, terms.options
    to = int(prospect.future.first[priced, at])
    tp, count, gain = int(options.tp[to]), int(options.count[to]), prospect.future.gain[priced, at]
    if tp == crew.tp and count <= len(crew.replicas):
        count = max(count, _least_replicas(view, tp, len(crew.samples)))
        return (tp, count) if count < len(crew.replicas) and gain >= terms.hysteresis else None
    if not terms.can_start or gain < _START_HYSTERESIS * terms.hysteresis:
        return None
    without = shrinking(view.pool, options, [prospect.lane], terms.prices)[0]
    price = terms.prices[_LAST]
    pays = _worth(prospect.future, price, at) <= (1 - _START_GAIN) * _worth(without, price, at)
    return (tp, count) if pays else None


def _crews(view: RolloutView) -> list[_Crew]:
    """Return the crews: replicas of one size whose numbers of samples are alike (lanes of one size stay apart).

    From the emptiest replica on, each joins the crew before it while its samples are at most ``_ALIKE`` times, and as
    many more than, those of that crew's first one.
    """
    held = view.num_held
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
    """Return the population of ``samples`` by further tokens, given what each has.

    The probability that a sample gets d tokens further is that of its whole length, given that it got where it is:
    ``P(length > reached + d) / P(length > reached)``.
    """
    count = len(samples)
    samples = samples[:: max(1, count // _LANE_SAMPLES)]
    reached = view.generated[samples].astype(float)
    edges = depth_edges(max(1, int(prediction.cap - reached.min())))
    part = prediction.of(samples)
    now = np.maximum(part.alive_at(np.minimum(reached, prediction.cap - 1)[:, None]), _LEAST_ALIVE)
    alive = np.minimum(part.alive_at(reached[:, None] + middle_of(edges)) / now, 1.0)
    stands_for = count / len(samples)
    context = float((reached + view.batch.prompt_tokens[samples]).mean())
    is_any = 1 - (1 - alive).prod(axis=0) ** stands_for
    return Lane(edges, alive.sum(axis=0) * stands_for, context, 0.0, is_any, rank_share(part.mu, part.sigma))


def _merge(view: RolloutView, prediction: Prediction, prospects: list[_Prospect], terms: _Terms) -> Change | None:
    """Return the best move of one crew's samples onto another crew's replicas, ``None`` when apart is better.

    What a fleet is worth: its GPU-seconds, and those that the time until its last crew ends is worth.
    """
    price = terms.prices[_LAST]
    pairs = [(a, b) for a, b in permutations(prospects, 2) if _may_join(view, a.crew, b.crew)]
    if not pairs:
        return None
    apart = price * _last(prospects).end_s + sum(one.gpu_s for one in prospects)
    lanes = [lane_of(view, prediction, np.concatenate((a.crew.samples, b.crew.samples))) for a, b in pairs]
    best: tuple[float, _Crew, _Crew, float] | None = None
    for (joins, stays), both in zip(pairs, shrinking(view.pool, terms.options, lanes, terms.prices), strict=True):
        target, others = stays.crew, [one for one in prospects if one is not joins and one is not stays]
        moved_s = _moved_s(view, joins.crew.samples, target)
        end_s = float(both.time_s[_LAST, stays.at]) + moved_s
        gpu_s = float(both.gpu_s[_LAST, stays.at]) + moved_s * target.tp * len(target.replicas)
        gpu_s += sum(one.gpu_s for one in others)
        worth = price * max([end_s, *(one.end_s for one in others)]) + gpu_s
        if worth < apart * (1 - _MERGE_GAIN) and (best is None or worth < best[0]):
            best = (worth, joins.crew, target, end_s)
    if best is None:
        return None
    _, crew, target, end_s = best
    moves = moves_onto(view, prediction, crew.samples, target.replicas)
    return Change(end_s, (), moves, f"TP{crew.tp} joins TP{target.tp}")


def _may_join(view: RolloutView, crew: _Crew, target: _Crew) -> bool:
    """Return whether a target's replicas are as wide as a crew's, and run the samples of both at once."""
    both = len(crew.samples) + len(target.samples)
    is_slower = target.tp < crew.tp
    return not is_slower and _least_replicas(view, target.tp, both) <= len(target.replicas)


def _least_replicas(view: RolloutView, tp: int, num_samples: int) -> int:
    """Return how many replicas run all samples at once: on fewer what is cut would queue last, however long it is."""
    return -(-num_samples // view.pool.perf[tp].limits.max_num_seqs)


def _worth(future: Frontier, price: float, option: int) -> float:
    """Return the GPU-seconds that a future takes, with those that its time is worth."""
    return float(price * future.time_s[_LAST, option] + future.gpu_s[_LAST, option])


def _moved_s(view: RolloutView, samples: IntArray, target: _Crew) -> float:
    """Return the seconds that a crew's replicas need to take ``samples``, side by side."""
    context = float((view.generated + view.batch.prompt_tokens)[samples].mean())
    one_s = view.pool.perf[target.tp].move_s(context, view.pool.has_kv_transfer)
    return len(samples) * one_s / len(target.replicas)


def _apply(view: RolloutView, prediction: Prediction, crew: _Crew, to: tuple[int, int], remaining_s: float) -> Change:
    """Return the change of a crew ``to`` a tensor-parallel size and a count; what starts gets samples when it is up."""
    tp, count = to
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
    held = view.num_held
    return tuple(sorted(sorted(replicas, key=lambda r: (-held[r], r))[:count]))


def _hand_over(view: RolloutView, prediction: Prediction, crews: list[_Crew], fresh: list[int], price: float) -> Change:
    """Return what fills replicas that became ready: the samples of all crews, or an even share of their own size's.

    Of that share, samples that have generated least go: they have least to compute again. Replicas that get nothing are
    released.
    """
    tp = view.replicas[fresh[0]].tp
    same = next((crew for crew in crews if crew.tp == tp), None)
    if same is None:
        moved, others = np.sort(np.concatenate([crew.samples for crew in crews])), []
        grown = _Crew(tp, tuple(fresh), moved)
    else:
        share = len(fresh) / (len(fresh) + len(same.replicas))
        least_done = same.samples[np.lexsort((same.samples, view.generated[same.samples]))]
        moved, others = np.sort(least_done[: int(share * len(least_done))]), [one for one in crews if one is not same]
        grown = _Crew(tp, (*same.replicas, *fresh), same.samples)
    moves = moves_onto(view, prediction, moved, tuple(fresh))
    filled = {move.replica for move in moves}
    idle = tuple(replica for replica in fresh if replica not in filled)
    grown = replace(grown, replicas=tuple(r for r in grown.replicas if r not in idle))
    remaining_s = max(_end_s(view, prediction, crew, price) for crew in (grown, *others))
    reason = f"{len(moved)} samples to {len(filled)} of {len(fresh)} new replicas of TP{tp}"
    return Change(remaining_s, (), moves, reason, idle)


def _end_s(view: RolloutView, prediction: Prediction, crew: _Crew, price: float) -> float:
    """Return how many seconds a crew that may shrink still takes."""
    count = len(crew.replicas)
    options = options_for(view.pool, ((crew.tp, count),), (crew.tp,))
    lane = lane_of(view, prediction, crew.samples)
    future = shrinking(view.pool, options, [lane], np.array([price]))[0]
    return float(future.time_s[_LAST, options.index(crew.tp, count)])


def moves_onto(
    view: RolloutView, prediction: Prediction, samples: IntArray, targets: tuple[int, ...]
) -> tuple[Move, ...]:
    """Return the moves that spread ``samples`` over ``targets`` by the tokens that they and those there have left."""
    ids, left = view.alive, np.zeros(view.batch.num_samples)
    part = prediction.of(ids)
    left[ids] = np.maximum(part.mean(view.generated[ids]) - view.generated[ids], 1.0)
    load = [float(left[ids[view.replica_of[ids] == target]].sum()) for target in targets]
    return spread(samples, targets, load, left)
