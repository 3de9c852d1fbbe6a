"""Real trainings on clusters of several Ray nodes: a trainer over two of them, and one that the autoscaler adds and
that is lost in mid-rollout. The nodes are Ray's, with addresses and object stores of their own; the host is one.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scheduled import scheduled
from tests.ray_nodes import autoscaled, two_nodes
from verl_rlhfless.ab.training import ArmOutcome, OpenCluster, Training, train
from verl_rlhfless.demo import ablation, recipe
from verl_rlhfless.demo.assets import build_assets
from verl_rlhfless.demo.run import DemoOptions, arm_command
from verl_rlhfless.demo.workload import Size
from verl_rlhfless.report.ab import build_arm

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

_SIZE = Size(prompts=8, samples=4, max_response_tokens=64)
_PACE = {"base_ms": 60.0, "per_request_ms": 2.0, "per_prefill_token_ms": 0.2}
_LOSS_STEP = 2


def _train(
    out: Path, arm: recipe.Arm, steps: int, open_cluster: OpenCluster, environment: dict[str, str] | None = None
) -> ArmOutcome:
    workload = ablation.prepare(None, out / "workload", 1, _SIZE)
    assets = build_assets(out / "assets", list(workload.problems), 1)
    arm, options = arm.with_overrides(*ablation.overrides(workload, _SIZE)), DemoOptions(out=out, steps=steps)
    training = Training(
        argv=arm_command(arm, assets, options, out / "run"),
        folder=out / "run",
        open_cluster=open_cluster,
        environment=recipe.CPU_ENVIRONMENT | (environment or {}),
        pace=json.dumps(_PACE),
        timeout_s=900,
    )
    return train(training, print)


def test_trainer_and_replicas_over_two_nodes_train_as_on_one(tmp_path: Path) -> None:
    arm = recipe.ELASTIC.with_overrides(
        "trainer.n_gpus_per_node=2", "trainer.nnodes=2", "rlhfless/planner=fixed", "rlhfless.planner.schedule=[4,2]"
    )
    outcome = _train(tmp_path, arm, 2, partial(two_nodes, gpus=(2, 2)))
    _check(outcome, num_steps=2)
    trainer, *rest = _granted(outcome)
    assert trainer == 4 and rest == [1, 1, 1, 1, 4, 1, 1, 4], "four replicas, then two, and the trainer after each"


def test_a_node_that_the_autoscaler_added_and_that_is_lost_costs_no_sample_and_is_replaced(
    tmp_path: Path, external_module: Any
) -> None:
    environment = {**external_module("faults"), "RLHFLESS_TEST_LOSE_NODE_STEP": str(_LOSS_STEP)}
    arm = scheduled(3).with_overrides("rlhfless.pool.max_gpus=3")
    nodes = partial(autoscaled, head_gpus=2, worker_gpus=1, max_workers=1, idle_s=60)
    outcome = _train(tmp_path, arm, 3, nodes, environment)
    _check(outcome, num_steps=3)
    records = [json.loads(line) for path in outcome.folder.glob("events-*.jsonl") for line in _lines(path)]
    ready = [record["t"] for record in records if record["event"] == "replica_ready"]
    published = [record["t"] for record in records if record["event"] == "published"]
    assert sum(t > published[_LOSS_STEP] for t in ready) == 3, "the step after has three replicas again"
    assert "is lost: " in (outcome.folder / "train.log").read_text()


def _check(outcome: ArmOutcome, num_steps: int) -> None:
    assert outcome.exit_code == 0, outcome.why
    steps = build_arm(outcome.folder).steps
    assert len(steps) == num_steps
    for step in steps:
        assert step.figures.num_samples == _SIZE.prompts * _SIZE.samples
        assert step.figures.rollout_probs_diff_max < 1e-6
    assert outcome.leftovers == ()


def _granted(outcome: ArmOutcome) -> list[int]:
    """Return the GPUs of every lease, in the order of their grants."""
    leases = [json.loads(line) for line in _lines(outcome.folder / "leases.jsonl")]
    return [lease["num_gpus"] for lease in sorted(leases, key=lambda lease: lease["t"]) if lease["event"] == "granted"]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
