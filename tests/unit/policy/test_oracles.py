"""What the arms with true lengths know: every sample's, or every prompt's mean and spread."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.baselines.oracle import Oracle, PromptOracle
from verl_rlhfless.policy.snapshot import IntArray

DATA = steps(1, 32, 8, mean=800.0, cap=8192)
ONE, BATCH, LENGTHS = cell(DATA), DATA[0].batch, DATA[0].lengths


def predicted(arm: type[Oracle], lengths: IntArray) -> IntArray:
    one = arm(lengths={1: lengths})
    return one.predict(one.begin(ONE.pool, BATCH), BATCH).quantiles()


def test_one_knows_every_sample_and_the_other_only_what_its_prompt_does() -> None:
    assert predicted(Oracle, LENGTHS)[:, 1] == pytest.approx(LENGTHS, rel=0.02)
    swapped = LENGTHS.reshape(32, 8)[:, ::-1].ravel()
    known = predicted(PromptOracle, LENGTHS)
    np.testing.assert_allclose(known, predicted(PromptOracle, swapped))
    assert all(len(set(group.tolist())) == 1 for group in known[:, 1].reshape(32, 8))


def test_what_is_known_of_prompts_is_right_on_the_whole() -> None:
    low, middle, high = predicted(PromptOracle, LENGTHS).T
    assert np.mean((low <= LENGTHS) & (high >= LENGTHS)) == pytest.approx(0.8, abs=0.05)
    assert np.corrcoef(np.log(middle), np.log(LENGTHS))[0, 1] > 0.3
