"""How near our `rlhfless_paper` arm comes to its authors' figures, under their accounting and under ours. Simulated.

The authors (arXiv 2602.22718) report at best 1.35x and -44.8 % on 16 L40S with responses of at most 2,048 tokens, and
1.23x and -38.7 % as a mean of simulations. Their cost is GPUs x execution seconds: starts, wakes and weight loads are
not in it. Here every trace is clipped to 2,048 tokens and run twice: starts for nothing, and starts as they are.

Usage: python -m benchmarks.paper_figures TRACE... --json OUT
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks import command
from benchmarks.record import file_names, write_simulated
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.transitions import LeaseTimes
from verl_rlhfless.sim.cell import Cell
from verl_rlhfless.sim.cluster import CLUSTERS
from verl_rlhfless.sim.workload import load_steps

MAX_RESPONSE_TOKENS = 2048
FREE_STARTS = LeaseTimes(grant_s=0.0, wake_s=0.0, cold_start_s=0.0, park_s=0.0, resume_s=0.0, publish_bytes_per_s=1e15)
ACCOUNTINGS = {"starts for nothing": FREE_STARTS, "starts as they are": LeaseTimes()}
ARMS = ("rlhfless_paper", "ours")


def main(traces: list[Path], out: Annotated[Path, typer.Option("--json")]) -> None:
    """Run 3b and 7b on 16 L40S, as the authors did."""
    rows = []
    for path in traces:
        steps = [
            replace(
                step,
                batch=replace(step.batch, max_response_tokens=MAX_RESPONSE_TOKENS),
                lengths=np.minimum(step.lengths, MAX_RESPONSE_TOKENS),
            )
            for step in load_steps(path)
        ]
        for model in ("qwen2.5-3b", "qwen2.5-7b"):
            for accounting, times in ACCOUNTINGS.items():
                cell = Cell(steps, CLUSTERS["l40s-16"], MODELS[model], times)
                records = {name: cell.run(cell.arm(name)) for name in ("stock_sync", *ARMS)}
                step_s = {name: np.mean([s.step_s for s in record.steps]) for name, record in records.items()}
                usd = {name: np.mean([s.gpu_lease_usd for s in record.steps]) for name, record in records.items()}
                row = {"trace": path.name.split(".")[0], "model": model, "accounting": accounting}
                row |= {
                    name: {
                        "speed_up": round(float(step_s["stock_sync"] / step_s[name]), 3),
                        "cost": round(float(usd[name] / usd["stock_sync"]), 3),
                    }
                    for name in ARMS
                }
                rows.append(row)
                print(row, flush=True)
    means = {
        accounting: {
            name: {
                key: round(float(np.mean([r[name][key] for r in rows if r["accounting"] == accounting])), 3)
                for key in ("speed_up", "cost")
            }
            for name in ARMS
        }
        for accounting in ACCOUNTINGS
    }
    authors = {"best": {"speed_up": 1.35, "cost": 0.552}, "simulated_mean": {"speed_up": 1.23, "cost": 0.613}}
    told = f"python -m benchmarks.paper_figures {file_names(traces)} --json {out.name}"
    write_simulated(out, {"authors": authors, "means": means, "cells": rows}, told, shown=["means"])


if __name__ == "__main__":
    command.run(main, __doc__)
