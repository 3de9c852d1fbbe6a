"""RLHFuse (arXiv 2409.13221).

A static fleet, a global cut of the tail, and fusion of later stages onto the freed GPUs.

Nothing is given back. R_t (share of unfinished samples) and m (instances that keep the tail) come from a grid that
the simulator tunes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from verl_rlhfless.policy.baselines.stock import StockSync
from verl_rlhfless.policy.fuse import fits
from verl_rlhfless.policy.paper_rules import global_cut
from verl_rlhfless.policy.snapshot import Batch, PoolSnapshot, Reaction, RolloutPlan, RolloutView

LOOK_S = 1.0
SHARES = (0.1, 0.2, 0.3, 0.4)
"""R_t as a share of the batch; the paper finds about 20 % best."""


@dataclass(frozen=True)
class RlhfuseCut:
    """Cut once fewer than ``share`` of the samples are left, then fuse on whatever is free."""

    share: float
    num_targets: int

    def react(self, view: RolloutView, plan: RolloutPlan) -> Reaction:
        """Return the cut and the GPUs that fuse."""
        moves = global_cut(view, int(self.share * view.batch.num_samples), self.num_targets)
        fused = view.fusible_gpus if view.fuse_tokens and fits(view.pool) else 0
        return Reaction(view.now_s + LOOK_S, (), moves, fused, "R_t reached" if moves else "")


@dataclass(frozen=True)
class Rlhfuse(StockSync):
    """Stock's fleet with inter-stage fusion."""

    name: str = "rlhfuse"
    share: float = 0.2
    num_targets: int = 1

    def plan(self, memory: int, pool: PoolSnapshot, batch: Batch) -> RolloutPlan:
        """Return stock's plan, watched every second."""
        plan = super().plan(memory, pool, batch)
        return replace(plan, first_look_s=LOOK_S, reason=f"static TP{memory}, R_t={self.share:g}, m={self.num_targets}")

    def policy(self, memory: int, batch: Batch) -> RlhfuseCut:  # type: ignore[override]
        """Return the cut rule."""
        return RlhfuseCut(self.share, self.num_targets)
