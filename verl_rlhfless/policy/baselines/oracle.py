"""Our arm with true lengths: how much a better prediction could still bring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from verl_rlhfless.policy.ours import Memory, Ours, OursPolicy
from verl_rlhfless.policy.predict import Prediction
from verl_rlhfless.policy.snapshot import Batch, IntArray, PoolSnapshot, RolloutView

_SIGMA = 0.01


@dataclass(frozen=True)
class Oracle(Ours):
    """``lengths`` maps a step's number to the true lengths, [B] int64; ``error`` scales them (sensitivity)."""

    lengths: Mapping[int, IntArray] = field(default_factory=dict)
    name: str = "oracle"

    def predict(self, memory: Memory, batch: Batch) -> Prediction:
        """Return the true lengths, with next to no spread."""
        mu = np.log(np.maximum(self.lengths[batch.step], 1) + 0.5)
        return Prediction(mu, np.full(batch.num_samples, _SIGMA), -1.0, 1.0, batch.max_response_tokens + 1)

    def policy(self, memory: Memory) -> OraclePolicy:
        """Return the decisions during the rollout."""
        return OraclePolicy(self, memory)

    def learn(self, memory: Memory, outcome: object) -> Memory:
        """Return the memory unchanged: nothing is left to learn."""
        return memory

    def begin(self, pool: PoolSnapshot, first: Batch) -> Memory:
        """Return the fleet planned from the first step's true lengths."""
        return replace(super().begin(pool, first))


@dataclass(frozen=True)
class OraclePolicy(OursPolicy):
    """Like ours, but what is generated tells nothing new."""

    def refine(self, view: RolloutView) -> Prediction:
        """Return the true lengths."""
        return self.arm.predict(self.memory, view.batch)
