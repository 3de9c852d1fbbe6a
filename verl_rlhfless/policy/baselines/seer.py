"""Seer (OSDI'26): a static fleet.

Each group's first sample, its probe, goes first. Samples for which an engine has no slot are held back; as slots become
free, those of the longest groups follow, by what a group has generated so far. Divided rollout evens out load.

Its global KV pool lets a chunk continue anywhere without recomputation, so moves are free of prefill here. Left out:
grouped speculative decoding, and an order among the samples that have a slot but wait in an engine for KV blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from verl_rlhfless.policy.baselines.stock import StockSync
from verl_rlhfless.policy.dispatch import balanced_groups, longest_first
from verl_rlhfless.policy.snapshot import (
    READY,
    RUNNING,
    Batch,
    IntArray,
    Move,
    PoolSnapshot,
    Reaction,
    RolloutPlan,
    RolloutView,
)

LOOK_S = 1.0


class Divided:
    """Submit what is held back, longest groups first; then even out the replicas until they differ by at most one.

    The most advanced samples move first.
    """

    def react(self, view: RolloutView, plan: RolloutPlan) -> Reaction:
        """Return moves that fill free slots, or else even out the running samples."""
        alive = view.alive
        ready = [r.replica for r in view.replicas if r.state == READY]
        held = {replica: alive[view.replica_of[alive] == replica] for replica in ready}
        if not held:
            return Reaction(view.now_s + LOOK_S)
        back = alive[view.replica_of[alive] < 0]
        if len(back):
            filled = _submit(view, back, {replica: len(held[replica]) for replica in ready})
            return Reaction(view.now_s + LOOK_S, (), filled, 0, "longest groups first" if filled else "")
        level = len(alive) / len(ready)
        spare = [sample for r in ready for sample in self._surplus(view, held[r], int(np.ceil(level)))]
        moves = []
        for replica in sorted(ready, key=lambda r: len(held[r])):
            room = int(np.floor(level)) - len(held[replica])
            if room > 0 and spare:
                taken, spare = spare[:room], spare[room:]
                moves.append(Move(np.array(sorted(taken), dtype=np.int64), replica))
        return Reaction(view.now_s + LOOK_S, (), tuple(moves), 0, "evened out" if moves else "")

    def _surplus(self, view: RolloutView, samples: IntArray, keep: int) -> list[int]:
        running = samples[view.state[samples] == RUNNING]
        advanced = longest_first(running, view.generated.astype(np.float64))
        return [int(s) for s in advanced[: max(0, len(samples) - keep)]]


def _submit(view: RolloutView, back: IntArray, load: dict[int, int]) -> tuple[Move, ...]:
    """Return moves of held-back samples into free slots; a group is as long as its longest sample so far.

    A slot takes a sample of a group whose probe ran there, which finds its prompt computed, and any other if none is
    left.
    """
    group_of = view.batch.group_of
    length = np.zeros(len(view.batch.prompt_ids))
    np.maximum.at(length, group_of, view.generated)
    home = view.replica_of[view.batch.leaders][group_of]
    back = longest_first(back, length[group_of])
    moves = []
    for replica, used in sorted(load.items(), key=lambda item: (item[1], item[0])):
        free = max(0, view.pool.perf[view.replicas[replica].tp].limits.max_num_seqs - used)
        taken = back[np.argsort(home[back] != replica, kind="stable")][:free]
        back = back[~np.isin(back, taken)]
        if len(taken):
            moves.append(Move(np.sort(taken), replica))
    return tuple(moves)


@dataclass(frozen=True)
class Seer(StockSync):
    """Stock's fleet with group-aware placement and divided rollout."""

    name: str = "seer"

    def plan(self, memory: int, pool: PoolSnapshot, batch: Batch) -> RolloutPlan:
        """Return whole groups spread evenly, probes first, and what no engine has a slot for held back."""
        plan = super().plan(memory, pool, batch)
        is_probe = np.isin(np.arange(batch.num_samples), batch.leaders)
        order = np.lexsort((np.arange(batch.num_samples), ~is_probe))
        replica_of = balanced_groups(batch, np.ones(batch.num_samples), [1.0] * len(plan.fleet))
        for replica in range(len(plan.fleet)):
            mine = order[replica_of[order] == replica]
            replica_of[mine[pool.perf[memory].limits.max_num_seqs :]] = -1
        return replace(
            plan,
            replica_of=replica_of,
            order=order,
            has_kv_pool=True,
            first_look_s=LOOK_S,
            reason=f"static TP{memory}, probes first, divided rollout",
        )

    def policy(self, memory: int, batch: Batch) -> Divided:  # type: ignore[override]
        """Return the load balancer."""
        return Divided()
