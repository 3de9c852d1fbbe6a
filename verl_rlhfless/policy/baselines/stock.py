"""Stock verl: one static colocated fleet of one tensor-parallel size, every GPU leased through the whole step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from verl_rlhfless.policy.arm import Outcome
from verl_rlhfless.policy.dispatch import least_requests
from verl_rlhfless.policy.snapshot import NEVER, Batch, PoolSnapshot, Reaction, RolloutPlan, RolloutView


class NoReaction:
    """Never changes a running rollout."""

    def react(self, view: RolloutView, plan: RolloutPlan) -> Reaction:
        """Return nothing to do, and no next look."""
        return Reaction(next_look_s=NEVER)


@dataclass(frozen=True)
class StockSync:
    """verl's synchronous trainer. ``tp`` ``None`` = the smallest size that fits, verl's default."""

    tp: int | None = None
    name: str = "stock_sync"

    def begin(self, pool: PoolSnapshot, first: Batch) -> int:
        """Return the tensor-parallel size, which is held for the run."""
        return min(pool.perf) if self.tp is None else self.tp

    def layout(self, memory: int, pool: PoolSnapshot) -> Mapping[int, int]:
        """Return one engine set over the trainer's GPUs."""
        return {memory: pool.trainer.num_gpus // memory}

    def plan(self, memory: int, pool: PoolSnapshot, batch: Batch) -> RolloutPlan:
        """Return the same fleet in every step; requests go to the server with the fewest in flight."""
        count = pool.trainer.num_gpus // memory
        return RolloutPlan(
            fleet=(memory,) * count,
            replica_of=least_requests(batch, count),
            order=np.arange(batch.num_samples),
            is_resident=True,
            is_static=True,
            reason=f"static colocated fleet, TP{memory}",
        )

    def policy(self, memory: int, batch: Batch) -> NoReaction:
        """Return a policy that does nothing."""
        return NoReaction()

    def learn(self, memory: int, outcome: Outcome) -> int:
        """Return the memory unchanged."""
        return memory
