"""A real run whose planned fleet holds replicas of two tensor-parallel sizes side by side."""

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

_SIZE = Size(prompts=8, samples=2, max_response_tokens=64)
_PACE = {"base_ms": 60.0, "per_request_ms": 2.0, "per_prefill_token_ms": 0.2, "tp_speedup": {"2": 1.8}}
_STEPS = 2
_OVERRIDES = (
    "trainer.n_gpus_per_node=2",
    "rlhfless.pool.max_gpus=3",  # two replicas, as fast as possible: one of them has two GPUs
    "rlhfless.planner.tensor_parallel_sizes=[1,2]",
    "rlhfless.planner.min_replicas=2",
    "rlhfless.planner.max_replicas=2",
    "rlhfless.planner.cost_weight=0",
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> ArmOutcome:
    out = tmp_path_factory.mktemp("mixed")
    workload = ablation.prepare(None, out / "workload", 1, _SIZE)
    arm = recipe.ELASTIC.with_overrides(*ablation.overrides(workload, _SIZE), *_OVERRIDES)
    assets = build_assets(out / "assets", list(workload.problems), 1)
    return run_arm(arm, assets, DemoOptions(out=out, steps=_STEPS, arms=("elastic",)), print, json.dumps(_PACE))


def test_both_sizes_serve_every_step_and_all_its_samples_are_trained_on(outcome: ArmOutcome) -> None:
    assert outcome.exit_code == 0
    records = [json.loads(line) for path in outcome.folder.glob("events-*.jsonl") for line in _lines(path)]
    planned = [record for record in records if record["event"] == "planned"]
    assert [sorted(replica["tp"] for replica in record["replicas"]) for record in planned] == [[1, 2]] * _STEPS
    rolled_out = [record for record in records if record["event"] == "rolled_out"]
    assert [record["num_samples"] for record in rolled_out] == [16] * _STEPS
    leased = [record["num_gpus"] for record in _leases(outcome) if "/replica/" in record["lease"]]
    assert sorted(leased) == [1, 1, 2, 2]


def test_replicas_of_both_sizes_generate_what_the_trainer_would(outcome: ArmOutcome) -> None:
    steps = [json.loads(line)["data"] for line in _lines(outcome.folder / "metrics.jsonl")]
    assert len(steps) == _STEPS
    assert all(step["training/rollout_probs_diff_max"] < 1e-6 for step in steps)


def test_nothing_is_left_behind(outcome: ArmOutcome) -> None:
    assert outcome.leftovers == ()


def _leases(outcome: ArmOutcome) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in _lines(outcome.folder / "leases.jsonl")]
    return [record for record in records if record["event"] == "granted"]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
