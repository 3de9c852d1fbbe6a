"""Time and cost of running a population of samples on a fleet that may change as samples finish: dynamic programming.

All samples of a lane decode side by side, so "how far" is one number: the depth, tokens generated so far. Between two
depths the lane runs one option (tensor-parallel size x count); at a depth it may shrink (the cut samples are
recomputed on the rest) or move to another option (grant, wake or cold start and weight load are leased on top).
Viterbi over depths gives, for every option to start with and every price of time, the best future. The planner starts
a lane with it; the migration policy asks it again with what is alive now.

Invariants: pure; no option but those asked for leases more than the budget; with a price of 0 for time the cost is
least, with a high one the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from verl_rlhfless.policy.snapshot import FloatArray, IntArray, PoolSnapshot

NUM_DEPTHS = 18
"""Intervals of depth (K): a fleet changes between two of them, if at all."""

_FINER_AT_START = 2.2
"""Exponent of the depths: intervals are narrower at the start, where more samples are alive."""

_FORBIDDEN = 1e15
"""GPU-seconds of a change that is not allowed: more than any future costs."""

_TINY = 1e-9
"""Least divisor, where nothing is left to divide."""


@dataclass(frozen=True)
class Options:
    """M homogeneous fleets that a lane may run on, sorted by size: ``tp`` and ``count`` are [M] int64."""

    tp: NDArray[np.int64]
    count: NDArray[np.int64]

    @cached_property
    def gpus(self) -> NDArray[np.int64]:
        """GPUs of each option, [M]."""
        return self.tp * self.count

    @cached_property
    def sizes(self) -> list[tuple[int, slice]]:
        """Each tensor-parallel size, and the slice of the options that have it."""
        tps, first = np.unique(self.tp, return_index=True)
        ends = [*first.tolist()[1:], len(self.tp)]
        return [(tp, slice(*part)) for tp, *part in zip(tps.tolist(), first.tolist(), ends, strict=True)]

    def by_size(self, value: Callable[[int], float]) -> FloatArray:
        """Return [M] values that a tensor-parallel size alone decides."""
        return np.repeat([value(tp) for tp, _ in self.sizes], [part.stop - part.start for _, part in self.sizes])

    @cached_property
    def blocks(self) -> tuple[Options, ...]:
        """The options of each size, in the order of ``sizes``."""
        return tuple(Options(self.tp[part], self.count[part]) for _, part in self.sizes)

    @cached_property
    def changes(self) -> tuple[FloatArray, IntArray]:
        """Of a change from option i to j, [M, M]: the share of samples that is cut, and GPUs with fresh replicas.

        Between n and N > n replicas of one size, either way, ``1 - n / N`` of the samples move; to another size all.
        """
        is_same_tp = self.tp[:, None] == self.tp
        ratio = self.count[:, None] / self.count
        cut = 1 - np.where(is_same_tp, np.minimum(1.0 / ratio, ratio), 0.0)
        fresh: IntArray = np.where(is_same_tp, np.maximum(0, self.gpus - self.gpus[:, None]), self.gpus)
        return cut, fresh

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
        is_any: [K] probability that any sample is alive in the middle of each interval.
        ranked: How well the samples are known apart (``rank_share``).
    """

    edges: FloatArray
    alive: FloatArray
    context: float
    prefill_tokens: float
    is_any: FloatArray
    ranked: float

    @property
    def width(self) -> FloatArray:
        """Tokens of each interval, [K]."""
        return np.diff(self.edges)

    @property
    def middle(self) -> FloatArray:
        """Depth in the middle of each interval, [K]."""
        return middle_of(self.edges)


@dataclass(frozen=True, slots=True)
class Frontier:
    """Best futures by price of time (P) and option to start with (M).

    Attributes:
        time_s / gpu_s: [P, M] expected seconds and GPU-seconds until the last sample ends.
        first: [P, M] option of the first interval; it differs from the start where changing at once pays.
        gain: [P, M] what changing at once saves against staying for the first interval and changing later or never, as
            a share of what the first interval costs (GPU-seconds, and those that its time is worth).
    """

    time_s: FloatArray
    gpu_s: FloatArray
    first: NDArray[np.int64]
    gain: FloatArray


