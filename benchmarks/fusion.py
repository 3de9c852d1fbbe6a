"""What fusion alone gains: the same elastic GRPO step with a reference, its inference after the rollout or beside it.

Both arms replay the same lengths on two elastic replicas and two trainer GPUs; iterations and trainer phases are paced.
One arm is one real verl run on the CPU, about eight minutes; finished arms are kept, so a run can be taken up again.

python -m benchmarks.fusion --out OUT [--arms off,on] [--trace FILE]   # writes benchmarks/results/fusion.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.record import Part, digest, keep, trace_option, write_result
from benchmarks.scheduled import scheduled
from verl_rlhfless.demo import ablation, recipe
from verl_rlhfless.demo.assets import build_assets
from verl_rlhfless.demo.run import DemoOptions, run_arm
from verl_rlhfless.demo.workload import Size, Workload
from verl_rlhfless.report.ab import build_arm

STEPS = 7
WARM_UP = 1  # imports, first calls, and a length model that knows nothing
SEED = 1
SIZE = Size(prompts=12, samples=8, max_response_tokens=160)
PACE = {
    "base_ms": 120.0,
    "per_request_ms": 4.0,
    "per_prefill_token_ms": 0.4,
    "per_context_token_us": 2.0,
    "per_inference_token_us": 520.0,
    "per_update_token_us": 1560.0,
}
"""Ratios of a 7B model on an L40S (22 ms weights; 97 us a token forward at 40 % of the peak, three times that for an
update), slowed down alike until two cores can follow."""
MAX_HOST_CPU = 70.0
TARGET = 0.95
"""Step time with fusion over without that the feature promises at most."""
ARMS = ("off", "on")

_ACTOR = "actor_rollout_ref"
REFERENCE = (
    f"{_ACTOR}.actor.use_kl_loss=True",
    f"{_ACTOR}.rollout.log_prob_micro_batch_size_per_gpu=4",
    f"{_ACTOR}.ref.log_prob_micro_batch_size_per_gpu=4",
    f"{_ACTOR}.ref.use_torch_compile=False",
    f"{_ACTOR}.ref.fsdp_config.dtype=float32",
    f"+{_ACTOR}.ref.fsdp_config.mixed_precision={{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}}",
)
"""GRPO with a reference model, in chunks of eight samples on two ranks."""


def arm_overrides(name: str) -> tuple[str, ...]:
    """Return the overrides that make an arm; the last schedule wins."""
    return (*scheduled(2).overrides, "rlhfless.pool.suspend_trainer=never", *REFERENCE, f"rlhfless/fusion={name}")


def settings_of(name: str, workload: Workload) -> dict[str, Any]:
    """Return what makes an arm."""
    lengths = digest(workload.trace)
    return {"overrides": arm_overrides(name), "pace": PACE, "steps": STEPS, **asdict(SIZE), "lengths": lengths}


def measure(name: str, workload: Workload, out: Path) -> Part:
    """Run one arm and return its figures, those of an earlier run if there are any."""
    settings = settings_of(name, workload)
    return keep(out / name / "figures.json", settings, lambda: _run(name, workload, out / name))


def _run(name: str, workload: Workload, folder: Path) -> dict[str, Any]:
    assets = build_assets(folder.parent / "assets", list(workload.problems), SEED)
    overrides = (*ablation.overrides(workload, SIZE), *arm_overrides(name))
    options = DemoOptions(out=folder.parent, steps=STEPS, seed=SEED, arms=("elastic",))
    outcome = run_arm(recipe.Arm(folder.name, overrides), assets, options, partial(print, flush=True), json.dumps(PACE))
    if outcome.exit_code != 0:
        raise SystemExit(f"{name}: verl ended with exit code {outcome.exit_code}; see {folder / 'train.log'}")
    return figures_of(folder)


def figures_of(folder: Path) -> dict[str, Any]:
    """Return the figures of a finished arm: medians over the steps after the warm-up [s]."""
    steps = build_arm(folder).as_json()["steps"][WARM_UP:]
    metrics = [json.loads(line)["data"] for line in (folder / "metrics.jsonl").read_text().splitlines()][WARM_UP:]

    def median(key: str) -> float | None:
        values = [step[key] for step in metrics if key in step]
        return statistics.median(values) if values else None

    return {
        "step_s": median("timing_s/step"),
        "step_s_of_steps": [step["timing_s/step"] for step in metrics],
        "gen_s": median("timing_s/gen"),
        "old_log_prob_s": median("timing_s/old_log_prob"),
        "ref_s": median("timing_s/ref"),
        "update_actor_s": median("timing_s/update_actor"),
        "fused_samples": median("rlhfless/fused_samples"),
        "late_samples": median("rlhfless/late_samples"),
        "fused_s": median("rlhfless/fused_s"),
        "fusion_wait_s": median("rlhfless/fusion_wait_s"),
        "rollout_s_of_steps": [step["rollout_s"] for step in steps],
        "response_tokens": [step["response_tokens"] for step in steps],
        "host_cpu_percent": max(step["host_cpu_percent"] for step in steps),
        "rollout_probs_diff_max": max(step["rollout_probs_diff_max"] for step in steps),
        "is_complete": all(step["num_samples"] == SIZE.prompts * SIZE.samples for step in steps),
    }


def compare(arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return every arm beside the one without fusion, and whether the figures may be believed."""
    off = arms.get("off")
    for figures in arms.values():
        if off:
            figures["over_off"] = figures["step_s"] / off["step_s"]
            figures["is_same_work"] = figures["response_tokens"] == off["response_tokens"]
        figures["is_valid"] = (
            figures["is_complete"]
            and figures.get("is_same_work", True)
            and figures["host_cpu_percent"] <= MAX_HOST_CPU
            and figures["rollout_probs_diff_max"] < 1e-6
        )
    return arms


def main() -> None:
    """Measure the chosen arms and write their record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args()
    out = options.out.resolve()
    workload = ablation.prepare(options.trace, out, SEED, SIZE)
    names = options.arms.split(",")
    measured = {name: measure(name, workload, out) for name in names}
    compared = compare({name: arm.found for name, arm in measured.items()})
    for name, figures in compared.items():
        print(f"{name:>5}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
    settings = {"pace": PACE, "steps": STEPS, "warm_up_steps": WARM_UP, **asdict(SIZE), "target": TARGET}
    command = f"python -m benchmarks.fusion --out OUT --arms {','.join(names)}{trace_option(options.trace)}"
    parts = {name: arm.code for name, arm in measured.items()}
    write_result("fusion", {**settings, "arms": compared}, command=command, parts=parts)


if __name__ == "__main__":
    main()
