"""More samples than engines have slots: what a plan expects, and where it puts them, against schedules one by one."""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.lane_placement import fill_slots
from verl_rlhfless.policy.perf import Efficiencies, EngineLimits, EnginePerf
from verl_rlhfless.policy.prediction import Prediction, exact
from verl_rlhfless.policy.snapshot import Batch, FloatArray
from verl_rlhfless.policy.stages import options_for, rank_share, stay
from verl_rlhfless.policy.units import Units

CAP = 20_000


def expected_depth(prediction: Prediction, num_replicas: int, slots: int) -> float:
    """Return how many iterations a plan expects of a rollout whose iterations all take equally long."""
    count, made = len(prediction.mu), cell(steps(1, 4, 2)).pool
    names = tuple(map(str, range(count)))
    units = Units.build(Batch(1, names, np.arange(count), np.full(count, 1), CAP), prediction)
    gpu = replace(made.perf[1].gpu, hbm_bytes_per_s=1e30, flops=1e30)
    efficiencies, limits = Efficiencies(per_seq_s=0.0), EngineLimits(max_num_seqs=slots)
    one = EnginePerf(made.perf[1].shape, gpu, 1, efficiencies, limits)
    pool, options = replace(made, perf={1: one}), options_for(made, ((1, num_replicas),), (1,))
    time_s, _ = stay(pool, options, units.lane(units.order))
    return float(time_s[options.index(1, num_replicas)]) / one.iteration_s(1, 0)


def end_of(lengths: FloatArray, num_slots: int) -> float:
    """Return when the last sample ends if each, in the order given, goes to the slot that is free first."""
    free = [0.0] * num_slots
    for tokens in lengths.tolist():
        heapq.heapreplace(free, free[0] + tokens)
    return max(free)


@pytest.mark.parametrize(("num_samples", "num_replicas", "slots"), [(12, 1, 4), (12, 2, 4), (64, 2, 8), (64, 1, 8)])
def test_known_lengths_queue_for_as_long_as_the_schedule_longest_first(
    num_samples: int, num_replicas: int, slots: int
) -> None:
    expected, seen = [], []
    for seed in range(12):
        lengths = np.exp(np.random.default_rng(seed).normal(7.0, 1.0, num_samples)).astype(np.int64)
        expected.append(expected_depth(exact(lengths), num_replicas, slots))
        seen.append(end_of(-np.sort(-lengths.astype(float)), num_replicas * slots))
    assert np.mean(expected) == pytest.approx(np.mean(seen), rel=0.05)


@pytest.mark.parametrize(("num_samples", "slots"), [(32, 8), (64, 8), (12, 8)])
def test_lengths_that_nobody_knows_queue_for_as_long_as_a_schedule_in_any_order(num_samples: int, slots: int) -> None:
    prediction = Prediction(np.full(num_samples, 6.5), np.full(num_samples, 1.0), CAP)
    rng = np.random.default_rng(0)
    seen = [end_of(np.minimum(np.exp(rng.normal(6.5, 1.0, num_samples)), CAP), slots) for _ in range(2000)]
    assert expected_depth(prediction, 1, slots) == pytest.approx(np.mean(seen), rel=0.06)


def test_one_certain_sample_takes_its_whole_length() -> None:
    assert expected_depth(exact(np.array([3000])), 1, 8) == pytest.approx(3000, rel=0.01)


def test_lengths_are_known_apart_as_far_as_predictions_correlate_with_them() -> None:
    rng = np.random.default_rng(0)
    mu, sigma = rng.normal(7.0, 0.8, 4000), np.full(4000, 0.6)
    true = rng.normal(mu, sigma)
    assert rank_share(mu, sigma) == pytest.approx(np.corrcoef(mu, true)[0, 1], abs=0.02)
    assert rank_share(mu, np.full(4000, 0.001)) == pytest.approx(1.0, abs=1e-3)
    assert rank_share(np.full(8, 7.0), np.full(8, 0.5)) == 0.0


def test_replicas_are_filled_for_as_long_as_the_longest_takes_and_the_others_end_early() -> None:
    load = np.array([100.0, 800.0, 300.0, 400.0, 100.0, 250.0])
    assert fill_slots(load, (2, 2), 1.0).tolist() == [0, 0, 0, 0, 1, 1]


def test_replicas_are_filled_evenly_where_lengths_are_not_known() -> None:
    load = np.array([800.0, 400.0, 300.0, 250.0, 100.0, 100.0])
    used = np.bincount(fill_slots(load, (2, 2), 0.0), weights=load)
    assert used.tolist() == [1150.0, 800.0]
    assert sorted(np.bincount(fill_slots(np.full(12, 70.0), (3, 2), 1.0)).tolist()) == [4, 4, 4]