def options_for(
    pool: PoolSnapshot, extra: tuple[tuple[int, int], ...] = (), sizes: tuple[int, ...] | None = None
) -> Options:
    """Return the options of a pool.

    Every one of ``sizes`` (``None`` = every legal one) that fits, with 1, 2, 3, 4, 6, 8, 12, 16 ... replicas, the whole
    budget, and ``extra``.
    """
    return _options(pool.num_gpus, tuple(pool.perf) if sizes is None else sizes, extra)


@lru_cache(maxsize=256)
def _options(num_gpus: int, sizes: tuple[int, ...], extra: tuple[tuple[int, int], ...]) -> Options:
    pairs = set(extra)
    for tp in (tp for tp in sizes if tp <= num_gpus):
        most = num_gpus // tp
        counts = {1, most} | {c << e for c in (2, 3) for e in range(12) if c << e <= most}
        pairs |= {(tp, count) for count in counts}
    ordered = sorted(pairs)
    return Options(np.array([tp for tp, _ in ordered]), np.array([count for _, count in ordered]))


def rank_share(mu: FloatArray, sigma: FloatArray) -> float:
    """Return the correlation of predicted and true log lengths: 1 = known exactly, 0 = any may be the longest."""
    known = float(mu.var())
    return math.sqrt(known / max(known + float((sigma * sigma).mean()), 1e-12))


def depth_edges(max_tokens: int) -> FloatArray:
    """Return [K+1] depths from 0 to ``max_tokens``, finer at the start."""
    return max_tokens * np.linspace(0.0, 1.0, NUM_DEPTHS + 1) ** _FINER_AT_START


def middle_of(edges: FloatArray) -> FloatArray:
    """Return [K] depths in the middle of the intervals between [K+1] ``edges``."""
    middle: FloatArray = (edges[:-1] + edges[1:]) / 2
    return middle


def longest_depth(edges: FloatArray, alive: FloatArray) -> float:
    """Return the depth at which the longest of a population probably ends: half a sample is alive until then.

    Args:
        edges: [K+1] depths.
        alive: [K] expected samples alive in the middle of each interval.
    """
    return float(edges[1:][np.flatnonzero(alive >= min(0.5, alive[0]))[-1]])


def frontier(pool: PoolSnapshot, options: Options, lane: Lane, prices: FloatArray) -> Frontier:
    """Return the best futures of a lane that may shrink, grow and change its tensor-parallel size.

    Args:
        pool: Performance, warm engines, lease times.
        options: Where it may run.
        lane: The population.
        prices: [P] GPU-seconds that one second is worth.
    """
    return _frontiers(pool, options, (lane,), prices, can_start=True)[0]


def shrinking(pool: PoolSnapshot, options: Options, lanes: Sequence[Lane], prices: FloatArray) -> list[Frontier]:
    """Return the best futures of lanes that run side by side: each may only shrink, so the budget holds for ever.

    Arguments as in ``frontier``.
    """
    return _frontiers(pool, options, lanes, prices, can_start=False)


