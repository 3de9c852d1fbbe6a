"""What the planner and the dispatcher add: the elastic arm beside the same one without them, replicas paced and parked.

``fixed`` has the mean fleet of the elastic arm in every step, as nearly as whole replicas allow; ``random`` has the
planner's own fleets and a dispatcher that chooses any replica. Both join the column of a finished
``rlhfless demo --out OUT --columns parked`` and replay its lengths; about five minutes each.

python -m benchmarks.control_arms --out OUT      # writes benchmarks/results/control_arms.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.record import write_result
from verl_rlhfless.ab.arms import Arm
from verl_rlhfless.demo import ablation, recipe
from verl_rlhfless.demo.assets import build_assets
from verl_rlhfless.demo.columns import COLUMNS, WARM_UP, render_columns, summarise
from verl_rlhfless.demo.run import DemoOptions, run_arm
from verl_rlhfless.report.ab import build_arm
from verl_rlhfless.report.folder import RECORD_FILE

COLUMN = COLUMNS["parked"]
TARGET = 0.90
"""Objective of the elastic arm over that of a control arm that the planner and the dispatcher promise at most."""


def mean_schedule(counts: list[int]) -> list[int]:
    """Return as many fleets, each of whole replicas, with the same sum, as evenly as possible."""
    total, steps = sum(counts), len(counts)
    return [total * (step + 1) // steps - total * step // steps for step in range(steps)]


def control_arms(schedule: list[int]) -> tuple[Arm, ...]:
    """Return the elastic arm with a fixed schedule of fleets, and with random dispatch."""
    fixed = recipe.ELASTIC.with_overrides(
        "rlhfless/planner=fixed", f"rlhfless.planner.schedule=[{','.join(map(str, schedule))}]"
    )
    random = recipe.ELASTIC.with_overrides("rlhfless/dispatcher=random")
    return replace(fixed, name="fixed"), replace(random, name="random")


def main() -> None:
    """Run the control arms beside a finished column and write their record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of a finished demo with the parked column")
    out: Path = parser.parse_args().out.resolve()
    record: dict[str, Any] = json.loads((out / COLUMN.name / RECORD_FILE).read_text())
    steps = record["arms"]["elastic"]["steps"]
    schedule = mean_schedule([step["num_replicas"] for step in steps])
    seed = record["seed"]
    workload = ablation.prepare(None, out, seed)
    assets = build_assets(out / "assets", list(workload.problems), seed)
    options = DemoOptions(out=out / COLUMN.name, steps=len(steps), seed=seed)
    pace = COLUMN.pace.to_json() if COLUMN.pace else None
    for arm in control_arms(schedule):
        applied = COLUMN.applied_to(arm)
        replayed = replace(applied, overrides=(*ablation.overrides(workload), *applied.overrides))
        ended = run_arm(replayed, assets, options, print, pace)
        if ended.exit_code:
            raise SystemExit(f"{arm.name}: verl ended with exit code {ended.exit_code}; see {ended.folder}/train.log")
        record["arms"][arm.name] = build_arm(ended.folder).as_json()
    summaries = summarise({COLUMN.name: record})
    print(render_columns(summaries))
    objective = {one.arm: one.objective for one in summaries}
    ours = objective["elastic"]
    results = {
        "schedule": schedule,
        "warm_up_steps": WARM_UP,
        "target": TARGET,
        "arms": [asdict(one) for one in summaries],
        "objective_over": {name: ours / objective[name] for name in ("fixed", "random")},
    }
    write_result("control_arms", results, command="python -m benchmarks.control_arms --out OUT", num_gpus=4)


if __name__ == "__main__":
    main()
