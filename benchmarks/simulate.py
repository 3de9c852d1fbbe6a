"""Every arm over length traces: means per cell, ratios to both stock arms, the headline over long cells. All simulated.

Usage: python -m benchmarks.simulate TRACE... --json OUT [--wake-s 2] [--arms a,b] [--update]

Traces that nobody tuned for: `rlhfless trace generate` with --mean 1500 --tail 1.2 --icc 0.15 --seed 11;
--mean 2500 --tail 0.8 --icc 0.6 --seed 12; --mean 1200 --tail 1.0 --drift 1.15 --max-response-tokens 16384 --seed 13;
--mean 2000 --tail 1.4 --icc 0.4 --groups 64 --n 16 --max-response-tokens 24576 --seed 14.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks import command
from benchmarks.record import file_names, parts_of, write_simulated
from benchmarks.targets import verdicts
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.transitions import LeaseTimes
from verl_rlhfless.report.environment import code
from verl_rlhfless.sim.cell import ARMS, Cell
from verl_rlhfless.sim.cluster import CLUSTERS
from verl_rlhfless.sim.report import cell_record
from verl_rlhfless.sim.workload import load_steps

LONG_ROLLOUT_S = 30.0


def main(
    traces: list[Path],
    out: Annotated[Path, typer.Option("--json")],
    wake_s: float = 2.0,
    arms: str = ",".join(ARMS),
    clusters: str = "l40s-16,h100-16",
    models: str = "qwen2.5-3b,qwen2.5-7b",
    update: Annotated[bool, typer.Option(help="Keep figures and commit of arms that are not run now.")] = False,
) -> None:
    """Run the cells, one after another."""
    before = json.loads(out.read_text()) if update and out.exists() else {"results": {"cells": []}}
    old = {row["cell"]: row for row in before["results"]["cells"]}
    parts = parts_of(before, [arm for row in old.values() for arm in row["arms"]])
    rows = []
    for path in traces:
        data = load_steps(path)
        for cluster in clusters.split(","):
            for model in models.split(","):
                began = time.process_time()
                cell = Cell(data, CLUSTERS[cluster], MODELS[model], LeaseTimes(wake_s=wake_s))
                names = dict.fromkeys(["stock_sync", "stock_sync_best_tp", *arms.split(",")])
                records = {name: cell.run(cell.arm(name)) for name in names}
                parts |= dict.fromkeys(names, code())
                label = f"{path.name.split('.')[0]} {cluster} {model}"
                run = cell_record(cell, records, {"trace": path.name, "cluster": cluster, "model": model, "seed": 0})
                row = _row(label, run, old.get(label))
                row["cpu_s"] = round(time.process_time() - began, 1)
                rows.append(row)
                print(
                    label, {name: (arm["x_stock"], arm["cost_stock"]) for name, arm in row["arms"].items()}, flush=True
                )
    told = (
        f"python -m benchmarks.simulate {file_names(traces)} --wake-s {wake_s:g} --arms {arms} --clusters {clusters} "
    )
    told += f"--models {models} --json {out.name}{' --update' if update else ''}"
    results = {"wake_s": wake_s, "headline": _headline(rows), "targets": verdicts(rows), "cells": rows}
    made = {name: parts[name] for row in rows for name in row["arms"]}
    write_simulated(out, results, told, shown=["headline", "targets"], parts=made)


def _row(label: str, run: dict, old: dict | None) -> dict:  # type: ignore[type-arg]
    stock, best = (run["arms"][name]["total"] for name in ("stock_sync", "stock_sync_best_tp"))
    arms = dict(old["arms"]) if old else {}
    for name, arm in run["arms"].items():
        total = arm["total"]
        cost = total["gpu_lease_usd_per_step"]
        arms[name] = {
            "step_s": round(total["step_s"], 2),
            "gen_s": round(total["gen_s"], 2),
            "usd_per_step": round(cost, 5),
            "run_usd": round(total["gpu_lease_usd"], 4),
            "x_stock": round(stock["step_s"] / total["step_s"], 3),
            "cost_stock": round(cost / stock["gpu_lease_usd_per_step"], 3),
            "run_cost_stock": round(total["gpu_lease_usd"] / stock["gpu_lease_usd"], 3),
            "t_best": round(total["step_s"] / best["step_s"], 3),
            "cost_best": round(cost / best["gpu_lease_usd_per_step"], 3),
            "objective": round(total["objective"], 4),
        }
    if old and any(arms[name] != old["arms"][name] for name in ("stock_sync", "stock_sync_best_tp")):
        raise SystemExit(f"{label}: stock's arms are no longer what the kept arms are held against; leave out --update")
    bound = run["bound"]
    return {
        "cell": label,
        "is_long": stock["gen_s"] >= LONG_ROLLOUT_S,
        "arms": arms,
        "bound": {
            "step_s": round(bound["step_s"], 2),
            "usd_per_step": round(bound["gpu_lease_usd"], 5),
            "cost_best": round(bound["gpu_lease_usd"] / best["gpu_lease_usd_per_step"], 3),
            "notslower_cost_best": round(bound["notslower_gpu_lease_usd"] / best["gpu_lease_usd_per_step"], 3),
        },
    }


def _headline(rows: list[dict]) -> dict:  # type: ignore[type-arg]
    """Return means over long and over other cells, for every arm that ran in all of them."""
    found = {}
    for kind, chosen in (("long", [r for r in rows if r["is_long"]]), ("other", [r for r in rows if not r["is_long"]])):
        names = [name for name in ARMS if chosen and all(name in row["arms"] for row in chosen)]
        keys = ("x_stock", "cost_stock", "run_cost_stock", "t_best", "cost_best", "objective")
        found[kind] = {"cells": len(chosen)} | {
            name: {key: round(float(np.mean([row["arms"][name][key] for row in chosen])), 3) for key in keys}
            for name in names
        }
    return found


if __name__ == "__main__":
    command.run(main, __doc__)
