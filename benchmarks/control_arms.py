"""What the planner and the dispatcher add: the elastic arm beside the same one without them, replicas paced and parked.

``fixed`` has the mean fleet of the elastic arm in every step, as nearly as whole replicas allow; ``random`` has the
planner's own fleets and a dispatcher that chooses any replica; ``oracle`` knows every length before the step, and shows
what both could reach. They join the column of a finished ``rlhfless demo --out OUT --columns parked`` and replay its
lengths; about seven minutes each, and those that have finished are kept.

python -m benchmarks.control_arms --out OUT [--arms fixed,random,oracle]  # writes benchmarks/results/control_arms.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.record import Part, digest, keep, parts_of, write_result
from verl_rlhfless.ab.arms import Arm
from verl_rlhfless.demo import ablation, recipe
from verl_rlhfless.demo.assets import Assets, build_assets
from verl_rlhfless.demo.columns import COLUMNS, WARM_UP, render_columns, summarise
from verl_rlhfless.demo.run import DemoOptions, run_arm
from verl_rlhfless.demo.workload import Workload
from verl_rlhfless.report.ab import build_arm
from verl_rlhfless.report.folder import RECORD_FILE

COLUMN = COLUMNS["parked"]
TARGET = 0.90
"""Objective of the elastic arm over that of a control arm that the planner and the dispatcher promise at most."""


def mean_schedule(counts: list[int]) -> list[int]:
    """Return as many fleets, each of whole replicas, with the same sum, as evenly as possible."""
    total, steps = sum(counts), len(counts)
    return [total * (step + 1) // steps - total * step // steps for step in range(steps)]


def control_arms(schedule: list[int]) -> dict[str, Arm]:
    """Return the elastic arm with a fixed schedule of fleets, with random dispatch, and with true lengths."""
    changes = {
        "fixed": ("rlhfless/planner=fixed", f"rlhfless.planner.schedule=[{','.join(map(str, schedule))}]"),
        "random": ("rlhfless/dispatcher=random",),
        "oracle": ("rlhfless/predictor=oracle",),
    }
    return {name: replace(recipe.ELASTIC, name=name).with_overrides(*of) for name, of in changes.items()}


def main() -> None:
    """Run the control arms beside a finished column and write their record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of a finished demo with the parked column")
    parser.add_argument("--arms", default="fixed,random,oracle")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    record: dict[str, Any] = json.loads((out / COLUMN.name / RECORD_FILE).read_text())
    steps = record["arms"]["elastic"]["steps"]
    schedule = mean_schedule([step["num_replicas"] for step in steps])
    workload = ablation.prepare(None, out, record["seed"])
    assets = build_assets(out / "assets", list(workload.problems), record["seed"])
    options = DemoOptions(out=out / COLUMN.name, steps=len(steps), seed=record["seed"])
    arms = control_arms(schedule)
    parts = parts_of(record, record["arms"])
    for name in arguments.arms.split(","):
        record["arms"][name], parts[name] = _measured(arms[name], workload, assets, options)
    summaries = summarise({COLUMN.name: record})
    print(render_columns(summaries))
    objective = {one.arm: one.objective for one in summaries if one.objective is not None}
    results = {
        "schedule": schedule,
        "warm_up_steps": WARM_UP,
        "target": TARGET,
        "arms": [asdict(one) for one in summaries],
        "elastic_objective_over": {name: objective["elastic"] / objective[name] for name in arguments.arms.split(",")},
    }
    command = f"python -m benchmarks.control_arms --out OUT --arms {arguments.arms}"
    write_result("control_arms", results, command=command, num_gpus=recipe.NUM_GPUS, parts=parts)


def _measured(arm: Arm, workload: Workload, assets: Assets, options: DemoOptions) -> Part:
    """Return the record of an arm, that of an earlier run if there is one."""
    applied, pace = COLUMN.applied_to(arm), COLUMN.pace.to_json() if COLUMN.pace else None

    def run() -> dict[str, Any]:
        replayed = replace(applied, overrides=(*ablation.overrides(workload), *applied.overrides))
        ended = run_arm(replayed, assets, options, print, pace)
        if ended.exit_code:
            raise SystemExit(f"{arm.name}: verl ended with exit code {ended.exit_code}; see {ended.folder}/train.log")
        return build_arm(ended.folder).as_json()

    settings = {"overrides": applied.overrides, "pace": pace, "steps": options.steps, "lengths": digest(workload.trace)}
    return keep(options.out / arm.name / "record.json", settings, run)


if __name__ == "__main__":
    main()
