"""The lengths of samples as a distribution of each: what predictors return, and all that planners and policies read.

Invariant: p10 <= p50 <= p90 <= cap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from verl_rlhfless.policy.residuals import NORMAL, Residuals, residuals_of
from verl_rlhfless.policy.snapshot import FloatArray, IntArray

KNOWN_SIGMA = 0.01
"""Spread of the logarithm of a length that is known."""

_NORMAL = residuals_of(NORMAL)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Lengths of B samples, as a distribution of each: ``log(length) = mu + sigma * error``, up to ``cap``.

    Attributes:
        mu: [B] float64, centre of the log length (natural logarithm of tokens).
        sigma: [B] float64, scale of its error.
        cap: Most tokens of a response.
        errors: Distribution of the standardised errors, the same for all.
        in_common: Share of the errors' variance that siblings have in common.
    """

    mu: FloatArray
    sigma: FloatArray
    cap: int
    errors: Residuals = _NORMAL
    in_common: float = 0.0

    def of(self, samples: IntArray) -> Prediction:
        """Return the prediction of some samples."""
        return replace(self, mu=self.mu[samples], sigma=self.sigma[samples])

    def quantiles(self) -> FloatArray:
        """Return [B, 3] float64: p10, p50, p90 tokens."""
        z = np.array([self.errors.quantile(share) for share in (0.1, 0.5, 0.9)])
        tokens: FloatArray = np.clip(np.exp(self.mu[:, None] + z * self.sigma[:, None]), 1.0, self.cap)
        return tokens

    def mean(self, reached: IntArray | None = None) -> FloatArray:
        """Return [B] float64 expected tokens, given that a sample is longer than ``reached``, [B] (``None``: any)."""
        log_tokens = self.mu[:, None] + self.errors.nodes * self.sigma[:, None]
        mean: FloatArray = np.exp(np.minimum(log_tokens, math.log(self.cap))).mean(axis=1)
        if reached is None:
            return mean
        z = (np.log(np.maximum(reached, 1)) - self.mu) / self.sigma
        beyond = np.exp(self.mu + self.sigma * self.errors.mean_beyond(z))
        tokens: FloatArray = np.minimum(np.maximum(np.maximum(mean, beyond), reached + 1), self.cap)
        return tokens

    def alive_at(self, depth: FloatArray) -> FloatArray:
        """Return [B, K] float64: probability that a sample is longer than each depth.

        Args:
            depth: [K] tokens, or [B, 1] or [B, K] for depths of each sample's own.
        """
        z = (np.log(np.maximum(depth, 1e-9)) - self.mu[:, None]) / self.sigma[:, None]
        alive: FloatArray = np.where(depth < self.cap, self.errors.beyond(z), 0.0)
        return alive


def exact(lengths: IntArray) -> Prediction:
    """Return the prediction of samples whose lengths, [B] int64, are known."""
    mu = np.log(np.maximum(lengths, 1) + 0.5)
    return Prediction(mu, np.full(len(lengths), KNOWN_SIGMA), int(lengths.max()) + 1)