def _frontiers(
    pool: PoolSnapshot, options: Options, lanes: Sequence[Lane], prices: FloatArray, *, can_start: bool
) -> list[Frontier]:
    """Return the futures of each lane; where nothing may start, changes stay among the options of one size."""
    if can_start:
        blocks = [(slice(0, len(options.tp)), options)]
    else:
        blocks = [(part, block) for (_, part), block in zip(options.sizes, options.blocks, strict=True)]
    shape = (len(lanes), len(prices), len(options.tp))
    time_s, gpu_s, gain = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    first = np.zeros(shape, dtype=np.int64)
    stage_s = np.stack([stage_times(pool, options, lane) for lane in lanes])
    alive, is_any = np.stack([lane.alive for lane in lanes]), np.stack([lane.is_any for lane in lanes])
    context = np.array([lane.context for lane in lanes])
    # [L, K] where a change before each interval finds the samples: in the middle of the interval before
    depth = np.stack([np.concatenate(([0.0], lane.middle[:-1])) for lane in lanes])
    moved = alive * (context[:, None] + depth) * is_any
    for part, block in blocks:
        moves = _Moves.build(pool, block, max(float(context.mean()), 1.0), can_start=can_start)
        best = _viterbi(stage_s[:, :, part], (is_any, moved), moves, prices)
        time_s[:, :, part], gpu_s[:, :, part], gain[:, :, part] = best[0], best[1], best[3]
        first[:, :, part] = part.start + best[2]
    start_s = np.array([lane.prefill_tokens for lane in lanes])[:, None, None] * _prefill(pool, options) / options.count
    time_s, gpu_s = time_s + start_s, gpu_s + start_s * options.gpus
    return [Frontier(*row) for row in zip(time_s, gpu_s, first, gain, strict=True)]


def _viterbi(
    stage_s: FloatArray, population: tuple[FloatArray, FloatArray], moves: _Moves, prices: FloatArray
) -> tuple[FloatArray, FloatArray, IntArray, FloatArray]:
    """Return seconds, GPU-seconds, first option and gain, each [L, P, M], of the best future from depth 0.

    From the last interval back to the first, what is worth least from option i on::

        value[k, i] = min over j of change[k, i, j] + stage[k, j] + value[k + 1, j]

    all in GPU-seconds, with those that time is worth. A start does not add to the time: the lane runs on meanwhile.

    Args:
        stage_s: [L, K, M] seconds of each interval on each option.
        population: [L, K] probability that any sample is alive, and tokens that a change would move.
        moves: Prices of changes.
        prices: [P] GPU-seconds that one second is worth.
    """
    is_any, moved = population
    worth_of_time = prices[:, None]  # [P, 1]
    change_s = moved[:, :, None, None] * moves.s_per_token
    per_token = moves.gpu_s_per_token + prices[:, None, None] * moves.s_per_token
    tokens, is_any = moved[:, :, None, None, None], is_any[:, :, None, None, None]
    stage = stage_s[:, :, None, :]  # [L, K, 1, M]
    stage_worth = stage * (moves.gpus + worth_of_time)
    time_s = np.zeros((len(stage_s), len(prices), len(moves.gpus)))
    value, lane, row = np.zeros_like(time_s), np.arange(len(stage_s))[:, None, None], np.arange(len(prices))[:, None]
    own = np.arange(len(moves.gpus))
    for k in range(stage_s.shape[1] - 1, -1, -1):
        worth = stage_worth[:, k] + value  # [L, P, M] of going on with an option, the change to it apart
        total = tokens[:, k] * per_token  # [L, P, M, M] small enough to stay in the processor's cache
        total += is_any[:, k] * moves.start_gpu_s
        total += worth[:, :, None, :]
        best = total.argmin(axis=3)
        value = total[lane, row, own, best]
        time_s = (stage[:, k] + time_s)[lane, row, best] + change_s[:, k][lane, own, best]
    # at depth 0, staying costs `worth` and the best change `value`
    gain = (worth - value) / np.maximum(stage_worth[:, 0], 1e-12)
    return time_s, value - worth_of_time * time_s, best, gain


def stay(pool: PoolSnapshot, options: Options, lane: Lane) -> tuple[FloatArray, FloatArray]:
    """Return [M] seconds and GPU-seconds of each option when it is never changed."""
    stage_s = stage_times(pool, options, lane).sum(axis=0)
    total = stage_s + lane.prefill_tokens * _prefill(pool, options) / options.count
    return total, total * options.gpus


