"""Which replica of a planned fleet each sample goes to: lane by lane, siblings together while that pays.

Invariants: every sample gets exactly one replica, of the lane that its unit was planned for.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from verl_rlhfless.policy.affinity import affine_groups
from verl_rlhfless.policy.dispatch import least_requests, longest_first
from verl_rlhfless.policy.fleets import Candidate, LaneFleet
from verl_rlhfless.policy.prediction import Prediction
from verl_rlhfless.policy.snapshot import Batch, FloatArray, IntArray, PoolSnapshot
from verl_rlhfless.policy.stages import rank_share
from verl_rlhfless.policy.units import Units

_ON_TIME = 1 + 1e-3
"""Factor by which a sample may end after the last one expected: a thousandth is no delay."""


def place_lanes(pool: PoolSnapshot, batch: Batch, chosen: Candidate, outlook: tuple[Units, Prediction]) -> IntArray:
    """Return the replica of each sample, [B]: groups stay together, lanes apart, load evened out in a lane.

    Lanes take units in their order, longest predicted first, and replica ids in that of the fleet. On a resident fleet
    nobody gains from replicas that end early, and groups are split where that evens out enough.
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
    known, which evens load out. Siblings are alike, so that most of them stay together.

    Args:
        load: [B] predicted tokens of each sample.
        fleet: Equal replicas, and samples that each runs at once.
        ranked: How well the samples are known apart (``rank_share``).
    """
    order = longest_first(np.arange(len(load)), load)
    _, last_tokens = _fill_in_time(order, load, fleet, 0.0)
    return _fill_in_time(order, load, fleet, ranked * last_tokens)[0]


def _fill_in_time(order: IntArray, load: FloatArray, fleet: tuple[int, int], in_time: float) -> tuple[IntArray, float]:
    """Return the replica of each sample, [B], and the end of the last one; times are in tokens of one slot.

    Args:
        order: [B] ids in the order in which samples take slots.
        load: [B] predicted tokens of each sample.
        fleet: Equal replicas, and samples that each runs at once.
        in_time: When a sample should end; with 0 each goes to the slot that is free first.
    """
    num_replicas, slots = fleet
    replica_of = np.empty(len(load), dtype=np.int64)
    ends = [[0.0] * slots for _ in range(num_replicas)]  # of each replica's slots, a heap
    free, used = np.zeros(num_replicas), [0.0] * num_replicas  # the first of ends, and all tokens, of each replica
    next_free = [(0.0, 0.0, replica) for replica in range(num_replicas)]  # a heap; a sample leaves an old entry stale
    for sample in order.tolist():
        tokens = float(load[sample])
        fits = free + tokens <= in_time * _ON_TIME
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
    return replica_of, max(map(max, ends))


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
    """Return the samples of a batch where ``mask``, [B], holds, and the groups that have any."""
    groups, group_of = np.unique(batch.group_of[mask], return_inverse=True)
    ids = tuple(batch.prompt_ids[g] for g in groups.tolist())
    prefixes = tuple(batch.prefixes[g] for g in groups.tolist()) if batch.prefixes else ()
    return replace(
        batch,
        prompt_ids=ids,
        group_of=group_of.astype(np.int64),
        prompt_tokens=batch.prompt_tokens[mask],
        prefixes=prefixes,
    )
