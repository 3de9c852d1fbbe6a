"""Our arm with true lengths: how much a better prediction could still bring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from verl_rlhfless.policy.ours import Memory, Ours, OursPolicy
from verl_rlhfless.policy.predict import Prediction, exact
from verl_rlhfless.policy.snapshot import Batch, IntArray, RolloutView


@dataclass(frozen=True)
class Oracle(Ours):
    """``lengths`` maps a step's number to the true lengths, [B] int64; ``error`` scales them (sensitivity)."""

    lengths: Mapping[int, IntArray] = field(default_factory=dict)
    name: str = "oracle"

    def predict(self, memory: Memory, batch: Batch) -> Prediction:
        """Return the true lengths."""
        return exact(self.lengths[batch.step])

    def doubt(self, memory: Memory) -> float:
        """Return 1: nothing is uncertain."""
        return 1.0

    def policy(self, memory: Memory) -> OraclePolicy:
        """Return the decisions during the rollout."""
        return OraclePolicy(self, memory)


@dataclass(frozen=True)
class OraclePolicy(OursPolicy):
    """Like ours, but what is generated tells nothing new."""

    def refine(self, view: RolloutView) -> Prediction:
        """Return the true lengths."""
        return self.arm.predict(self.memory, view.batch)
