"""The benchmark of predicted lengths tells good intervals from short, wide and useless ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.coverage import beyond, quality, rate, verdicts
from verl_rlhfless.errors import DataError
from verl_rlhfless.policy.prediction import Prediction
from verl_rlhfless.sim.generate import TraceSpec, write_trace

LENGTHS = np.arange(1, 1001)
OWN = np.quantile(LENGTHS, (0.1, 0.5, 0.9))


def test_an_interval_that_is_right_covers_80_percent_and_loses_nothing_on_who_knows_the_step() -> None:
    found = quality([(LENGTHS, np.tile(OWN, (1000, 1)))])
    assert found["coverage"] == 0.8 and found["pinball"] == 1.0 and found["width"] == found["step_width"]


@pytest.mark.parametrize(("low", "high", "coverage"), [(1.0, 1000.0, 1.0), (450.0, 550.0, 0.101)])
def test_an_interval_that_is_too_wide_or_too_short_shows(low: float, high: float, coverage: float) -> None:
    found = quality([(LENGTHS, np.tile([low, OWN[1], high], (1000, 1)))])
    assert found["coverage"] == coverage and found["pinball"] > 1.04
    assert found["width"] == pytest.approx(high / low, abs=0.01)


def test_who_tells_prompts_apart_loses_less_than_who_knows_the_step() -> None:
    found = quality([(LENGTHS, LENGTHS[:, None] * np.array([0.9, 1.0, 1.1]))])
    assert found["pinball"] < 0.5 and found["p50_error_tokens"] == {"median": 0, "p90": 0}


def test_samples_that_run_on_are_expected_beyond_what_they_have() -> None:
    prediction = Prediction(np.log([100.0, 100.0]), np.array([1.0, 0.5]), 10_000)
    quantiles = beyond(prediction, 100)  # half of each is longer
    z = np.array([0.1257, 0.6745, 1.6449])  # of 55, 75 and 95 %
    assert quantiles == pytest.approx(100 * np.exp(np.outer([1.0, 0.5], z)), rel=0.03)
    assert (beyond(prediction, 9_999) == 10_000).all()


def test_a_trace_on_which_intervals_cover_too_much_or_too_little_is_named() -> None:
    rows = [
        {"trace": name, "before": {"coverage": before}, "running": {"coverage": 0.8}}
        for name, before in (("low", 0.74), ("right", 0.75), ("high", 0.86))
    ]
    before, running = verdicts(rows)
    assert before["verdict"] == "missed" and before["missed"] == {"low": 0.74, "high": 0.86}
    assert running["verdict"] == "met" and running["missed"] == {}


def test_a_trace_of_two_steps_is_refused(tmp_path: Path) -> None:
    write_trace(TraceSpec(2, 1, 8, 2, max_response_tokens=256), tmp_path / "short.jsonl")
    with pytest.raises(DataError, match=r"short.jsonl: 2 steps"):
        rate(tmp_path / "short.jsonl")


def test_first_visits_and_revisits_are_counted_apart(tmp_path: Path) -> None:
    write_trace(TraceSpec(3, 2, 32, 4, mean=300.0, max_response_tokens=8192), tmp_path / "six.jsonl")
    before = rate(tmp_path / "six.jsonl")["before"]
    assert min(before["first_visit_coverage"], before["revisit_coverage"]) <= before["coverage"]
    assert max(before["first_visit_coverage"], before["revisit_coverage"]) >= before["coverage"]
