"""Cut-and-migrate: when the samples that are left should run on fewer, or on other, replicas.

Every change is priced: continuation recomputes what a moved sample has, the target's batch grows, new replicas start
on leased time; against that stands the lease time given back and the tail that ends earlier. The future of each lane
comes from ``stages``, so that "stay for now and shrink later" competes with "shrink now".

RLHFless' local rule (tau) and RLHFuse's global rule (R_t, m) are below, for their arms and for choosing them by name.

Invariants: only unfinished samples move, each at most once per reaction; nothing moves for a gain below the
hysteresis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from verl_rlhfless.policy.dispatch import spread
from verl_rlhfless.policy.predict import Prediction
from verl_rlhfless.policy.snapshot import FINISHED, GONE, READY, STARTING, FloatArray, IntArray, Move, RolloutView
from verl_rlhfless.policy.stages import Frontier, Lane, Options, depth_edges, frontier, options_for

_LANE_SAMPLES = 1024


@dataclass(frozen=True, slots=True)
class Change:
    """What to move and start, how long the rollout still takes, and why (empty = nothing changes)."""

    remaining_s: float
    starts: tuple[int, ...] = ()
    moves: tuple[Move, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Crew:
    """The live replicas of one tensor-parallel size and the samples on them."""

    tp: int
    replicas: tuple[int, ...]
    samples: IntArray


def consolidate(view: RolloutView, prediction: Prediction, price: float, limits: tuple[float, int]) -> Change:
    """Return the change of the running fleet that gains most.

    Args:
        view: The rollout now.
        prediction: Lengths given what has been generated.
        price: GPU-seconds that one second is worth.
        limits: Least gain as a share of what runs meanwhile, and how many replicas the rollout began with.
    """
    crews = _crews(view)
    hysteresis, num_first = limits
    fresh = [r for r in view.replicas[num_first:] if r.state == READY and not _has(view, r.replica)]
    if any(r.state == STARTING and not _has(view, r.replica) for r in view.replicas[num_first:]):
        return Change(_remaining(view, prediction, crews, price))
    if fresh:
        return _hand_over(view, prediction, crews, [r.replica for r in fresh])
    options = options_for(view.pool, tuple((crew.tp, len(crew.replicas)) for crew in crews))
    prices = np.array([0.15, 1.0] if len(crews) > 1 else [1.0]) * price
    lanes = [_lane(view, prediction, crew.samples) for crew in crews]
    futures = [frontier(view.pool, options, lane, prices) for lane in lanes]
    at = [options.index(crew.tp, len(crew.replicas)) for crew in crews]
    ends = [float(future.time_s[-1, m]) for future, m in zip(futures, at, strict=True)]
    critical = int(np.argmax(ends))
    if len(crews) > 1:
        merged = _merge(view, prediction, (crews, futures, at), (options, prices, hysteresis))
        if merged is not None:
            return merged
    best: tuple[float, Change] | None = None
    for i, (crew, future, m) in enumerate(zip(crews, futures, at, strict=True)):
        p = -1 if i == critical else 0
        gain, to = float(future.gain[p, m]), int(future.first[p, m])
        is_start = options.tp[to] != options.tp[m] or options.count[to] > options.count[m]
        if is_start and len(view.replicas) > num_first:
            continue  # one start per rollout: no flapping
        if to == m or gain < hysteresis * (10 if is_start else 1) or (best is not None and gain <= best[0]):
            continue
        best = (gain, _apply(view, prediction, crew, (int(options.tp[to]), int(options.count[to]), ends[critical])))
    return best[1] if best is not None else Change(max(ends))


def _has(view: RolloutView, replica: int) -> bool:
    return bool(((view.replica_of == replica) & (view.state != FINISHED)).any())


def _crews(view: RolloutView) -> list[_Crew]:
    alive = view.alive
    of = view.replica_of[alive]
    crews = []
    for tp in sorted({r.tp for r in view.replicas if r.state != GONE}):
        ids = tuple(r.replica for r in view.replicas if r.tp == tp and r.state != GONE and (of == r.replica).any())
        if ids:
            crews.append(_Crew(tp, ids, alive[np.isin(of, ids)]))
    return crews


def _lane(view: RolloutView, prediction: Prediction, samples: IntArray) -> Lane:
    """Return the population of ``samples`` by further tokens, given what each has."""
    count = len(samples)
    samples = samples[:: max(1, count // _LANE_SAMPLES)]  # a survival curve needs no more
    reached = view.generated[samples].astype(float)
    edges = depth_edges(max(1, int(prediction.cap - reached.min())))
    middle = (edges[:-1] + edges[1:]) / 2
    mu, sigma = prediction.mu[samples], prediction.sigma[samples]
    part = Prediction(mu, sigma, prediction.low, prediction.high, prediction.cap)
    now = np.maximum(part.alive_at(np.minimum(reached, prediction.cap - 1)[:, None]), 1e-12)
    alive = (part.alive_at(reached[:, None] + middle) / now).sum(axis=0)
    context = float((reached + view.batch.prompt_tokens[samples]).mean())
    return Lane(edges, np.minimum(alive, len(samples)) * (count / len(samples)), context, 0.0)


def _remaining(view: RolloutView, prediction: Prediction, crews: list[_Crew], price: float) -> float:
    options = options_for(view.pool, tuple((crew.tp, len(crew.replicas)) for crew in crews))
    ends = [
        frontier(view.pool, options, _lane(view, prediction, crew.samples), np.array([price])).time_s[
            0, options.index(crew.tp, len(crew.replicas))
        ]
        for crew in crews
    ]
    return float(max(ends, default=0.0))


def _merge(
    view: RolloutView,
    prediction: Prediction,
    state: tuple[list[_Crew], list[Frontier], list[int]],
    how: tuple[Options, FloatArray, float],
) -> Change | None:
    """Return the best move of one lane's samples onto another lane's replicas, ``None`` when apart is better."""
    (crews, futures, at), (options, prices, hysteresis) = state, how
    ends = [float(f.time_s[-1, m]) for f, m in zip(futures, at, strict=True)]
    costs = [float(f.gpu_s[-1, m]) for f, m in zip(futures, at, strict=True)]
    apart = prices[-1] * max(ends) + sum(costs)
    best: tuple[float, int, int, float] | None = None
    for i, source in enumerate(crews):
        for j, target in enumerate(crews):
            if i == j or source.tp > target.tp:
                continue  # never onto slower replicas
            both = frontier(
                view.pool, options, _lane(view, prediction, np.concatenate((source.samples, target.samples))), prices
            )
            context = float((view.generated + view.batch.prompt_tokens)[source.samples].sum())
            moved_s = context * view.pool.perf[target.tp].prefill_s_per_token / len(target.replicas)
            end = float(both.time_s[-1, at[j]]) + moved_s
            others = [e for k, e in enumerate(ends) if k not in (i, j)]
            cost = float(both.gpu_s[-1, at[j]]) + moved_s * target.tp * len(target.replicas)
            cost += sum(c for k, c in enumerate(costs) if k not in (i, j))
            worth = prices[-1] * max([end, *others]) + cost
            if worth < apart * (1 - hysteresis) and (best is None or worth < best[0]):
                best = (worth, i, j, end)
    if best is None:
        return None
    _, i, j, end = best
    moves = _onto(view, prediction, crews[i].samples, crews[j].replicas)
    return Change(end, (), moves, f"TP{crews[i].tp} joins TP{crews[j].tp}")


def _apply(view: RolloutView, prediction: Prediction, crew: _Crew, to: tuple[int, int, float]) -> Change:
    tp, count, remaining_s = to
    now = len(crew.replicas)
    if tp != crew.tp:
        return Change(remaining_s, (tp,) * count, (), f"{now} x TP{crew.tp} will hand over to {count} x TP{tp}")
    if count > now:
        return Change(remaining_s, (tp,) * (count - now), (), f"{now} x TP{tp} grows to {count}")
    held = {r: int(((view.replica_of == r) & (view.state != FINISHED)).sum()) for r in crew.replicas}
    kept = tuple(sorted(sorted(crew.replicas, key=lambda r: (-held[r], r))[:count]))
    cut = crew.samples[~np.isin(view.replica_of[crew.samples], kept)]
    return Change(remaining_s, (), _onto(view, prediction, cut, kept), f"{now} x TP{tp} shrinks to {count}")


def _hand_over(view: RolloutView, prediction: Prediction, crews: list[_Crew], fresh: list[int]) -> Change:
    """Fill replicas that became ready: all samples of other sizes, or an even share of the same size."""
    tp = view.replicas[fresh[0]].tp
    same = [crew for crew in crews if crew.tp == tp]
    if not same:
        samples = np.concatenate([crew.samples for crew in crews])
        return Change(0.0, (), _onto(view, prediction, np.sort(samples), tuple(fresh)), f"handed over to TP{tp}")
    crew = same[0]
    share = len(fresh) / (len(fresh) + len(crew.replicas))
    least_done = crew.samples[np.lexsort((crew.samples, view.generated[crew.samples]))]
    part = np.sort(least_done[: int(share * len(least_done))])
    return Change(
        0.0, (), _onto(view, prediction, part, tuple(fresh)), f"{len(part)} samples to {len(fresh)} new replicas"
    )


def _onto(view: RolloutView, prediction: Prediction, samples: IntArray, targets: tuple[int, ...]) -> tuple[Move, ...]:
    left = np.maximum(prediction.mean(view.generated) - view.generated, 1.0)
    ids = view.alive
    load = [float(left[ids[view.replica_of[ids] == target]].sum()) for target in targets]
    return spread(samples, targets, load, left)


def local_cut(view: RolloutView, tau: float) -> tuple[Move, ...]:
    """Return RLHFless' local rule.

    Once a share ``tau`` of a replica's samples has finished, the rest move to replicas with free slots.

    arXiv 2602.22718, cut-and-migrate. The receivers are replicas that have not reached ``tau``; the one with the
    fewest requests first.
    """
    total = np.bincount(view.replica_of[view.replica_of >= 0], minlength=len(view.replicas))
    alive = view.alive
    left = np.bincount(view.replica_of[alive], minlength=len(view.replicas))
    live = [r for r in view.replicas if r.state == READY and left[r.replica]]
    cut = [r for r in live if 1 - left[r.replica] / max(total[r.replica], 1) >= tau]
    keep = [r for r in live if r not in cut]
    if not keep and cut:  # every actor is past tau: the fullest stays
        keep = [max(cut, key=lambda r: (left[r.replica], -r.replica))]
        cut = [r for r in cut if r is not keep[0]]
    slots = {r.replica: view.pool.perf[r.tp].limits.max_num_seqs - int(left[r.replica]) for r in keep}
    moved = [alive[view.replica_of[alive] == r.replica] for r in cut]
    samples = np.concatenate(moved) if moved else np.array([], dtype=np.int64)
    if not len(samples) or sum(slots.values()) < len(samples):
        return ()
    load = [float(left[r.replica]) for r in keep]
    return spread(samples, [r.replica for r in keep], load, np.ones(view.batch.num_samples))


def global_cut(view: RolloutView, threshold: int, num_targets: int) -> tuple[Move, ...]:
    """Return RLHFuse's global rule.

    With fewer than ``threshold`` samples left, the survivors move to the ``num_targets`` instances with the most
    remaining work (arXiv 2409.13221, section 4.2).
    """
    alive = view.alive
    if len(alive) > threshold or not len(alive):
        return ()
    left = np.bincount(view.replica_of[alive], minlength=len(view.replicas))
    order = sorted(range(len(view.replicas)), key=lambda r: (-left[r], r))
    targets = [r for r in order if view.replicas[r].state == READY][:num_targets]
    samples = alive[~np.isin(view.replica_of[alive], targets)]
    if not len(samples):
        return ()
    return spread(samples, targets, [float(left[t]) for t in targets], np.ones(view.batch.num_samples))