def stage_times(pool: PoolSnapshot, options: Options, lane: Lane) -> FloatArray:
    """Return [K, M] expected seconds of each interval on each option.

    Those of the samples expected to be alive given that any is, times the probability that any is.
    """
    given = np.maximum(lane.alive / np.maximum(lane.is_any, _TINY), 1.0)
    slots = options.by_size(lambda tp: pool.perf[tp].limits.max_num_seqs)
    mean = _queued_follow(given[:, None] / options.count, slots, options, lane)
    # a sample is on one replica: the fullest, which ends last, runs the mean rounded up
    running = np.maximum(np.minimum(np.ceil(mean - 1e-9), slots), mean)
    fullest = np.where(options.count > 1, running, mean)
    context = (lane.context + lane.middle)[:, None]
    stage = np.empty_like(mean)
    for tp, part in options.sizes:
        stage[:, part] = pool.perf[tp].fluid_iteration_s(fullest[:, part], context)
    expected: FloatArray = stage * (lane.width * lane.is_any)[:, None]
    return expected


def _queued_follow(mean: FloatArray, slots: FloatArray, options: Options, lane: Lane) -> FloatArray:
    """Return [K, M] samples of one replica when those beyond its slots take the place of those that end.

    Without order they share the slots in turns, all the way: that is exact for lengths without memory. Longest first,
    what waits is short and fits in beside the longest, as far as slots are free by then; it begins where the first one
    ends, which is as deep as the longest that waits, so that it ends no earlier than twice as deep.

    Work (samples times tokens) that is ``over`` the slots thus goes where slots are ``free``, in proportion to what is
    free there: the share ``ranked`` of it, as only what is known apart can be ordered.

    Args:
        mean: [K, M] samples of each interval on one of an option's replicas.
        slots: [M] samples that a replica runs at once.
        options: Where the lane may run.
        lane: The population.
    """
    over, free = np.maximum(mean - slots, 0.0), np.maximum(slots - mean, 0.0)
    if not over.any():
        return mean
    tokens = lane.width * lane.is_any  # [K]; below all [M]
    queued, room = tokens @ over, np.maximum(tokens @ free, _TINY)
    # how much deeper than the lane what waits would end: twice the depth of the longest that waits, less the lane's
    late = np.maximum(2 * (tokens @ np.minimum(over * options.count, 1.0)) - tokens.sum(), 0.0)
    follow = lane.ranked * np.maximum(np.minimum(room, queued - slots * late), 0.0)
    placed: FloatArray = mean - over * (follow / np.maximum(queued, _TINY)) + free * (follow / room)
    return placed


def _prefill(pool: PoolSnapshot, options: Options) -> FloatArray:
    """Return [M] seconds of one replica for a prompt token."""
    return options.by_size(lambda tp: pool.perf[tp].prefill_s_per_token)


@dataclass(frozen=True, slots=True)
class _Moves:
    """What a change from option i to j takes.

    Attributes:
        gpus: [M] GPUs of each option.
        s_per_token: [M, M] seconds for each token of the lane's context at that depth, the share that is cut included.
        gpu_s_per_token: [M, M] the same in GPU-seconds of option j.
        start_gpu_s: [M, M] GPU-seconds of fresh replicas until they are usable; ``_FORBIDDEN`` where not allowed.
    """

    gpus: IntArray
    s_per_token: FloatArray
    gpu_s_per_token: FloatArray
    start_gpu_s: FloatArray

    @classmethod
    def build(cls, pool: PoolSnapshot, options: Options, context: float, *, can_start: bool) -> _Moves:
        times, gpus = pool.trainer.times, options.gpus
        cut, fresh = options.changes
        move = options.by_size(lambda tp: pool.perf[tp].move_s(context, pool.has_kv_transfer) / context)
        s_per_token = cut * (move / options.count)
        load = options.by_size(lambda tp: pool.perf[tp].load_s)
        warm = options.by_size(lambda tp: pool.warm.get(tp, 0))
        start = np.where(fresh <= warm[None, :], times.wake_s, times.cold_start_s) + load[None, :]
        is_allowed = (fresh == 0) | (can_start & (gpus[:, None] + fresh <= pool.num_gpus))
        start_gpu_s = np.where(is_allowed, fresh * start, _FORBIDDEN)
        return cls(gpus, s_per_token, s_per_token * gpus[None, :], start_gpu_s)
