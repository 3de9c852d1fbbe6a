"""A real fused run: its numbers are verl's own, and most samples are inferred before the rollout ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scheduled import scheduled
from verl_rlhfless.demo import recipe
from verl_rlhfless.demo.assets import Assets
from verl_rlhfless.demo.run import ArmOutcome
from verl_rlhfless.live.variables import PACE_VARIABLE

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

_STEPS = 2
_LENGTHS = [8, 12, 40, 160]  # of each group's samples: the last one is the tail
_PACE = {"base_ms": 40.0, "per_inference_token_us": 500.0}
_PHASES = {"_compute_old_log_prob", "_compute_ref_log_prob", "_compute_values"}


def trace_of(folder: Path) -> Path:
    group = {"prompt_tokens": 20, "response_tokens": _LENGTHS}
    header = {"format": "rlhfless-trace/1", "name": "tail", "unit": "tokens", "max_response_tokens": 160, "n": 4}
    rest = {"kind": "composed", "source": "this test", "licence": "CC0-1.0", "note": "one long response a group"}
    groups = [{"prompt_id": f"p{row}", **group} for row in range(recipe.PROMPTS_PER_STEP)]
    path = folder / "trace.jsonl"
    path.write_text(f"{json.dumps(header | rest)}\n{json.dumps({'step': 1, 'epoch': 1, 'groups': groups})}\n")
    return path


@pytest.fixture(scope="module")
def outcome(train: Any, external_module: Any, assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> ArmOutcome:
    model = "actor_rollout_ref"
    return train(
        scheduled(1),
        steps=_STEPS,
        overrides=(
            "rlhfless.pool.suspend_trainer=never",
            "rlhfless/fusion=on",
            f"rlhfless.replay.trace={trace_of(tmp_path_factory.mktemp('trace'))}",
            "data.max_response_length=160",
            f"{model}.rollout.max_model_len={recipe.MAX_PROMPT_TOKENS + 160}",
            f"{model}.rollout.log_prob_micro_batch_size_per_gpu=2",
            f"{model}.actor.use_kl_loss=True",
            f"{model}.ref.log_prob_micro_batch_size_per_gpu=2",
            f"{model}.ref.use_torch_compile=False",
            f"{model}.ref.fsdp_config.dtype=float32",
            f"+{model}.ref.fsdp_config.mixed_precision={{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}}",
            f"{model}.rollout.calculate_log_probs=True",
            "algorithm.adv_estimator=gae",
            "critic.strategy=fsdp2",
            f"critic.model.path={assets.model}",
            "+critic.model.override_config.attn_implementation=sdpa",
            "critic.model.use_remove_padding=False",
            "critic.model.enable_gradient_checkpointing=False",
            "critic.fsdp.use_torch_compile=False",
            "critic.fsdp.dtype=float32",
            "+critic.fsdp.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
            "critic.ppo_micro_batch_size_per_gpu=8",
        ),
        environment={**external_module("fusion_twice"), PACE_VARIABLE: json.dumps(_PACE)},
    )


@pytest.fixture(scope="module")
def records(outcome: ArmOutcome) -> list[dict[str, Any]]:
    return [
        json.loads(line) for path in outcome.folder.glob("events-*.jsonl") for line in path.read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def phases(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [record for record in records if record["event"] == "twice"]
    assert {record["method"] for record in found} == _PHASES
    assert len(found) == _STEPS * len(_PHASES)
    return found


def test_results_and_metrics_are_those_of_the_unfused_step(phases: list[dict[str, Any]]) -> None:
    for phase in phases:
        assert max(phase["largest"].values()) > 1e-2, "zeros would prove nothing"
        assert max(phase["off"].values()) <= 1e-6, phase
        assert max(phase["off_metrics"].values(), default=0.0) <= 1e-6, phase


def test_samples_are_inferred_before_the_rollout_ends(phases: list[dict[str, Any]]) -> None:
    for phase in phases[len(_PHASES) :]:
        assert phase["num_recalled"] + phase["num_computed"] == recipe.PROMPTS_PER_STEP * len(_LENGTHS)
        assert phase["num_recalled"] >= 8, "half of the 32 samples end in the first quarter of the rollout"


def test_the_step_tells_what_fusion_did(outcome: ArmOutcome) -> None:
    assert outcome.exit_code == 0
    lines = [json.loads(line)["data"] for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    for metrics in lines:
        assert metrics["rlhfless/fused_samples"] > 0
        assert metrics["rlhfless/fused_s"] > 0
        assert metrics["rlhfless/fusion_failed"] == 0
    assert outcome.leftovers == ()
