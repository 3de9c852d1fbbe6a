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


@pytest.mark.parametrize("groups", [2, 4])
def test_an_80_percent_interval_covers_75_to_85_percent_where_steps_are_small(groups: int) -> None:
    rng, covered = np.random.default_rng(0), []
    for _ in range(10):
        model = LengthModel()
        for step in range(1, 26):
            one = replace(batch(groups, 8, step), prompt_ids=tuple(f"{step}-{i}" for i in range(groups)))
            lengths = draw(one, rng.normal(0, 0.3, groups), 400, 0.35, int(rng.integers(1 << 30)))
            if step > 2:
                covered.append(coverage(model, one, lengths))
            model = learn(model, one, lengths)
    assert 0.75 <= np.mean(covered) <= 0.85


def test_an_80_percent_interval_covers_75_to_85_percent_where_the_level_wanders() -> None:
    rng, covered = np.random.default_rng(2), []
    for _ in range(4):
        model, mean = LengthModel(), 3000.0
        for step in range(1, 21):
            one = replace(batch(40, 8, step), prompt_ids=tuple(f"{step}-{i}" for i in range(40)))
            lengths = draw(one, rng.normal(0, 0.2, 40), mean, 0.4, int(rng.integers(1 << 30)))
            if step > 2:
                covered.append(coverage(model, one, lengths))
            model = learn(model, one, lengths)
            mean *= float(np.exp(rng.normal(0, 0.4)))
    assert 0.75 <= np.mean(covered) <= 0.85


def test_one_response_to_a_prompt_tells_little_of_its_next_one() -> None:
    effect = np.random.default_rng(4).normal(0, 0.5, 300)
    model, one = LengthModel(), batch(300, 1)
    for seed in (1, 2):
        new = replace(one, prompt_ids=tuple(f"{seed}-{i}" for i in range(300)))
        model = learn(model, new, draw(new, effect, 700, 0.8, seed))
    assert 0.75 <= coverage(model, new, draw(new, effect, 700, 0.8, 3)) <= 0.85
    assert np.std(np.log(predict(model, new).quantiles()[:, 1])) < 0.35


def test_history_ranks_prompts_that_recur() -> None:
    effect = np.linspace(-1, 1, 40)
    model = LengthModel()
    for step in (1, 2):
        model = learn(model, batch(40, 8, step), draw(batch(40, 8), effect, 500, 0.3, step))
    p50 = predict(model, batch(40, 8)).quantiles()[:, 1].reshape(40, 8)[:, 0]
    assert np.corrcoef(np.log(p50), effect)[0, 1] > 0.95


def test_every_visit_tells_more_of_a_prompt() -> None:
    effect, one = np.random.default_rng(8).normal(0, 0.5, 200), batch(200, 2)
    model, likeness = LengthModel(), []
    for seed in range(6):
        model = learn(model, one, draw(one, effect, 500, 0.8, seed))
        likeness.append(np.corrcoef(predict(model, one).mu[::2], effect)[0, 1])
    assert likeness[-1] > likeness[0] + 0.1


def test_effects_that_do_not_come_back_are_not_counted_on() -> None:
    model, one = LengthModel(), batch(60, 8)
    for seed in range(1, 7):
        effect = np.random.default_rng(seed).normal(0, 0.8, 60)
        model = learn(model, one, draw(one, effect, 500, 0.3, seed))
    p50 = predict(model, one).quantiles()[:, 1]
    assert np.std(np.log(p50)) < 0.12


def test_a_prompt_that_was_never_seen_gets_the_running_distribution() -> None:
    model = learn(LengthModel(), batch(60, 8), draw(batch(60, 8), np.zeros(60), 500, 0.4, 0))
    new = replace(batch(1, 4), prompt_ids=("unseen",))
    assert predict(model, new).quantiles()[0, 1] == pytest.approx(500, rel=0.15)


def test_the_level_follows_drift() -> None:
    model = LengthModel()
    for step, mean in enumerate((300, 600, 1200), 1):
        model = learn(model, batch(60, 8, step), draw(batch(60, 8), np.zeros(60), mean, 0.4, step))
    assert predict(model, batch(60, 8)).quantiles()[0, 1] > 650


def test_a_step_of_long_prompts_does_not_pass_for_a_drift() -> None:
    rng, model = np.random.default_rng(9), LengthModel()
    for step, (least, most) in enumerate([(4, 8)] * 5 + [(7, 8)], 1):  # of the logarithm
        log_prompt = rng.uniform(least, most, 80)
        one = replace(batch(80, 8, step), prompt_ids=tuple(f"{step}-{i}" for i in range(80)))
        one = replace(one, prompt_tokens=np.exp(log_prompt[one.group_of]).astype(np.int64))
        model = learn(model, one, draw(one, 0.5 * (log_prompt - 5), 500, 0.3, step))
    short = Batch(7, ("new",), np.zeros(1, dtype=np.int64), np.array([148]), 100_000)
    assert predict(model, short).quantiles()[0, 1] == pytest.approx(500, rel=0.15)


