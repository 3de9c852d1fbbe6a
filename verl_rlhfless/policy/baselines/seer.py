"""Seer (OSDI'26): a static fleet.

Probe requests give a group's length, longest groups go first, and divided rollout evens out load.

Its global KV pool lets a chunk continue anywhere without recomputation, so moves are free of prefill here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from verl_rlhfless.policy.baselines.stock import StockSync
from verl_rlhfless.policy.dispatch import balanced_groups
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
    """Move samples from the fullest replica to the emptiest until they differ by at most one.

    The least advanced groups last.
    """

    def react(self, view: RolloutView, plan: RolloutPlan) -> Reaction:
        """Return moves that even out the running samples."""
        alive = view.alive
        ready = [r.replica for r in view.replicas if r.state == READY]
        held = {replica: alive[view.replica_of[alive] == replica] for replica in ready}
        if not held:
            return Reaction(view.now_s + LOOK_S)
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
        longest_first = running[np.lexsort((running, -view.generated[running]))]
        return [int(s) for s in longest_first[: max(0, len(samples) - keep)]]


@dataclass(frozen=True)
class Seer(StockSync):
    """Stock's fleet with group-aware placement and divided rollout."""

    name: str = "seer"

    def plan(self, memory: int, pool: PoolSnapshot, batch: Batch) -> RolloutPlan:
        """Return whole groups spread evenly, each group's first sample (the probe) submitted first."""
        plan = super().plan(memory, pool, batch)
        first_of_group = np.unique(batch.group_of, return_index=True)[1]
        is_probe = np.isin(np.arange(batch.num_samples), first_of_group)
        return replace(
            plan,
            replica_of=balanced_groups(batch, np.ones(batch.num_samples), [1.0] * len(plan.fleet)),
            order=np.lexsort((np.arange(batch.num_samples), ~is_probe)),
            has_kv_pool=True,
            first_look_s=LOOK_S,
            reason=f"static TP{memory}, probes first, divided rollout",
        )

    def policy(self, memory: int) -> Divided:  # type: ignore[override]
        """Return the load balancer."""
        return Divided()
