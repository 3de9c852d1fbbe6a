"""What the planner's choice of tensor-parallel sizes saves: every legal size against each of them alone. Simulated.

Runs `ours` on the cells whose `stock_sync` rollout takes 30 s or more; figures are means over a cell's steps, over
those of `stock_sync_best_tp`.

Usage: python -m benchmarks.sizes TRACE... --json OUT
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import command
from benchmarks.record import file_names, write_simulated
from benchmarks.simulate import LONG_ROLLOUT_S
from verl_rlhfless.policy.ours import Ours
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.transitions import LeaseTimes
from verl_rlhfless.sim.cell import Cell
from verl_rlhfless.sim.cluster import CLUSTERS
from verl_rlhfless.sim.records import RunRecord
from verl_rlhfless.sim.run import ArmRun
from verl_rlhfless.sim.workload import load_steps


def alone(cell: Cell, tp: int) -> RunRecord:
    """Return the record of `ours` where replicas of one size are the only ones."""
    pool = replace(cell.pool, perf={tp: cell.pool.perf[tp]})
    return ArmRun(Ours(), cell.cluster, pool, cell.data).run()


def over(run: RunRecord, best: RunRecord) -> dict[str, float]:
    """Return step time, cost and their mean, relative to the best static run's."""
    step, cost = (
        float(np.mean([getattr(s, key) for s in run.steps]) / np.mean([getattr(s, key) for s in best.steps]))
        for key in ("step_s", "gpu_lease_usd")
    )
    return {"step": round(step, 3), "cost": round(cost, 3), "objective": round((step + cost) / 2, 4)}


def compare(cell: Cell) -> dict[str, Any] | None:
    """Return the figures of one cell by sizes; ``None`` where rollouts are short."""
    if np.mean([s.gen_s for s in cell.run(cell.arm("stock_sync")).steps]) < LONG_ROLLOUT_S:
        return None
    best = cell.run(cell.arm("stock_sync_best_tp"))
    sizes = {tp: over(alone(cell, tp), best) for tp in cell.pool.perf}
    return {"best_static_tp": cell.best_tp, "every": over(cell.run(Ours()), best), "alone": sizes}


def main(
    traces: list[Path], out: Annotated[Path, typer.Option("--json")], wake_s: Annotated[float, typer.Option()] = 2.0
) -> None:
    """Run 3b and 7b on 16 L40S and 16 H100."""
    rows = []
    for path in traces:
        steps = load_steps(path)
        for cluster in ("l40s-16", "h100-16"):
            for model in ("qwen2.5-3b", "qwen2.5-7b"):
                row = compare(Cell(steps, CLUSTERS[cluster], MODELS[model], LeaseTimes(wake_s=wake_s)))
                if row is not None:
                    rows.append({"trace": path.name.split(".")[0], "cluster": cluster, "model": model} | row)
                    print(rows[-1], flush=True)
    objectives = [[each["objective"] for each in row["alone"].values()] for row in rows]
    means = {
        "every size": np.mean([row["every"]["objective"] for row in rows]),
        "the best one, known beforehand": np.mean([min(each) for each in objectives]),
        "the best static one": np.mean([row["alone"][row["best_static_tp"]]["objective"] for row in rows]),
        "the smallest": np.mean([each[0] for each in objectives]),
    }
    means = {sizes: round(float(mean), 3) for sizes, mean in means.items()}
    told = f"python -m benchmarks.sizes {file_names(traces)} --wake-s {wake_s:g} --json {out.name}"
    write_simulated(out, {"wake_s": wake_s, "means": means, "cells": rows}, told, shown=["means"])


if __name__ == "__main__":
    command.run(main, __doc__)
