"""Prefixes that groups share, such as a system prompt: which replicas will have them, and placement that counts it.

A prefix is computed once on every replica that gets one of its prompts. Where groups of one prefix go to few replicas,
less is computed; where they go to many, load is even. Both are seconds here: a replica that lacks a prefix costs its
prefill.

Invariants: every sample gets a replica; without shared prefixes the placement is that of ``balanced_groups``.
"""

from __future__ import annotations

import numpy as np

from verl_rlhfless.policy.dedup import batch_prefixes
from verl_rlhfless.policy.dispatch import balanced_groups
from verl_rlhfless.policy.snapshot import Batch, FloatArray, IntArray


class PrefixBook:
    """Which of the batch's shared prefixes each of R replicas has computed, or will have by its prompts so far."""

    def __init__(self, batch: Batch, num_replicas: int) -> None:
        prefixes = batch_prefixes(batch)
        self._tokens = np.array(prefixes.node_tokens, dtype=np.float64)
        self._chain = [prefixes.tree.chain(group) for group in range(len(batch.prompt_ids))]
        self._group_of = batch.group_of
        self._has = np.zeros((len(self._tokens), num_replicas), dtype=bool)

    def known_tokens(self, sample: int) -> FloatArray:
        """Return [R] tokens of a sample's prompt that each replica has."""
        chain = self._chain[self._group_of[sample]]
        known: FloatArray = self._tokens[chain] @ self._has[chain]
        return known

    def add(self, sample: int, replica: int) -> None:
        """Note that a replica computes a sample's prompt."""
        self._has[self._chain[self._group_of[sample]], replica] = True


def affine_groups(batch: Batch, load: FloatArray, num_replicas: int, prefill_load: float) -> IntArray:
    """Return a placement that keeps groups together, evens out work, and counts the prefixes that it computes.

    Heaviest group first, each to the replica that has the least work with it.

    Args:
        batch: The prompts.
        load: [B] predicted work of each sample in tokens to decode.
        num_replicas: Equal replicas.
        prefill_load: Tokens that decode in the time in which one prompt token is computed.
    """
    if not batch.prefixes or num_replicas == 1:
        return balanced_groups(batch, load, [1.0] * num_replicas)
    num_groups = len(batch.prompt_ids)
    book, used = PrefixBook(batch, num_replicas), np.zeros(num_replicas)
    group_load = np.bincount(batch.group_of, weights=load, minlength=num_groups)
    prompt = batch.prompt_tokens[batch.leaders]
    members = np.split(np.argsort(batch.group_of, kind="stable"), np.cumsum(np.bincount(batch.group_of))[:-1])
    even = group_load.sum() / num_replicas  # a heavier group is split
    replica_of = np.empty(batch.num_samples, dtype=np.int64)
    for group in np.lexsort((np.arange(num_groups), -group_load)).tolist():
        pieces = max(1, min(len(members[group]), int(np.ceil(group_load[group] / max(even, 1e-9)))))
        for part in np.array_split(members[group], pieces):
            after = used + float(load[part].sum()) + prefill_load * (prompt[group] - book.known_tokens(int(part[0])))
            replica = int(after.argmin())
            replica_of[part] = replica
            used[replica] = after[replica]
            book.add(int(part[0]), replica)
    return replica_of
