"""How our arm holds up when its assumptions change: prediction, wake, cold start, moves, weight, parked GPUs.

Usage: python -m benchmarks.sensitivity TRACE... --json OUT --plot OUT.png [--cells TRACE:CLUSTER:MODEL,...]
All figures are simulated.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import command
from verl_rlhfless.policy.arm import Arm
from verl_rlhfless.policy.baselines.oracle import Oracle
from verl_rlhfless.policy.ours import Ours
from verl_rlhfless.policy.plan import Goal
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.snapshot import IntArray, PoolSnapshot
from verl_rlhfless.policy.transitions import LeaseTimes
from verl_rlhfless.sim.cell import Cell
from verl_rlhfless.sim.cluster import CLUSTERS
from verl_rlhfless.sim.workload import load_steps

CELLS = (
    "longcot-32k-n8:h100-16:qwen2.5-7b",
    "longcot-32k-n8:l40s-16:qwen2.5-3b",
    "verl-drift-8k-n16:l40s-16:qwen2.5-7b",
    "rl-math-3b-n16:h100-16:qwen2.5-3b",
    "gsm8k-n4:h100-16:qwen2.5-7b",
)
"""Three cells with long rollouts, one of them on H100, and two with short ones."""

TITLES = {
    "prediction_error_factor": "predicted / true length",
    "wake_s": "wake [s]",
    "cold_start_s": "cold start [s]",
    "migration_cost_factor": "cost of a move, factor",
    "cost_weight": "weight of cost",
    "parked_charge": "parked GPU charged, share",
}
LINES = (("t_best", "o-", "step"), ("cost_best", "s-", "cost of steps"), ("run_cost_best", "^--", "cost with start"))


@dataclass(frozen=True)
class SlowMoves(Cell):
    """A cell in which a continuation takes ``factor`` times the prefill (and every prefill with it)."""

    factor: float = 1.0

    @cached_property
    def pool(self) -> PoolSnapshot:  # type: ignore[override]
        """Engines whose prefill efficiency is divided by the factor."""
        pool = super().pool
        slow = {
            tp: replace(perf, efficiencies=replace(perf.efficiencies, prefill=perf.efficiencies.prefill / self.factor))
            for tp, perf in pool.perf.items()
        }
        return replace(pool, perf=slow)


def row(cell: Cell, arm: Arm) -> dict[str, float]:
    """Return mean step and cost over those of the best static arm in the same cell."""
    ours, best = cell.run(arm), cell.run(cell.arm("stock_sync_best_tp"))
    t, c = (
        [float(np.mean([getattr(step, key) for step in record.steps])) for record in (ours, best)]
        for key in ("step_s", "gpu_lease_usd")
    )
    resident = float(np.mean(["resident" in step.fleet for step in ours.steps]))
    whole = round(ours.gpu_lease_usd / best.gpu_lease_usd, 3)  # initial start included
    means = {"t_best": round(t[0] / t[1], 3), "cost_best": round(c[0] / c[1], 3)}
    return means | {"run_cost_best": whole, "resident_share": round(resident, 2)}


def sweep(values: Sequence[float], make: Callable[[float], tuple[Cell, Arm]]) -> list[dict[str, float]]:
    """Return one row per value."""
    return [{"value": value} | row(*make(value)) for value in values]


def sweeps(base: Cell) -> dict[str, list[dict[str, float]]]:
    """Return every sweep of one cell."""

    def scaled(factor: float) -> Mapping[int, IntArray]:
        return {step.batch.step: np.maximum(1, (step.lengths * factor).astype(np.int64)) for step in base.data}

    def slow(factor: float) -> SlowMoves:
        return SlowMoves(base.data, base.cluster, base.shape, base.times, factor=factor)

    factors = (0.5, 0.71, 1, 1.41, 2)
    return {
        "prediction_error_factor": sweep(factors, lambda v: (base, Oracle(lengths=scaled(v)))),
        "wake_s": sweep((1, 2, 5, 10, 30), lambda v: (replace(base, times=LeaseTimes(wake_s=v)), Ours())),
        "cold_start_s": sweep((5, 30, 60, 120), lambda v: (replace(base, times=LeaseTimes(cold_start_s=v)), Ours())),
        "migration_cost_factor": sweep((0.5, 1, 2, 4), lambda v: (slow(v), Ours())),
        "cost_weight": sweep((0.0, 0.25, 0.5, 0.75, 1.0), lambda v: (base, Ours(Goal(cost_weight=v)))),
        "parked_charge": sweep((0.0, 0.1, 1.0), lambda v: (replace(base, parked_charge=v), Ours())),
    }


def main(
    traces: list[Path],
    out: Annotated[Path, typer.Option("--json")],
    plot: Annotated[Path, typer.Option()],
    cells: str = ",".join(CELLS),
) -> None:
    """Run every sweep of every cell and draw them."""
    files = {path.name.split(".")[0]: path for path in traces}
    found = []
    for cell in cells.split(","):
        trace, cluster, model = cell.split(":")
        base = Cell(load_steps(files[trace]), CLUSTERS[cluster], MODELS[model], LeaseTimes())
        found.append({"trace": trace, "cluster": cluster, "model": model, "sweeps": sweeps(base)})
        print(json.dumps(found[-1]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    record = {"simulated": True, "seed": 0, "commit": commit, "cells": found}
    out.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, plot)


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Write one row a cell and one panel a sweep: time and cost over the best static arm; the weight as a front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = record["cells"]
    figure, axes = pyplot.subplots(len(cells), len(TITLES), figsize=(2.6 * len(TITLES), 2.4 * len(cells) + 0.6))
    for line, cell in zip(axes, cells, strict=True):
        shown = [
            r[key] for name, rows in cell["sweeps"].items() if name != "cost_weight" for r in rows for key, *_ in LINES
        ]
        for axis, (name, title) in zip(line, TITLES.items(), strict=True):
            rows = cell["sweeps"][name]
            if name == "cost_weight":
                _front(axis, rows)
            else:
                for key, style, label in LINES:
                    axis.plot(range(len(rows)), [r[key] for r in rows], style, markersize=4, label=label)
                axis.set_xticks(range(len(rows)), [f"{r['value']:g}" for r in rows])
                axis.set_xlabel(title, fontsize=8)
                axis.set_ylim(min(0.7, *shown) - 0.05, max(1.1, *shown) + 0.05)
                axis.axhline(1.0, color="grey", linewidth=0.7)
            axis.tick_params(labelsize=7)
        line[0].set_ylabel(f"{cell['trace']}\n{cell['cluster']}, {cell['model']}", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, [f"{label} / best static" for label in labels], loc="upper center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / figure.get_figheight()))
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def _front(axis: Any, rows: Sequence[Mapping[str, float]]) -> None:
    """Draw cost over time from weight 0 (only time) to 1 (only cost)."""
    axis.plot([r["t_best"] for r in rows], [r["cost_best"] for r in rows], "s-", color="black", markersize=4)
    for end, offset in ((rows[0], (4, 4)), (rows[-1], (4, -9))):
        at = (end["t_best"], end["cost_best"])
        axis.annotate(f"w={end['value']:g}", at, xytext=offset, textcoords="offset points", fontsize=7)
    axis.set_xlabel("step / best static", fontsize=8)
    axis.set_ylabel("cost of steps / best static", fontsize=7)
    axis.margins(0.25)


if __name__ == "__main__":
    command.run(main, __doc__)
