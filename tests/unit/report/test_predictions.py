"""What a plan expected of a step stands beside what the step took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.observed_run import elastic_run
from verl_rlhfless.report.ab import build_arm
from verl_rlhfless.report.observed import read_observed
from verl_rlhfless.report.predictions import Prediction, predictions


def told(folder: Path, *planned: dict[str, Any]) -> dict[tuple[int, str], Prediction]:
    run = elastic_run(folder)
    run.append("events-1.jsonl", *({"event": "planned", "t": 109.1, **event} for event in planned))
    steps = {step.step: step.figures for step in build_arm(run.path).steps}
    return {(one.step, one.figure): one for one in predictions(read_observed(run.path), steps)}


def test_each_figure_of_a_forecast_stands_beside_its_own_measurement(tmp_path: Path) -> None:
    forecast = {"rollout_s": 2.0, "step_s": 12.0, "gpu_s": 55.0, "response_tokens": 100, "num_replicas": 2}
    found = told(tmp_path, {"step": 1, "forecast": forecast})
    # the rollout lasts from the step's begin at 109 to the replica's last work at 114.5; trainer 22, replica 5.5 GPU s
    measured = {"rollout_s": 5.5, "step_s": 10, "gpu_s": 27.5, "response_tokens": 50, "num_replicas": 1}
    assert {figure: one.measured for (_, figure), one in found.items()} == measured
    assert {figure: one.predicted for (_, figure), one in found.items()} == forecast


def test_an_error_is_a_share_of_what_was_measured_and_positive_where_too_much_was_expected(tmp_path: Path) -> None:
    found = told(tmp_path, {"step": 1, "forecast": {"step_s": 12.0, "gpu_s": 11.0, "static_step_s": 9.0}})
    assert found[1, "step_s"].error == pytest.approx(0.2) and found[1, "gpu_s"].error == pytest.approx(-0.6)
    assert found[1, "static_step_s"].error is None, "that fleet did not run"


def test_the_last_plan_of_a_step_counts_with_what_its_own_fields_say(tmp_path: Path) -> None:
    first = {"step": 2, "forecast": {"step_s": 1.0}}
    last = {"step": 2, "forecast": {"step_s": 2.0, "gpu_s": 3.0}, "predicted_step_s": 8.0, "predicted_fleet": "2xTP1"}
    found = told(tmp_path, first, last, {"step": 3, "forecast": {"step_s": 4.0}}, {"step": 1, "forecast": None})
    assert {place: one.predicted for place, one in found.items()} == {
        (2, "step_s"): 8.0,
        (2, "gpu_s"): 3.0,
        (3, "step_s"): 4.0,
    }
    assert found[3, "step_s"].measured is None, "it did not come to that"
