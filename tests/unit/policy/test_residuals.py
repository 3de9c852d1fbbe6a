"""What is left of a sample that goes on: right for tails that are not log-normal, clipped ones included."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from verl_rlhfless.policy.predict import LengthModel, learn, predict, refine
from verl_rlhfless.policy.prediction import Prediction
from verl_rlhfless.policy.residuals import NORMAL, Residuals, learn_residuals
from verl_rlhfless.policy.snapshot import Batch

Draw = Callable[[np.random.Generator, int], np.ndarray]  # type: ignore[type-arg]
CAP = 32768


def log_normal(rng: np.random.Generator, count: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.exp(rng.normal(6.8, 0.9, count))


def heavy(rng: np.random.Generator, count: int) -> np.ndarray:  # type: ignore[type-arg]
    return 600 * (1 + rng.pareto(2.0, count))


def light(rng: np.random.Generator, count: int) -> np.ndarray:  # type: ignore[type-arg]
    return 2500 * rng.weibull(1.3, count)


def two_peaks(rng: np.random.Generator, count: int) -> np.ndarray:  # type: ignore[type-arg]
    long = rng.random(count) < 0.25
    return np.exp(np.where(long, rng.normal(9.1, 0.2, count), rng.normal(6.5, 0.4, count)))


TAILS = [log_normal, heavy, light, two_peaks]


def after(draw: Draw, n: int, num_steps: int = 6) -> tuple[LengthModel, Batch, np.ndarray]:  # type: ignore[type-arg]
    """Return what was learnt, and the next step: its prompts and lengths."""
    rng, model = np.random.default_rng(7), LengthModel()
    for step in range(1, num_steps + 1):
        names = tuple(f"{step}-{i}" for i in range(1024 // n))
        batch = Batch(step, names, np.repeat(np.arange(1024 // n), n), np.full(1024, 100), CAP)
        lengths = np.clip(draw(rng, 1024), 1, CAP).astype(np.int64)
        if step < num_steps:
            model = learn(model, batch, lengths)
    return model, batch, lengths


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("draw", TAILS)
def test_what_is_left_of_the_samples_that_go_on(draw: Draw, share: float, n: int) -> None:
    model, batch, lengths = after(draw, n)
    depth = int(np.quantile(lengths, share))
    finished = (lengths <= depth).astype(float)
    got = refine(model, predict(model, batch), batch, np.minimum(lengths, depth), finished)
    going = np.flatnonzero(lengths > depth)
    rest = Prediction(got.mu[going], got.sigma[going], got.cap, got.errors)
    depths = np.linspace(depth, got.cap - 1, 400)
    alive = rest.alive_at(depths) / rest.alive_at(np.array([depth]))
    ends = np.array([np.interp(length, depths, row) for length, row in zip(lengths[going], alive, strict=True)])
    assert 0.68 <= np.mean((ends > 0.1) & (ends < 0.9)) <= 0.92
    expected = float(alive.sum() * (depths[1] - depths[0]))
    assert expected == pytest.approx(float((lengths[going] - depth).sum()), rel=0.35)


@pytest.mark.parametrize("draw", TAILS)
def test_an_80_percent_interval_covers_75_to_85_percent_of_any_tail(draw: Draw) -> None:
    model, batch, lengths = after(draw, 8)
    low, _, high = predict(model, batch).quantiles().T
    assert 0.75 <= np.mean((lengths >= low) & (lengths <= high)) <= 0.85


@pytest.mark.parametrize("draw", TAILS)
def test_the_mean_is_that_of_the_samples(draw: Draw) -> None:
    model, batch, lengths = after(draw, 8)
    assert predict(model, batch).mean().sum() == pytest.approx(lengths.sum(), rel=0.2)


def test_a_clipped_response_counts_as_longer_than_the_cap() -> None:
    error = np.random.default_rng(0).normal(0, 1, 4000)
    clipped = learn_residuals(NORMAL, np.minimum(error, 0.5), error >= 0.5, 1.0)
    centre = np.minimum(error, 0.5).mean()
    beyond = Residuals(clipped).beyond(np.array([1.5 - centre]))[0]
    assert beyond == pytest.approx(np.mean(error > 1.5), rel=0.25)


def test_survival_falls_from_one_and_few_samples_change_it_little() -> None:
    found = np.array(learn_residuals(NORMAL, np.array([-3.0, 3.0]), np.array([False, False]), 2 / 18))
    assert (np.diff(found) <= 0).all() and found[0] == pytest.approx(1.0)
    assert np.abs(found - NORMAL).max() < 0.07


def test_the_normal_curve_has_its_known_values() -> None:
    normal = Residuals()
    assert normal.beyond(np.array([0.0, 1.2816, 2.3263])) == pytest.approx([0.5, 0.1, 0.01], rel=0.05)
    assert normal.mean_beyond(np.array([-9.0, 0.0, 2.0])) == pytest.approx([0.0, 0.798, 2.373], abs=0.03)
    assert normal.quantile(0.9) == pytest.approx(1.2816, abs=0.02)


@pytest.mark.parametrize("draw", TAILS)
def test_what_is_imputed_never_rises_faster_than_what_was_reached(draw: Draw) -> None:
    errors, z = predict(after(draw, 8)[0], after(draw, 8)[1]).errors, np.linspace(-5, 7, 500)
    imputed, mean = errors.gentle_beyond(z), errors.mean_beyond(z)
    assert (np.diff(imputed) <= np.diff(z) + 1e-9).all() and (np.diff(imputed) >= -1e-9).all()
    assert ((z <= imputed) & (imputed <= mean + 1e-9)).all()
