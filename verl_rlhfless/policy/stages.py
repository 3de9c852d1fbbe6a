"""The time and cost of running a population of samples on a fleet that may change as samples finish.

A dynamic programme over depth.

All samples of a lane decode side by side, so "how far" is one number: the depth, tokens generated so far. Between two
depths the lane runs one option (tensor-parallel size x count); at a depth it may shrink (the cut samples are
recomputed on the rest) or move to another option (grant, wake or cold start and weight load are leased on top).
Viterbi over depths gives, for every option to start with and every price of time, the best future. The planner starts
a lane with it; the migration policy asks it again with what is alive now.

Invariants: pure; no option leases more than the budget; with a price of 0 for time the cost is least, with a high one
the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from verl_rlhfless.policy.snapshot import FloatArray, PoolSnapshot

NUM_DEPTHS = 18


@dataclass(frozen=True, slots=True)
class Options:
    """Homogeneous fleets a lane may run on: ``tp`` and ``count`` are [M] int64, ``gpus`` their product."""

    tp: NDArray[np.int64]
    count: NDArray[np.int64]

    @property
    def gpus(self) -> NDArray[np.int64]:
        """GPUs of each option, [M]."""
        return self.tp * self.count

    def index(self, tp: int, count: int) -> int:
        """Return the position of one option."""
        return int(np.flatnonzero((self.tp == tp) & (self.count == count))[0])


@dataclass(frozen=True, slots=True)
class Lane:
    """A population that runs together.

    Attributes:
        edges: [K+1] depths in further tokens, increasing from 0.
        alive: [K] expected samples alive in the middle of each interval.
        context: Mean context at depth 0.
        prefill_tokens: Prompt tokens to compute at the start.
    """

    edges: FloatArray
    alive: FloatArray
    context: float
    prefill_tokens: float


@dataclass(frozen=True, slots=True)
class Frontier:
    """Best futures by (price of time, option to start with).

    ``time_s`` and ``gpu_s`` are [P, M]; ``first`` [P, M] is the option of the first interval (it differs from the
    start where changing at once pays) and ``gain`` what changing at once saves against changing after the first
    interval or later, as a share of what the first interval is worth.
    """

    time_s: FloatArray
    gpu_s: FloatArray
    first: NDArray[np.int64]
    gain: FloatArray


def options_for(pool: PoolSnapshot, extra: tuple[tuple[int, int], ...] = ()) -> Options:
    """Return the options of a pool.

    Every legal size with 1, 2, 3, 4, 6, 8, 12, 16 ... replicas, the whole budget, and ``extra``.
    """
    pairs = set(extra)
    for tp in pool.perf:
        most = pool.num_gpus // tp
        counts = {most} | {c << e for c in (2, 3) for e in range(12) if c << e <= most}
        pairs |= {(tp, count) for count in counts | {1} if count >= 1}
    ordered = sorted(pairs)
    return Options(np.array([tp for tp, _ in ordered]), np.array([count for _, count in ordered]))


def depth_edges(max_tokens: int) -> FloatArray:
    """Return [K+1] depths from 0 to ``max_tokens``, finer at the start."""
    return max_tokens * np.linspace(0.0, 1.0, NUM_DEPTHS + 1) ** 2.2


def frontier(pool: PoolSnapshot, options: Options, lane: Lane, prices: FloatArray) -> Frontier:
    """Return the best futures of a lane.

    Args:
        pool: Performance, warm engines, lease times.
        options: Where it may run.
        lane: The population.
        prices: [P] GPU-seconds that one second is worth.
    """
    stage_s = _stage_times(pool, options, lane)
    gpus = options.gpus.astype(float)
    worth_of_time = prices[:, None]
    time_s = np.zeros((len(prices), len(gpus)))
    gpu_s = np.zeros_like(time_s)
    row, own = np.arange(len(prices))[:, None], np.arange(len(gpus))[None, :]
    depth = np.concatenate(([0.0], (lane.edges[:-1] + lane.edges[1:])[:-1] / 2))
    moves = _Moves.build(pool, options)
    best = np.broadcast_to(own, time_s.shape)
    gain = np.zeros_like(time_s)
    for k in range(len(lane.alive) - 1, -1, -1):
        here_t = stage_s[k] + time_s
        here_g = stage_s[k] * gpus + gpu_s
        worth = here_g + worth_of_time * here_t
        is_any = -math.expm1(-lane.alive[k])
        moved = float(lane.alive[k]) * (lane.context + depth[k]) * is_any
        total = worth[:, None, :] + moved * (moves.gpu_s_per_token + prices[:, None, None] * moves.s_per_token)
        total += is_any * moves.start_gpu_s
        best = np.argmin(total, axis=2)
        if k == 0:
            gain = (worth - total.min(axis=2)) / np.maximum(stage_s[k] * (gpus + worth_of_time), 1e-12)
        time_s = here_t[row, best] + moved * moves.s_per_token[own, best]
        gpu_s = here_g[row, best] + moved * moves.gpu_s_per_token[own, best] + is_any * moves.start_gpu_s[own, best]
    start_s = lane.prefill_tokens * _prefill(pool, options) / options.count
    return Frontier(time_s + start_s, gpu_s + start_s * gpus, best, gain)


def stay(pool: PoolSnapshot, options: Options, lane: Lane) -> tuple[FloatArray, FloatArray]:
    """Return [M] seconds and GPU-seconds of each option when it is never changed."""
    stage_s = _stage_times(pool, options, lane).sum(axis=0)
    total = stage_s + lane.prefill_tokens * _prefill(pool, options) / options.count
    return total, total * options.gpus


def _stage_times(pool: PoolSnapshot, options: Options, lane: Lane) -> FloatArray:
    """Return [K, M] expected seconds of each interval on each option.

    Weighted by the chance that anything is alive.
    """
    width = np.diff(lane.edges)
    middle = (lane.edges[:-1] + lane.edges[1:]) / 2
    is_any = -np.expm1(-lane.alive)
    given = np.maximum(lane.alive / np.maximum(is_any, 1e-9), 1.0)
    stage = np.empty((len(width), len(options.tp)))
    for tp in np.unique(options.tp).tolist():
        of = np.flatnonzero(options.tp == tp)
        # replicas end unevenly: the fullest has about one standard deviation more than the mean
        mean = given[:, None] / options.count[of]
        fullest = np.where(options.count[of] > 1, np.ceil(mean - 1e-9), mean)
        iteration = pool.perf[tp].fluid_iteration_s(fullest, (lane.context + middle)[:, None])
        stage[:, of] = iteration * (width * is_any)[:, None]
    return stage


def _prefill(pool: PoolSnapshot, options: Options) -> FloatArray:
    return np.array([pool.perf[int(tp)].prefill_s_per_token for tp in options.tp])


@dataclass(frozen=True, slots=True)
class _Moves:
    """What a change from option i to j takes, [M, M]: per token of moved context, and to start fresh replicas.

    Huge = forbidden.
    """

    s_per_token: FloatArray
    gpu_s_per_token: FloatArray
    start_gpu_s: FloatArray

    @classmethod
    def build(cls, pool: PoolSnapshot, options: Options) -> _Moves:
        times, gpus = pool.trainer.times, options.gpus
        is_same_tp = options.tp[:, None] == options.tp[None, :]
        ratio = options.count[:, None] / options.count[None, :]
        kept = np.where(is_same_tp, np.minimum(1.0 / ratio, ratio), 0.0)
        s_per_token = (1 - kept) * _prefill(pool, options)[None, :] / options.count[None, :]
        fresh = np.where(is_same_tp, np.maximum(0, gpus[None, :] - gpus[:, None]), gpus[None, :])
        load = np.array([pool.perf[int(tp)].load_s for tp in options.tp])
        warm = np.array([pool.warm.get(int(tp), 0) for tp in options.tp])
        start = np.where(fresh <= warm[None, :], times.wake_s, times.cold_start_s) + load[None, :]
        is_allowed = gpus[:, None] + fresh <= pool.num_gpus
        start_gpu_s = np.where(is_allowed, fresh * start, 1e15)
        return cls(s_per_token, s_per_token * gpus[None, :], start_gpu_s)
