"""What must hold for every prediction: order, monotonicity in what was generated, permutation, scale, and its state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_rlhfless.policy.predict import LengthModel, learn, predict, refine
from verl_rlhfless.policy.snapshot import Batch, FloatArray, IntArray

Step = tuple[Batch, IntArray]


@st.composite
def runs(draw: st.DrawFn) -> list[Step]:
    """Draw up to four steps over prompts of which some recur."""
    rng, cap = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.sampled_from([1024, 16384]))
    groups, n = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    steps = []
    for number in range(1, draw(st.integers(2, 4)) + 1):
        names = tuple(f"p{i}" for i in rng.choice(3 * groups, groups, replace=False))
        prompt_tokens = np.repeat(rng.integers(1, 500, groups), n)
        lengths = np.clip(np.exp(rng.normal(np.log(cap / 8), 1.0, groups * n)), 1, cap).astype(np.int64)
        steps.append((Batch(number, names, np.repeat(np.arange(groups), n), prompt_tokens, cap), lengths))
    return steps


def learnt(steps: list[Step]) -> LengthModel:
    model = LengthModel()
    for batch, lengths in steps:
        model = learn(model, batch, lengths)
    return model


def half_way(lengths: IntArray, at: float) -> tuple[IntArray, FloatArray]:
    """Return what was generated, and what is finished, when a share ``at`` of the samples is."""
    depth = int(np.quantile(lengths, at))
    return np.minimum(lengths, depth), (lengths <= depth).astype(float)


@settings(deadline=None, max_examples=60)
@given(runs(), st.floats(0, 1))
def test_quantiles_stay_ordered_and_bounded_while_samples_run(steps: list[Step], at: float) -> None:
    *before, (batch, lengths) = steps
    model = learnt(before)
    prior = predict(model, batch)
    for prediction in (prior, refine(model, prior, batch, *half_way(lengths, at))):
        low, middle, high = prediction.quantiles().T
        assert (low >= 1).all() and (low <= middle).all() and (middle <= high).all()
        assert (high <= batch.max_response_tokens).all()


@settings(deadline=None, max_examples=150)
@given(runs(), st.floats(0, 0.9), st.data())
def test_a_sample_that_has_generated_more_is_never_expected_to_be_shorter(
    steps: list[Step], at: float, data: st.DataObject
) -> None:
    *before, (batch, lengths) = steps
    model, (generated, finished) = learnt(before), half_way(lengths, at)
    if finished.all():
        return
    prior, sample = predict(model, batch), data.draw(st.sampled_from(np.flatnonzero(finished == 0).tolist()))
    expected = []
    for tokens in np.unique(np.linspace(1, batch.max_response_tokens - 1, 40, dtype=np.int64)):
        generated[sample] = tokens
        expected.append(refine(model, prior, batch, generated, finished).mean(generated)[sample])
    assert (np.diff(expected) >= -1e-6 * np.array(expected[1:])).all()


@settings(deadline=None, max_examples=60)
@given(runs(), st.integers(0, 2**32 - 1))
def test_the_order_of_prompts_and_samples_teaches_nothing(steps: list[Step], seed: int) -> None:
    rng, shuffled = np.random.default_rng(seed), []
    for batch, lengths in steps:
        groups, samples = rng.permutation(len(batch.prompt_ids)), rng.permutation(batch.num_samples)
        other = replace(
            batch,
            prompt_ids=tuple(batch.prompt_ids[i] for i in groups),
            group_of=np.argsort(groups)[batch.group_of][samples],
            prompt_tokens=batch.prompt_tokens[samples],
        )
        shuffled.append((other, lengths[samples]))
    batch = steps[-1][0]
    one, other = (predict(learnt(run), batch).quantiles() for run in (steps, shuffled))
    np.testing.assert_allclose(one, other, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(runs(), st.floats(0, 1))
def test_a_state_that_was_saved_and_loaded_predicts_the_same(steps: list[Step], at: float) -> None:
    *before, (batch, lengths) = steps
    model = learnt(before)
    loaded = LengthModel.from_json(model.to_json())
    one, other = (refine(of, predict(of, batch), batch, *half_way(lengths, at)) for of in (model, loaded))
    assert (one.quantiles() == other.quantiles()).all() and (one.mean(lengths) == other.mean(lengths)).all()
    assert (
        predict(learn(model, batch, lengths), batch).mean() == predict(learn(loaded, batch, lengths), batch).mean()
    ).all()


@settings(deadline=None, max_examples=60)
@given(runs())
def test_lengths_in_half_tokens_are_predicted_twice_as_long(steps: list[Step]) -> None:
    doubled = [
        (replace(batch, max_response_tokens=2 * batch.max_response_tokens), 2 * lengths) for batch, lengths in steps
    ]
    one, other = (predict(learnt(run), run[-1][0]) for run in (steps, doubled))
    np.testing.assert_allclose(np.exp(other.mu), 2 * np.exp(one.mu), rtol=1e-6)
    np.testing.assert_allclose(other.sigma, one.sigma, rtol=1e-6)
