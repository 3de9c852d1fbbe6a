"""Who does what at the start of a rollout on a given fleet: groups whole where that is as fast, else in pieces.

Invariants: every sample gets a replica; a group is split only when that saves more time than computing its prompt once
more costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from verl_rlhfless.policy.affinity import PrefixBook
from verl_rlhfless.policy.balance import Outlook, Workload, assign, run_starts
from verl_rlhfless.policy.perf import EnginePerf
from verl_rlhfless.policy.prediction import Prediction
from verl_rlhfless.policy.snapshot import Batch, IntArray

_LEAST_GAIN = 0.08
"""Least share of the time that a split must save: predictions are no better."""

_UNITS_PER_REPLICA = 8
"""With as many units for each replica, they are small enough to even out: groups are not split further."""

_SPLITS = (1, 2, 4, 8, 16)
"""Pieces of a group that are tried in turn."""


def place(batch: Batch, prediction: Prediction, perf: Sequence[EnginePerf], keeps_groups: bool) -> IntArray:
    """Return the replica of each sample, [B] int64, on idle replicas.

    Groups are split into ever smaller pieces, and the fewest pieces win that no further split beats by the least gain.
    The time counts the prompts that are then computed more than once.

    Args:
        batch: The prompts.
        prediction: Their lengths, [B].
        perf: Performance of each of R replicas.
        keeps_groups: Whether siblings find their prompt computed; without, every sample is placed for itself.
    """
    samples = np.argsort(batch.group_of, kind="stable")
    generated = np.zeros(batch.num_samples, dtype=np.int64)
    outlook = Outlook.build(prediction, batch, generated, samples, perf[0].shape)
    best: tuple[float, IntArray] | None = None
    for pieces in _SPLITS if keeps_groups else _SPLITS[-1:]:
        first = pieces_of(batch.group_of[samples], pieces)
        units = outlook.units(slice(None), first, batch.prompt_tokens[samples[first]].astype(np.float64))
        work = Workload(perf, outlook.width)
        book = PrefixBook(batch, work.num_replicas) if batch.prefixes and keeps_groups else None
        chosen = assign(work, units, book)
        end_s = float(work.end_s().max())
        if best is None or end_s < best[0] * (1 - _LEAST_GAIN):
            replica_of = np.empty(batch.num_samples, dtype=np.int64)
            replica_of[samples] = np.repeat(chosen, np.diff(first, append=len(samples)))
            best = end_s, replica_of
        if len(first) == len(samples) or len(first) >= _UNITS_PER_REPLICA * work.num_replicas:
            break
    assert best is not None
    return best[1]


def pieces_of(group_of: IntArray, pieces: int) -> IntArray:
    """Return [U] positions where pieces begin when every group is cut into ``pieces``, as equal as can be.

    Args:
        group_of: [N] int64, never decreasing.
        pieces: At least 1; a smaller group is cut into its samples.
    """
    start = run_starts(group_of)
    size = np.diff(start, append=len(group_of))
    count = np.minimum(pieces, size)
    group = np.repeat(np.arange(len(start)), count)  # of each piece
    piece = np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count)  # its number within the group
    small, longer = np.divmod(size, count)  # the first `longer` pieces have one sample more
    first: IntArray = start[group] + piece * small[group] + np.minimum(piece, longer[group])
    return first
