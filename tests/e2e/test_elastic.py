"""One real elastic run whose steps are, in turn: right, served with stale weights, and hit by the loss of an engine."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from benchmarks.scheduled import scheduled
from tests.temporary_files import files_of_engines
from verl_rlhfless.demo import recipe
from verl_rlhfless.demo.run import ArmOutcome
from verl_rlhfless.report.ab import build_arm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

_STALE_STEP, _KILL_STEP = 2, 3


@pytest.fixture(scope="module")
def outcome(train: Any, external_module: Any) -> ArmOutcome:
    files_before = files_of_engines()
    faults = {"RLHFLESS_TEST_STALE_STEP": str(_STALE_STEP), "RLHFLESS_TEST_KILL_STEP": str(_KILL_STEP)}
    outcome = train(
        scheduled(2, 1, 1),
        steps=_KILL_STEP,
        environment={**external_module("faults"), **faults},
    )
    return dataclasses.replace(outcome, leftovers=(*outcome.leftovers, *(files_of_engines() - files_before)))


@pytest.fixture(scope="module")
def records(outcome: ArmOutcome) -> list[dict[str, Any]]:
    return [
        json.loads(line) for path in outcome.folder.glob("events-*.jsonl") for line in path.read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def arm(outcome: ArmOutcome) -> Any:
    return build_arm(outcome.folder)


def test_replicas_are_leased_and_returned_inside_every_step(outcome: ArmOutcome) -> None:
    leases = [json.loads(line) for line in (outcome.folder / "leases.jsonl").read_text().splitlines()]
    replicas = [record for record in leases if "/replica/" in record["lease"]]
    granted = [record["lease"] for record in replicas if record["event"] == "granted"]
    released = [record["lease"] for record in replicas if record["event"] == "released"]
    assert len(granted) == len(set(granted)) == 5, "two replicas, then one, then one and the one that replaced it"
    assert sorted(granted) == sorted(released)
    second_step_starts = min(record["t"] for record in replicas if record["lease"] == granted[2])
    assert all(
        record["t"] < second_step_starts
        for record in replicas
        if record["event"] == "released" and record["lease"] in granted[:2]
    ), "a step's replicas are gone before the next step's are asked for"


def test_engines_sleep_between_steps_and_a_killed_one_is_replaced(records: list[dict[str, Any]]) -> None:
    woken = [record for record in records if record["event"] == "replica_woken"]
    starts = {r["version"]: r["t"] for r in records if r["event"] == "published"}
    assert sum(starts[_STALE_STEP - 1] < record["t"] < starts[_STALE_STEP] for record in woken) == 1
    assert sum(starts[_KILL_STEP - 1] < record["t"] for record in woken) >= 1
    assert all(record["seconds"] < 5 for record in woken), "no start"


def test_the_log_tells_the_reason_of_every_fleet_and_the_loss_of_a_replica(outcome: ArmOutcome) -> None:
    log = (outcome.folder / "train.log").read_text()
    for step in range(1, _KILL_STEP + 1):
        assert f"rlhfless: step {step}: " in log
    assert "is lost: " in log


def test_right_step_passes_the_weight_guards(arm: Any, records: list[dict[str, Any]]) -> None:
    assert arm.steps[0].figures.rollout_probs_diff_max < 1e-6
    assert _loaded(records, step=1) == {_published(records, version=0)}


def test_stale_weights_fail_both_weight_guards(arm: Any, records: list[dict[str, Any]]) -> None:
    assert arm.steps[_STALE_STEP - 1].figures.rollout_probs_diff_max > 1e-6
    assert _loaded(records, step=_STALE_STEP) != {_published(records, version=_STALE_STEP - 1)}


def test_loss_of_the_only_engine_costs_no_sample(outcome: ArmOutcome, arm: Any) -> None:
    assert outcome.exit_code == 0
    hit = arm.steps[_KILL_STEP - 1].figures
    assert hit.num_samples == recipe.PROMPTS_PER_STEP * recipe.SAMPLES_PER_PROMPT
    assert hit.rollout_probs_diff_max < 1e-6, "tokens of both engines come from the weights of the step"


def test_nothing_is_left_behind(outcome: ArmOutcome) -> None:
    assert outcome.leftovers == ()


def _published(records: list[dict[str, Any]], version: int) -> tuple[int, str]:
    (record,) = [r for r in records if r["event"] == "published" and r["version"] == version]
    return record["version"], record["checksum"]


def _loaded(records: list[dict[str, Any]], step: int) -> set[tuple[int, str]]:
    """Return version and checksum of every pull between the publications of versions ``step - 1`` and ``step``."""
    times = {r["version"]: r["t"] for r in records if r["event"] == "published"}
    begin, end = times[step - 1], times.get(step, float("inf"))
    return {(r["version"], r["checksum"]) for r in records if r["event"] == "pulled" and begin < r["t"] < end}
