"""Statistics of the groups of a step: sizes, means, spreads between and within them, slope over prompt lengths."""

from __future__ import annotations

import math

import numpy as np

from verl_rlhfless.policy.snapshot import Batch, FloatArray, IntArray

LEAST_BETWEEN, LEAST_WITHIN = 0.1, 0.05
"""Least standard deviations of log lengths that a step is believed."""

_RIDGE = 4.0
"""Penalty of a slope, in squared log prompt tokens for each unit of the spread between prompts."""


def group_sizes(batch: Batch) -> IntArray:
    """Return [G] how many samples each prompt has; 1 where it has none."""
    return np.maximum(np.bincount(batch.group_of, minlength=len(batch.prompt_ids)), 1)


def group_means(batch: Batch, values: FloatArray) -> FloatArray:
    """Return [G] means of [B] values."""
    sums = np.bincount(batch.group_of, weights=values, minlength=len(batch.prompt_ids))
    means: FloatArray = sums / group_sizes(batch)
    return means


def spreads(batch: Batch, values: FloatArray, believed: tuple[float, float]) -> tuple[float, float]:
    """Return the standard deviations between prompts and within groups that a step shows (analysis of variance).

    Within: squared deviations from the groups' means over their degrees of freedom. Between: the variance of those
    means is ``between^2 + within^2 * mean(1 / size)``, solved for the first.

    Args:
        batch: The prompts.
        values: [B] log lengths.
        believed: Both as they were before. A single group says nothing of the first; groups of one sample say only
            how much both are together.
    """
    size, mean = group_sizes(batch), group_means(batch, values)
    between, within = believed[0] ** 2, believed[1] ** 2
    has_groups, free = len(size) > 1, batch.num_samples - len(size)
    total = float(np.var(mean, ddof=1)) if has_groups else between + within
    of_samples = (
        float(np.sum((values - mean[batch.group_of]) ** 2)) / free if free else total * within / (between + within)
    )
    of_prompts = total - of_samples * float(np.mean(1 / size)) if has_groups else between
    return math.sqrt(max(of_prompts, LEAST_BETWEEN**2)), math.sqrt(max(of_samples, LEAST_WITHIN**2))


def ridge_slope(x: FloatArray, y: FloatArray, between: float) -> float:
    """Return the regression slope of ``y`` over ``x``, both [G], shrunk to zero when prompts vary little or are few.

    Args:
        x: Mean log prompt tokens of each group.
        y: Its mean log length.
        between: Standard deviation of prompt effects: where it is large, a slope is easily found by chance.
    """
    dx = x - x.mean()
    return float(dx @ (y - y.mean()) / (dx @ dx + _RIDGE * between))
