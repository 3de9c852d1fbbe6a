"""RLHFless as published (arXiv 2602.22718).

EWMA ranking, equal-length assignment, uniform actors, a local cut at tau, deduplicated prefill.

Its authors do not count start, wake and weight load; here every elastic arm pays them. Actor count and
tensor-parallel size come from a grid that the simulator tunes; both are then held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from verl_rlhfless.policy.arm import Outcome
from verl_rlhfless.policy.dispatch import equal_length_blocks, longest_first
from verl_rlhfless.policy.groups import group_means
from verl_rlhfless.policy.paper_rules import local_cut
from verl_rlhfless.policy.snapshot import Batch, PoolSnapshot, Reaction, RolloutPlan, RolloutView

LOOK_S = 1.0
_EWMA = 0.5
"""Weight of the latest visit in a prompt's mean."""


@dataclass(frozen=True, slots=True)
class History:
    """Mean response of each prompt (EWMA over visits) and of all."""

    mean: Mapping[str, float] = field(default_factory=dict)
    overall: float = 1.0


@dataclass(frozen=True)
class LocalCut:
    """The local rule with threshold tau."""

    tau: float

    def react(self, view: RolloutView, plan: RolloutPlan) -> Reaction:
        """Return the moves of actors that reached tau."""
        moves = local_cut(view, self.tau)
        return Reaction(view.now_s + LOOK_S, (), moves, 0, "tau reached" if moves else "")


@dataclass(frozen=True)
class RlhflessPaper:
    """``num_actors`` uniform actors of ``tp`` GPUs in every step; while nodes are down, as many as still fit."""

    num_actors: int = 1
    tp: int = 1
    tau: float = 0.7
    name: str = "rlhfless_paper"

    def begin(self, pool: PoolSnapshot, first: Batch) -> History:
        """Return an empty history."""
        return History()

    def layout(self, memory: History, pool: PoolSnapshot) -> Mapping[int, int]:
        """Return the actors that are pre-warmed."""
        return {self.tp: self.num_actors}

    def plan(self, memory: History, pool: PoolSnapshot, batch: Batch) -> RolloutPlan:
        """Return blocks of similar predicted length and equal size, one an actor."""
        mean = [memory.mean.get(p, memory.overall) for p in batch.prompt_ids]
        predicted = np.array(mean)[batch.group_of]
        count = max(1, min(self.num_actors, pool.num_gpus // self.tp))
        return RolloutPlan(
            fleet=(self.tp,) * count,
            replica_of=equal_length_blocks(batch, predicted, count),
            order=longest_first(np.arange(batch.num_samples), predicted),
            is_resident=False,
            is_static=False,
            first_look_s=LOOK_S,
            reason=f"{count} uniform actors of TP{self.tp}",
        )

    def policy(self, memory: History, batch: Batch) -> LocalCut:
        """Return the local cut."""
        return LocalCut(self.tau)

    def learn(self, memory: History, outcome: Outcome) -> History:
        """Return the history with this step's visits."""
        seen = group_means(outcome.batch, outcome.lengths.astype(np.float64))
        mean = dict(memory.mean)
        for prompt, value in zip(outcome.batch.prompt_ids, seen.tolist(), strict=True):
            mean[prompt] = (1 - _EWMA) * mean[prompt] + _EWMA * value if prompt in mean else value
        return History(mean, float(outcome.lengths.mean()))
