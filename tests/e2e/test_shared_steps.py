"""A real run that leases for its first step and its validations, and shares the trainer's GPUs in the other step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from verl_rlhfless.demo import ablation, recipe
from verl_rlhfless.demo.assets import build_assets
from verl_rlhfless.demo.run import ArmOutcome, DemoOptions, run_arm
from verl_rlhfless.demo.workload import Size
from verl_rlhfless.report.ab import build_arm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

_SIZE = Size(prompts=8, samples=2, max_response_tokens=32)
_STEPS = 2
_OVERRIDES = (
    "trainer.n_gpus_per_node=2",
    "rlhfless.pool.max_gpus=2",
    "rlhfless.planner.tensor_parallel_sizes=[1]",
    "rlhfless.planner.min_replicas=2",
    "rlhfless.planner.cost_weight=0",  # only time: a trainer that leaves takes longer
    "trainer.test_freq=1",
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> ArmOutcome:
    out = tmp_path_factory.mktemp("shared")
    workload = ablation.prepare(None, out / "workload", 1, _SIZE)
    arm = recipe.ELASTIC.with_overrides(*ablation.overrides(workload, _SIZE), *_OVERRIDES)
    assets = build_assets(out / "assets", list(workload.problems), 1)
    return run_arm(arm, assets, DemoOptions(out=out, steps=_STEPS, arms=("elastic",)), print)


def test_a_step_for_which_leases_do_not_pay_runs_beside_the_trainer(outcome: ArmOutcome) -> None:
    assert outcome.exit_code == 0
    records = _records(outcome.folder, "events-*.jsonl")
    planned = [record for record in records if record["event"] == "planned"]
    assert [record["is_resident"] for record in planned] == [False, True], "nothing sleeps before the first step"
    assert planned[1]["reason"].startswith("resident TP1")
    shared = [record["lease"] for record in records if record["event"] == "replica_ready"]
    assert sum("/trainer/" in lease for lease in shared) == 2
    assert [record["num_samples"] for record in records if record["event"] == "rolled_out"] == [16] * _STEPS


def test_its_work_is_charged_to_the_trainers_lease_and_nothing_else_is_leased(outcome: ArmOutcome) -> None:
    arm = build_arm(outcome.folder)
    assert [record.figures.num_replicas for record in arm.steps] == [2, 2]
    for record in arm.steps:
        assert record.figures.gpu is not None and record.figures.gpu.max_gpus == 2
    assert all(pull.version == pull.expected_version for pull in arm.pulls)
    assert all(pull.checksum == pull.published_checksum for pull in arm.pulls)


def test_engines_go_from_the_trainers_lease_to_leases_of_their_own_and_back(outcome: ArmOutcome) -> None:
    records = _records(outcome.folder, "events-*.jsonl")
    woken = [(record["parked_as"], record["lease"]) for record in records if record["event"] == "replica_woken"]
    assert any("/trainer/" in before and "/replica/" in after for before, after in woken)
    assert any("/replica/" in before and "/trainer/" in after for before, after in woken)
    leased = [record for record in _records(outcome.folder, "leases.jsonl") if "/replica/" in record["lease"]]
    assert leased, "validations lease"


def test_replicas_generate_what_the_trainer_would(outcome: ArmOutcome) -> None:
    steps = [record["data"] for record in _records(outcome.folder, "metrics.jsonl")]
    assert len(steps) == _STEPS
    assert all(step["training/rollout_probs_diff_max"] < 1e-6 for step in steps)


def test_nothing_is_left_behind(outcome: ArmOutcome) -> None:
    assert outcome.leftovers == ()


def _records(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob(pattern)) for line in path.read_text().splitlines()]
