"""What routing alone gains: rollout time on a resident fleet of four paced replicas, part by part.

All arms replay the same lengths on verl's own hybrid replicas, so elasticity plays no part. One arm is one real verl
run on the CPU, about twelve minutes; finished arms are kept, so a run can be taken up again.

python -m benchmarks.routing --out OUT [--arms stock,all] [--trace FILE]   # writes benchmarks/results/routing.json
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.record import Part, digest, keep, trace_option, write_result
from verl_rlhfless.demo import ablation, recipe
from verl_rlhfless.demo.assets import build_assets
from verl_rlhfless.demo.columns import MAX_HOST_CPU
from verl_rlhfless.demo.run import DemoOptions, run_arm
from verl_rlhfless.demo.workload import Size, Workload
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.report.ab import build_arm

STEPS = 7
WARM_UP = 1  # imports, and a length model that knows nothing
SEED = 1
SIZE = Size(prompts=16, samples=8, max_response_tokens=160)
DEVICE = PaceModel(base_ms=180.0, per_request_ms=6.0, per_prefill_token_ms=0.6, per_context_token_us=3.0)
"""The demo's, half as slow again, until two cores can follow four engines with twice the demo's samples. No phase of
the trainer is paced: only rollouts are compared."""
SLOTS = 14  # requests that a replica runs at once; the rest waits, as when keys and values of long responses fill a GPU

_GROUPS = {"predictor": "off", "dispatcher": "stock", "prefix_dedup": "off", "migration": "off"}
ARMS: dict[str, dict[str, str] | None] = {
    "stock": None,
    "router": {},
    "dispatcher": {"predictor": "history", "dispatcher": "length_bucket"},
    "dispatcher+dedup": {"predictor": "history", "dispatcher": "length_bucket", "prefix_dedup": "on"},
    "all": {
        "predictor": "history",
        "dispatcher": "length_bucket",
        "prefix_dedup": "on",
        "migration": "cut_and_migrate",
    },
    "true-lengths": {
        "predictor": "oracle",
        "dispatcher": "length_bucket",
        "prefix_dedup": "on",
        "migration": "cut_and_migrate",
    },
    "random": {
        "predictor": "history",
        "dispatcher": "random",
        "prefix_dedup": "on",
        "migration": "cut_and_migrate",
    },
    "no-prediction": {"dispatcher": "length_bucket", "prefix_dedup": "on", "migration": "cut_and_migrate"},
}


def arm_overrides(name: str) -> tuple[str, ...]:
    """Return the overrides that make an arm: stock verl, or our router with the chosen parts."""
    parts = ARMS[name]
    if parts is None:
        return recipe.STOCK.overrides
    return (*recipe.RESIDENT.overrides, *(f"rlhfless/{part}={value}" for part, value in {**_GROUPS, **parts}.items()))


def settings_of(name: str, workload: Workload) -> dict[str, Any]:
    """Return what makes an arm."""
    made_of = {"overrides": arm_overrides(name), "pace": asdict(DEVICE), "steps": STEPS, "slots": SLOTS}
    return {**made_of, **asdict(SIZE), "lengths": digest(workload.trace)}


def measure(name: str, workload: Workload, out: Path) -> Part:
    """Run one arm and return its figures, those of an earlier run if there are any."""
    settings = settings_of(name, workload)
    return keep(out / name / "figures.json", settings, lambda: _run(name, workload, out / name))


def _run(name: str, workload: Workload, folder: Path) -> dict[str, Any]:
    assets = build_assets(folder.parent / "assets", list(workload.problems), SEED)
    overrides = [
        *ablation.overrides(workload, SIZE),
        f"actor_rollout_ref.rollout.max_num_seqs={SLOTS}",
        *arm_overrides(name),
    ]
    options = DemoOptions(out=folder.parent, steps=STEPS, seed=SEED, arms=("stock",))
    say = partial(print, flush=True)
    outcome = run_arm(recipe.Arm(folder.name, tuple(overrides)), assets, options, say, DEVICE.to_json())
    if outcome.exit_code != 0:
        raise SystemExit(f"{name}: verl ended with exit code {outcome.exit_code}; see {folder / 'train.log'}")
    least = ablation.least_prefill_of_steps(assets.model, workload, STEPS, SIZE)
    return _figures(folder, least)


def _figures(folder: Path, least: dict[int, int]) -> dict[str, Any]:
    arm = build_arm(folder).as_json()
    steps = arm["steps"][WARM_UP:]
    expected = SIZE.prompts * SIZE.samples
    return {
        "rollout_s": statistics.median(step["rollout_s"] for step in steps),
        "rollout_s_of_steps": [step["rollout_s"] for step in steps],
        "prefill_tokens": statistics.median(step["prefill_tokens"] for step in steps),
        "prefill_over_least": statistics.median(step["prefill_tokens"] / least[step["step"]] for step in steps),
        "num_migrations": _median(steps, "num_migrations"),
        "router_cpu_s": _median(steps, "router_cpu_s"),
        "response_tokens": [step["response_tokens"] for step in steps],
        "host_cpu_percent": max(step["host_cpu_percent"] for step in steps),
        "rollout_probs_diff_max": max(step["rollout_probs_diff_max"] for step in steps),
        "is_complete": all(step["num_samples"] == expected for step in arm["steps"]),
    }


def _median(steps: list[dict[str, Any]], key: str) -> float | None:
    values = [step[key] for step in steps if step[key] is not None]
    return statistics.median(values) if values else None


def compare(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return every arm beside stock and beside true lengths, and whether the figures may be believed."""
    stock, truth = arms.get("stock"), arms.get("true-lengths")
    for figures in arms.values():
        if stock:
            figures["over_stock"] = figures["rollout_s"] / stock["rollout_s"]
            figures["is_same_work"] = figures["response_tokens"] == stock["response_tokens"]
        if truth:
            figures["over_true_lengths"] = figures["rollout_s"] / truth["rollout_s"]
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
        print(f"{name:>20}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
    settings = {
        "pace": asdict(DEVICE),
        "steps": STEPS,
        "slots": SLOTS,
        "prompts": SIZE.prompts,
        "samples": SIZE.samples,
    }
    command = f"python -m benchmarks.routing --out OUT --arms {','.join(names)}{trace_option(options.trace)}"
    parts = {name: arm.code for name, arm in measured.items()}
    write_result("routing", {**settings, "arms": compared}, command=command, parts=parts)


if __name__ == "__main__":
    main()
