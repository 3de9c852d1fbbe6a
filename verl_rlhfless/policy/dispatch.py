"""Which replica a sample goes to.

Invariants: every sample gets exactly one replica; ties go by sample id, then by replica id.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from verl_rlhfless.errors import ReplicaError
from verl_rlhfless.policy.snapshot import (
    GONE,
    Batch,
    FloatArray,
    IntArray,
    Move,
    PoolSnapshot,
    ReplicaView,
    RolloutView,
)

TURN_TOKENS = 256
"""What the next turn of a session is taken to add, before it is known."""


def least_requests(batch: Batch, num_replicas: int) -> IntArray:
    """Return stock verl's placement: every request to the replica with the fewest in flight, in batch order.

    Siblings spread.
    """
    return np.arange(batch.num_samples, dtype=np.int64) % num_replicas


def balanced_groups(batch: Batch, load: FloatArray, capacity: Sequence[float]) -> IntArray:
    """Return a placement that keeps groups together and evens out ``load / capacity``, heaviest group first.

    Keeping siblings together prefills a prompt once. A group is split over replicas only when it is too big for an
    even share.

    Args:
        batch: The prompts.
        load: [B] predicted work of each sample.
        capacity: Relative speed of each replica.
    """
    num_groups = len(batch.prompt_ids)
    group_load = np.bincount(batch.group_of, weights=load, minlength=num_groups)
    share = np.bincount(batch.group_of, minlength=num_groups)
    heap = [(0.0, replica) for replica in range(len(capacity))]
    limit = group_load.sum() / sum(capacity)
    largest = limit * max(capacity)  # even share of the fastest replica
    pieces = np.minimum(np.ceil(group_load / largest), share).astype(np.int64) if largest > 0 else np.ones_like(share)
    order = np.lexsort((np.arange(num_groups), -group_load))

    def give(added: float) -> int:
        """Return the least loaded replica, which takes a load."""
        used, replica = heap[0]
        heapq.heapreplace(heap, (used + added / capacity[replica], replica))
        return replica

    of_group = np.zeros(num_groups, dtype=np.int64)
    of_part: list[tuple[IntArray, int]] = []
    for group, added, heavy in zip(order.tolist(), group_load[order].tolist(), pieces[order].tolist(), strict=True):
        if heavy <= 1:
            of_group[group] = give(added)
            continue
        for part in np.array_split(np.flatnonzero(batch.group_of == group), heavy):
            of_part.append((part, give(float(load[part].sum()))))
    replica_of: IntArray = of_group[batch.group_of]
    for part, replica in of_part:
        replica_of[part] = replica
    return replica_of


def equal_length_blocks(batch: Batch, predicted: FloatArray, num_replicas: int) -> IntArray:
    """Return RLHFless' placement: groups sorted by predicted length, cut into blocks of equally many samples.

    Prompts of similar length share an actor, so that actors with short ones end early (arXiv 2602.22718, prompt
    assignment). Predictions only rank the prompts there, so a block's size does not depend on them.
    """
    num_groups = len(batch.prompt_ids)
    count = np.bincount(batch.group_of, minlength=num_groups)
    mean = np.bincount(batch.group_of, weights=predicted, minlength=num_groups) / np.maximum(count, 1)
    order = np.lexsort((np.arange(num_groups), mean))
    filled = np.cumsum(count[order]) - count[order] / 2
    replica = np.minimum((filled * num_replicas / batch.num_samples).astype(np.int64), num_replicas - 1)
    of_group = np.empty(num_groups, dtype=np.int64)
    of_group[order] = replica
    placed: IntArray = of_group[batch.group_of]
    return placed


def longest_first(samples: IntArray, predicted: FloatArray) -> IntArray:
    """Return ``samples`` with the longest predicted first, ties by id."""
    ordered: IntArray = samples[np.lexsort((samples, -predicted[samples]))]
    return ordered


def spread(samples: IntArray, targets: Sequence[int], load: Sequence[float], weight: FloatArray) -> tuple[Move, ...]:
    """Return moves that send ``samples`` (heaviest first) to the least loaded of ``targets``.

    Args:
        samples: Ids to place.
        targets: Replica ids.
        load: Present load of each target, in the unit of ``weight``.
        weight: [B] work of each sample.
    """
    heap = [(value, position) for position, value in enumerate(load)]
    heapq.heapify(heap)
    chosen: list[list[int]] = [[] for _ in targets]
    for sample in longest_first(samples, weight).tolist():
        used, position = heapq.heappop(heap)
        chosen[position].append(sample)
        heapq.heappush(heap, (used + float(weight[sample]), position))
    return tuple(
        Move(np.array(sorted(ids), dtype=np.int64), target) for ids, target in zip(chosen, targets, strict=True) if ids
    )


def rebind(pool: PoolSnapshot, usable: Sequence[ReplicaView], home: int, context_tokens: int) -> int:
    """Return the replica on which a session's next turn ends first; its ``home`` has its context cached.

    A turn is taken to be as long as ``TURN_TOKENS``: leaving home costs the context's prefill once, a fuller replica
    costs more in every iteration.

    Args:
        pool: Performance by tensor-parallel size.
        usable: Replicas that may take it, ``home`` among them.
        home: Where the session's last turn ran.
        context_tokens: Its prompt and generated tokens.
    """

    def seconds(replica: ReplicaView) -> float:
        perf = pool.perf[replica.tp]
        running = replica.num_running + 1
        takes_turns = max(1.0, (running + replica.num_waiting) / perf.limits.max_num_seqs)
        decode_s = perf.iteration_s(running, replica.context_tokens + context_tokens) * takes_turns * TURN_TOKENS
        return decode_s + (0.0 if replica.replica == home else perf.move_s(context_tokens, pool.has_kv_transfer))

    return min(usable, key=lambda r: (seconds(r), r.replica != home, r.replica)).replica


def place_orphans(view: RolloutView, lost: IntArray, fleet: Sequence[int]) -> tuple[tuple[int, ...], tuple[Move, ...]]:
    """Return ``(starts, moves)`` for samples whose replica was lost.

    The least loaded survivors, or a new replica when none is left.

    Raises:
        ReplicaError: None is left, and ``fleet`` names no size of a new one.
    """
    alive = [replica for replica in view.replicas if replica.state != GONE]
    weight = np.ones(view.batch.num_samples)
    if not alive and not fleet:
        raise ReplicaError(f"{len(lost)} samples lost the last replica. Look for the replicas' errors above.")
    if not alive:
        return (min(fleet),), (Move(lost, len(view.replicas)),)
    load = [(r.num_waiting + r.num_running) / r.tp for r in alive]
    return (), spread(lost, [r.replica for r in alive], load, weight)