@pytest.mark.parametrize("groups", [20, 60])
def test_predictions_follow_within_two_steps_when_every_length_doubles(groups: int) -> None:
    model, effect = LengthModel(), np.random.default_rng(6).normal(0, 0.4, groups)
    one = batch(groups, 8)
    for seed in range(1, 6):
        model = learn(model, one, draw(one, effect, 600, 0.4, seed))
    before = predict(model, one).quantiles()
    for seed in (6, 7):
        model = learn(model, one, 2 * draw(one, effect, 600, 0.4, seed))
    assert predict(model, one).quantiles()[:, 1].mean() == pytest.approx(2 * before[:, 1].mean(), rel=0.1)


def test_an_odd_step_of_a_few_prompts_moves_predictions_less_than_one_of_many() -> None:
    p50 = {}
    for groups in (2, 100):
        model = LengthModel()
        for step in range(1, 9):
            one = replace(batch(groups, 8, step), prompt_ids=tuple(f"{step}-{i}" for i in range(groups)))
            effect = np.random.default_rng(step).permutation(np.linspace(-0.5, 0.5, groups))
            model = learn(model, one, draw(one, effect, 500 if step < 8 else 1000, 0.4, step))
        p50[groups] = predict(model, replace(batch(1, 1), prompt_ids=("new",))).quantiles()[0, 1]
    assert p50[2] < 700 and p50[100] > 900


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


def test_what_all_groups_share_is_not_taken_for_each_prompts_own_effect() -> None:
    one = batch(60, 8)
    model = learn(LengthModel(), one, draw(one, np.random.default_rng(3).normal(0, 0.8, 60), 500, 0.3, 0))
    prior = predict(model, one)
    generated, finished = np.ones(480, dtype=np.int64), np.tile([1.0] * 7 + [0.0], 60)
    generated[finished > 0] = 2 * np.exp(prior.mu[finished > 0])
    got = refine(model, prior, one, generated, finished)
    assert (got.mu - prior.mu)[finished == 0] == pytest.approx(np.log(2), abs=0.1)


def test_nothing_is_known_better_before_the_first_sample_is_complete() -> None:
    model, one = LengthModel(), batch(40, 8)
    for seed, mean in enumerate((500, 1000, 400, 1200)):
        model = learn(model, one, draw(one, np.zeros(40), mean, 0.4, seed))
    prior = predict(model, one)
    assert refine(model, prior, one, np.ones(320, dtype=np.int64), np.zeros(320)).sigma == pytest.approx(prior.sigma)


def test_siblings_that_were_clipped_count_as_longer_than_the_cap() -> None:
    one = batch(60, 8, cap=1000)
    model = learn(LengthModel(), one, draw(one, np.random.default_rng(3).normal(0, 0.8, 60), 400, 0.3, 0).clip(1, 1000))
    one = replace(one, prompt_ids=tuple(f"new{i}" for i in range(60)))
    prior, mu = predict(model, one), []
    for length in (999, 1000):
        generated, finished = np.full(480, 300), np.zeros(480)
        generated[:4], finished[:4] = length, 1.0
        mu.append(refine(model, prior, one, generated, finished).mu[4])
    assert mu[1] > mu[0] + 0.05


def test_a_sample_that_outlives_its_prediction_is_expected_to_go_on() -> None:
    model = learn(LengthModel(), batch(60, 8), draw(batch(60, 8), np.zeros(60), 500, 0.4, 0))
    one = batch(60, 8)
    generated = np.full(480, 10)
    generated[0] = 5000
    got = refine(model, predict(model, one), one, generated, np.zeros(480))
    assert got.mean(generated)[0] > 5000
    assert got.cap >= 5000


def test_going_on_never_lowers_a_prediction_where_the_few_lengths_so_far_lie_apart() -> None:
    first, one = batch(2, 4, cap=1024), replace(batch(2, 4, 2, cap=1024), prompt_ids=("new0", "new1"))
    model = learn(LengthModel(), first, np.array([19, 115, 102, 105, 98, 95, 223, 649]))
    generated, finished = np.array([0, 71, 71, 44, 71, 55, 44, 18]), np.array([0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    expected = []
    for tokens in (1, 20, 50, 100, 200, 400, 800):
        generated[0] = tokens
        expected.append(refine(model, predict(model, one), one, generated, finished).mean(generated)[0])
    assert sorted(expected) == expected


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
