"""The length predictor: calibration, history, siblings, drift, state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from verl_rlhfless.errors import DataError
from verl_rlhfless.policy.predict import LengthModel, learn, predict, refine
from verl_rlhfless.policy.snapshot import Batch, IntArray


def batch(groups: int, n: int, step: int = 1, cap: int = 100_000) -> Batch:
    return Batch(
        step, tuple(f"p{i}" for i in range(groups)), np.repeat(np.arange(groups), n), np.full(groups * n, 100), cap
    )


def draw(one: Batch, effect: np.ndarray, mean: float, sigma: float, seed: int) -> IntArray:  # type: ignore[type-arg]
    noise = np.random.default_rng(seed).normal(0, sigma, one.num_samples)
    return np.maximum(1, np.exp(np.log(mean) + effect[one.group_of] + noise)).astype(np.int64)


def coverage(model: LengthModel, one: Batch, lengths: IntArray) -> float:
    q = predict(model, one).quantiles()
    return float(np.mean((lengths >= q[:, 0]) & (lengths <= q[:, 2])))


@pytest.mark.parametrize(("between", "within"), [(0.2, 0.6), (0.6, 0.3), (0.05, 0.9)])
def test_an_80_percent_interval_covers_75_to_85_percent(between: float, within: float) -> None:
    effect = np.random.default_rng(1).normal(0, between, 120)
    model, covered = LengthModel(), []
    for step in range(1, 10):
        one = batch(120, 8, step)
        lengths = draw(one, effect, 700, within, step)
        if step > 2:
            covered.append(coverage(model, one, lengths))
        model = learn(model, one, lengths)
    assert 0.75 <= np.mean(covered) <= 0.85


def test_history_ranks_prompts_that_recur() -> None:
    effect = np.linspace(-1, 1, 40)
    model = LengthModel()
    for step in (1, 2):
        model = learn(model, batch(40, 8, step), draw(batch(40, 8), effect, 500, 0.3, step))
    p50 = predict(model, batch(40, 8)).quantiles()[:, 1].reshape(40, 8)[:, 0]
    assert np.corrcoef(np.log(p50), effect)[0, 1] > 0.95


def test_a_prompt_that_was_never_seen_gets_the_running_distribution() -> None:
    model = learn(LengthModel(), batch(60, 8), draw(batch(60, 8), np.zeros(60), 500, 0.4, 0))
    new = replace(batch(1, 4), prompt_ids=("unseen",))
    assert predict(model, new).quantiles()[0, 1] == pytest.approx(500, rel=0.15)


def test_the_level_follows_drift() -> None:
    model = LengthModel()
    for step, mean in enumerate((300, 600, 1200), 1):
        model = learn(model, batch(60, 8, step), draw(batch(60, 8), np.zeros(60), mean, 0.4, step))
    assert predict(model, batch(60, 8)).quantiles()[0, 1] > 650


@pytest.mark.parametrize("growth", [1.3, 0.75])
def test_a_steady_drift_is_expected_to_go_on(growth: float) -> None:
    model, mean = LengthModel(), 2000.0
    for step in range(1, 8):
        model = learn(model, batch(60, 8, step), draw(batch(60, 8), np.zeros(60), mean, 0.4, step))
        mean *= growth
    assert predict(model, batch(60, 8)).quantiles()[0, 1] == pytest.approx(mean, rel=0.2)


def test_finished_siblings_pull_the_prediction_of_the_rest() -> None:
    model = learn(
        LengthModel(), batch(60, 8), draw(batch(60, 8), np.random.default_rng(3).normal(0, 0.8, 60), 500, 0.3, 0)
    )
    one = replace(batch(60, 8), prompt_ids=tuple(f"new{i}" for i in range(60)))
    prior = predict(model, one)
    finished = np.zeros(480)
    generated = np.full(480, 50)
    finished[:4], generated[:4] = 1.0, 60  # the first group answers far below the mean of 500
    got = refine(model, prior, one, generated, finished)
    assert got.mu[4] < prior.mu[4] - 0.2
    assert got.mu[4] < got.mu[100] - 0.2


def test_a_sample_that_outlives_its_prediction_is_expected_to_go_on() -> None:
    model = learn(LengthModel(), batch(60, 8), draw(batch(60, 8), np.zeros(60), 500, 0.4, 0))
    one = batch(60, 8)
    generated = np.full(480, 10)
    generated[0] = 5000
    got = refine(model, predict(model, one), one, generated, np.zeros(480))
    assert got.mean(generated)[0] > 5000
    assert got.cap >= 5000


def test_state_survives_json() -> None:
    model = learn(LengthModel(), batch(10, 4), draw(batch(10, 4), np.zeros(10), 500, 0.4, 0))
    assert LengthModel.from_json(model.to_json()) == model
    assert LengthModel.from_json(LengthModel().to_json()) == LengthModel()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "x"}', "null"])
def test_a_foreign_state_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="length history"):
        LengthModel.from_json(text)


def test_a_truncated_or_poisoned_state_is_refused() -> None:
    text = learn(LengthModel(), batch(4, 4), draw(batch(4, 4), np.zeros(4), 500, 0.4, 0)).to_json()
    for bad in (
        text[:-20],
        text.replace('"within": ', '"within": "x", "y": '),
        text.replace('"recall": ', '"recall": NaN, "r": '),
    ):
        with pytest.raises(DataError):
            LengthModel.from_json(bad)
