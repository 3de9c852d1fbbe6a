"""Our arm with true lengths, of every sample or of every prompt: how much a better prediction could still bring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from verl_rlhfless.policy.groups import group_means
from verl_rlhfless.policy.ours import Memory, Ours, OursPolicy
from verl_rlhfless.policy.prediction import KNOWN_SIGMA, Prediction, exact
from verl_rlhfless.policy.residuals import NORMAL, learn_residuals, residuals_of
from verl_rlhfless.policy.snapshot import Batch, IntArray, RolloutView


@dataclass(frozen=True)
class Oracle(Ours):
    """``lengths`` maps a step's number to the true lengths, [B] int64."""

    lengths: Mapping[int, IntArray] = field(default_factory=dict)
    name: str = "oracle"

    def predict(self, memory: Memory, batch: Batch) -> Prediction:
        """Return the true lengths."""
        return exact(self.lengths[batch.step])

    def doubt(self, memory: Memory) -> float:
        """Return 1: nothing is uncertain."""
        return 1.0

    def policy(self, memory: Memory, batch: Batch) -> OraclePolicy:
        """Return the decisions during the rollout of a step."""
        return OraclePolicy(self, memory, self.predict(memory, batch))


@dataclass(frozen=True)
class OraclePolicy(OursPolicy):
    """Like ours, but what is generated tells nothing new."""

    def refine(self, view: RolloutView) -> Prediction:
        """Return the true lengths."""
        return self.prior


@dataclass(frozen=True)
class PromptOracle(Oracle):
    """Knows of every prompt how long its responses are in the mean, and how they spread, but not which one is long.

    What the best predictor could know that looks at prompts alone.
    """

    name: str = "oracle_prompts"

    def predict(self, memory: Memory, batch: Batch) -> Prediction:
        """Return what each prompt's true lengths tell of its samples."""
        return exact_prompts(batch, self.lengths[batch.step])


def exact_prompts(batch: Batch, lengths: IntArray) -> Prediction:
    """Return the prediction of samples whose prompts' lengths are known: which of them is whose is not.

    Each group has its true mean log length, and all have the distribution of all samples around it.

    Args:
        batch: The prompts.
        lengths: [B] true tokens.
    """
    group_of, log_length = batch.group_of, np.log(lengths + 0.5)
    mean = group_means(batch, log_length)[group_of]
    sigma = max(float((log_length - mean).std()), KNOWN_SIGMA)
    curve = learn_residuals(NORMAL, (log_length - mean) / sigma, lengths >= batch.max_response_tokens, rate=1.0)
    return Prediction(mean, np.full(len(mean), sigma), int(lengths.max()) + 1, residuals_of(curve))
