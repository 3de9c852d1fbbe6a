"""A real run whose fleets are planned from predicted lengths; a replica that is done goes while the others decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from verl_rlhfless.demo import ablation, recipe
from verl_rlhfless.demo.assets import build_assets
from verl_rlhfless.demo.run import ArmOutcome, DemoOptions, run_arm
from verl_rlhfless.demo.workload import Size

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

_SIZE = Size(prompts=4, samples=4, max_response_tokens=160)  # lengths of a recorded run: a few long, most short
_PACE = {"base_ms": 60.0, "per_request_ms": 2.0, "per_prefill_token_ms": 0.2}
_STEPS = 2


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> ArmOutcome:
    out = tmp_path_factory.mktemp("planned")
    workload = ablation.prepare(None, out / "workload", 1, _SIZE)
    overrides = (
        *recipe.ELASTIC.overrides,
        "trainer.n_gpus_per_node=2",
        "rlhfless.pool.suspend_trainer=never",
        *ablation.overrides(workload, _SIZE),
        "rlhfless.planner.min_replicas=2",
    )
    assets = build_assets(out / "assets", list(workload.problems), 1)
    options = DemoOptions(out=out, steps=_STEPS, arms=("elastic",))
    return run_arm(recipe.Arm("planned", overrides), assets, options, print, json.dumps(_PACE))


@pytest.fixture(scope="module")
def records(outcome: ArmOutcome) -> list[dict[str, Any]]:
    return [json.loads(line) for path in outcome.folder.glob("events-*.jsonl") for line in _lines(path)]


def test_every_step_is_planned_and_all_its_samples_are_trained_on(
    outcome: ArmOutcome, records: list[dict[str, Any]]
) -> None:
    assert outcome.exit_code == 0
    planned = [record for record in records if record["event"] == "planned"]
    assert [record["step"] for record in planned] == [1, 2]
    assert all(len(record["replicas"]) == 2 and "static" in record["reason"] for record in planned)
    rolled_out = [record for record in records if record["event"] == "rolled_out"]
    assert [record["num_samples"] for record in rolled_out] == [16, 16] and not any(r["failure"] for r in rolled_out)


def test_a_replica_gives_its_lease_back_before_the_last_sample_ends(
    outcome: ArmOutcome, records: list[dict[str, Any]]
) -> None:
    leases = [json.loads(line) for line in _lines(outcome.folder / "leases.jsonl")]
    released_s = [r["t"] for r in leases if "/replica/" in r["lease"] and r["event"] == "released"]
    assert len(released_s) == 2 * _STEPS
    early = [record for record in records if record["event"] == "rolled_out" and record["num_released"]]
    assert early, "some step has a replica that is done before the other"
    for record in early:
        began_s = record["t"] - record["rollout_s"]
        assert any(began_s < at_s < record["t"] for at_s in released_s)


def test_what_was_predicted_stands_beside_what_was_measured(outcome: ArmOutcome, records: list[dict[str, Any]]) -> None:
    steps = [json.loads(line)["data"] for line in _lines(outcome.folder / "metrics.jsonl")]
    for step in steps:
        for name in ("rollout_s", "step_s", "gpu_s"):
            assert step[f"rlhfless/predicted_{name}"] > 0 and step[f"rlhfless/{name}"] > 0
        assert step["rlhfless/gpu_s"] > 2 * step["rlhfless/step_s"], "the trainer's lease and the replicas'"
    granted = {r["lease"]: r["t"] for r in map(json.loads, _lines(outcome.folder / "leases.jsonl")) if "num_gpus" in r}
    ready = {r["lease"]: r["t"] for r in records if r["event"] == "replica_ready"}
    first_starts_s = [ready[lease] - granted[lease] for lease in list(ready)[:2]]
    expected_s, took_s = (steps[1][f"rlhfless/{name}"] for name in ("predicted_rollout_s", "rollout_s"))
    assert expected_s < min(first_starts_s), "engines that sleep are not expected to start again"
    assert took_s / 2 < expected_s < 2 * took_s


def test_nothing_is_left_behind(outcome: ArmOutcome) -> None:
    assert outcome.leftovers == ()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
