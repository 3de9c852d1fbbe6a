"""What a step shows of its prompts and samples: known spreads are found again, also where groups are few or single."""

from __future__ import annotations

import numpy as np
import pytest

from verl_rlhfless.policy.groups import group_means, group_sizes, ridge_slope, spreads
from verl_rlhfless.policy.snapshot import Batch, FloatArray

BELIEVED = (0.6, 0.8)


def batch(sizes: list[int]) -> Batch:
    total = sum(sizes)
    names = tuple(f"p{i}" for i in range(len(sizes)))
    return Batch(1, names, np.repeat(np.arange(len(sizes)), sizes), np.full(total, 100), 1000)


def values(one: Batch, between: float, within: float, seed: int) -> FloatArray:
    rng = np.random.default_rng(seed)
    return rng.normal(0, between, len(one.prompt_ids))[one.group_of] + rng.normal(0, within, one.num_samples)


@pytest.mark.parametrize("sizes", [[2, 4, 8] * 400, [8] * 1000])
def test_spreads_are_found_again(sizes: list[int]) -> None:
    one = batch(sizes)
    assert spreads(one, values(one, 0.5, 0.3, 0), BELIEVED) == pytest.approx((0.5, 0.3), rel=0.1)


def test_two_prompts_show_the_whole_spread_in_the_mean_over_steps() -> None:
    one = batch([8, 8])
    found = np.array([spreads(one, values(one, 0.8, 0.2, seed), BELIEVED) for seed in range(600)])
    assert np.sqrt((found**2).mean(axis=0)) == pytest.approx((0.8, 0.2), rel=0.1)


def test_groups_of_one_keep_the_believed_ratio() -> None:
    one = batch([1] * 2000)
    between, within = spreads(one, values(one, 0.3, 0.4, 1), BELIEVED)
    assert between / within == pytest.approx(0.6 / 0.8) and np.hypot(between, within) == pytest.approx(0.5, rel=0.1)


def test_a_single_group_says_nothing_of_other_prompts() -> None:
    assert spreads(batch([50]), values(batch([50]), 0.3, 0.4, 1), BELIEVED) == pytest.approx((0.6, 0.4), rel=0.2)
    assert spreads(batch([1]), np.array([5.0]), BELIEVED) == pytest.approx(BELIEVED)


def test_a_prompt_without_samples_has_mean_0() -> None:
    one = Batch(1, ("a", "b"), np.array([1, 1]), np.array([10, 10]), 100)
    assert group_sizes(one).tolist() == [1, 2] and group_means(one, np.array([2.0, 4.0])).tolist() == [0.0, 3.0]


def test_a_slope_needs_prompts_that_differ() -> None:
    assert ridge_slope(np.full(50, 3.0), np.arange(50.0), 0.5) == 0.0
    x = np.linspace(0, 5, 200)
    assert ridge_slope(x, 0.7 * x, 0.5) == pytest.approx(0.7, rel=0.02)
    assert 0 < ridge_slope(x[:2], 0.7 * x[:2], 0.5) < 0.01
