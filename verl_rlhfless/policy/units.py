"""The unit of planning: a group while its siblings look alike, else each sample; longest predicted first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from verl_rlhfless.policy.prediction import Prediction
from verl_rlhfless.policy.snapshot import Batch, FloatArray, IntArray
from verl_rlhfless.policy.stages import Lane, depth_edges, longest_depth, middle_of, rank_share


@dataclass(frozen=True, slots=True)
class Units:
    """The batch as [U] units.

    Attributes:
        size: [U] samples of each.
        prompt: [U] prompt tokens.
        group: [U] group of each.
        unit_of: [B] unit of each sample.
        order: [U] unit ids, longest predicted first.
        edges: [K+1] depths in tokens.
        alive: [U, K] expected samples alive in the middle of each interval.
        is_none: [U, K] probability that none is.
        mu / sigma: [U] predicted log length of one sample, and its uncertainty.
        mean: [U] expected tokens of one sample.
    """

    size: IntArray
    prompt: FloatArray
    group: IntArray
    unit_of: IntArray
    order: IntArray
    edges: FloatArray
    alive: FloatArray
    is_none: FloatArray
    mu: FloatArray
    sigma: FloatArray
    mean: FloatArray

    @classmethod
    def build(cls, batch: Batch, prior: Prediction) -> Units:
        """Return the units of a batch."""
        _, first, group, size = np.unique(batch.group_of, return_index=True, return_inverse=True, return_counts=True)
        if not np.array_equal(prior.mu[first][group], prior.mu):
            first = unit_of = np.arange(batch.num_samples)
            size = np.ones(batch.num_samples, dtype=np.int64)
        else:
            unit_of = group
        order = np.lexsort((first, -(prior.mu[first] + prior.sigma[first])))
        edges = depth_edges(prior.cap)
        each = prior.of(first)
        alive = each.alive_at(middle_of(edges))
        return cls(
            size=size,
            prompt=batch.prompt_tokens[first].astype(float),
            group=batch.group_of[first],
            unit_of=unit_of,
            order=order,
            edges=edges,
            alive=alive * size[:, None],
            is_none=(1 - alive) ** size[:, None],
            mu=each.mu,
            sigma=each.sigma,
            mean=each.mean(),
        )

    def lane(self, rows: IntArray) -> Lane:
        """Return the population of some units; a prompt is prefilled once."""
        count = float(self.size[rows].sum())
        context = float((self.size[rows] * self.prompt[rows]).sum()) / max(count, 1.0)
        _, once = np.unique(self.group[rows], return_index=True)
        return Lane(
            edges=self.edges,
            alive=self.alive[rows].sum(axis=0),
            context=context,
            prefill_tokens=float(self.prompt[rows][once].sum()),
            is_any=1 - self.is_none[rows].prod(axis=0),
            ranked=rank_share(self.mu[rows], self.sigma[rows]),
        )

    def early_share(self, share: float) -> float:
        """Return the share of the expected tokens in samples that end within ``share`` of the longest one's depth."""
        alive, width = self.alive.sum(axis=0), np.diff(self.edges)
        late = float(np.interp(share * longest_depth(self.edges, alive), middle_of(self.edges), alive))
        inside = float((np.maximum(alive - late, 0.0) * width).sum())
        return inside / max(float((alive * width).sum()), 1e-9)
