"""How our arm holds up when its assumptions change: prediction, transitions, moves, all-reduces, prices.

Usage: python -m benchmarks.sensitivity TRACE... --json OUT --plot OUT.png [--cells TRACE:CLUSTER:MODEL,...]
All figures are simulated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import command
from benchmarks.record import file_names, write_simulated
from verl_rlhfless.policy.arm import Arm
from verl_rlhfless.policy.baselines.oracle import Oracle
from verl_rlhfless.policy.ours import Ours
from verl_rlhfless.policy.plan import Goal
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.snapshot import IntArray
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
    "prediction_error_factor": "predicted / true length (`oracle`)",
    "wake_s": "wake [s]",
    "cold_start_s": "cold start [s]",
    "migration_cost_factor": "time of every prefill, factor",
    "allreduce_s": "added latency of an all-reduce [µs]",
    "parked_charge": "share of a GPU's price while parked",
    "cost_weight": "weight of cost",
}
_GRID = [
    ["step prediction_error_factor", "step wake_s", "step cold_start_s", "cost_weight"],
    ["cost prediction_error_factor", "cost wake_s", "cost cold_start_s", "cost_weight"],
    ["step migration_cost_factor", "step allreduce_s", "step parked_charge", "cost_weight"],
    ["cost migration_cost_factor", "cost allreduce_s", "cost parked_charge", "cost_weight"],
]
"""Panels of the picture: below each other step and cost of a sweep, and the weight of cost as a tall one."""

_LEGEND = "Simulated: mean step and cost of `ours` over those of the best static tensor-parallel size"


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

    def tuned(**changed: Any) -> Cell:
        return replace(base, efficiencies=replace(base.efficiencies, **changed))

    def slow_moves(factor: float) -> Cell:
        """Return the cell in which a continuation takes ``factor`` times its prefill, and every prefill with it."""
        return tuned(prefill=base.efficiencies.prefill / factor)

    def slow_links(added_us: float) -> Cell:
        nvlink, pcie = base.efficiencies.allreduce_s
        return tuned(allreduce_s=(nvlink + added_us / 1e6, pcie + added_us / 1e6))

    factors = (0.5, 0.71, 1, 1.41, 2)
    return {
        "prediction_error_factor": sweep(factors, lambda v: (base, Oracle(lengths=scaled(v)))),
        "wake_s": sweep((1, 2, 5, 10, 30), lambda v: (replace(base, times=LeaseTimes(wake_s=v)), Ours())),
        "cold_start_s": sweep((5, 30, 60, 120), lambda v: (replace(base, times=LeaseTimes(cold_start_s=v)), Ours())),
        "migration_cost_factor": sweep((0.5, 1, 2, 4), lambda v: (slow_moves(v), Ours())),
        "allreduce_s": sweep((0, 10, 30, 60), lambda v: (slow_links(v), Ours())),
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
    told = f"python -m benchmarks.sensitivity {file_names(traces)} --json {out.name} --plot {plot.name} --cells {cells}"
    write_simulated(out, {"cells": found}, told, shown=[])
    draw(found, plot)


def draw(cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a picture, one colour a cell: step and cost over the best static arm in every sweep; the weight as a front.

    Args:
        cells: Entries of ``cells`` in the record.
        path: Where to write; the ending chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure = pyplot.figure(figsize=(14, 10), layout="constrained")
    axes = figure.subplot_mosaic(_GRID)
    looks = [{"color": f"C{at}", "marker": "osD^v"[at % 5], "markersize": 5} for at in range(len(cells))]
    for name, title in TITLES.items():
        sweeps = [cell["sweeps"][name] for cell in cells]
        if name == "cost_weight":
            _front(axes[name], sweeps, looks)
        else:
            _lines(axes[f"step {name}"], axes[f"cost {name}"], sweeps, looks)
            axes[f"cost {name}"].set_xlabel(title)
    for kind in ("step ", "cost "):  # one scale for each of the two
        panels = [axis for name, axis in axes.items() if name.startswith(kind)]
        limits = [limit for axis in panels for limit in axis.get_ylim()]
        for axis in panels:
            axis.set_ylim(min(limits), max(limits))
    handles = [
        Line2D([], [], label=f"{cell['trace']}, {cell['cluster']}, {cell['model']}", **look)
        for cell, look in zip(cells, looks, strict=True)
    ]
    handles += [Line2D([], [], color="black", linestyle=":", label="cost with the engines' first start")]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, title=_LEGEND)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def _lines(step: Any, cost: Any, sweeps: Sequence[Sequence[Mapping[str, float]]], looks: Sequence[Any]) -> None:
    """Draw mean step and cost of every cell over the values of one sweep."""
    for rows, look in zip(sweeps, looks, strict=True):
        step.plot([r["t_best"] for r in rows], **look)
        cost.plot([r["cost_best"] for r in rows], **look)
        cost.plot([r["run_cost_best"] for r in rows], ":", color=look["color"])
    for axis, label in ((step, "step / best static"), (cost, "cost / best static")):
        axis.set_xticks(range(len(sweeps[0])), [f"{r['value']:g}" for r in sweeps[0]])
        axis.set_ylabel(label)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.grid(axis="y", linewidth=0.4, alpha=0.6)


def _front(axis: Any, sweeps: Sequence[Sequence[Mapping[str, float]]], looks: Sequence[Any]) -> None:
    """Draw cost over time of every cell, from weight 0 (only time) to 1 (only cost)."""
    for rows, look in zip(sweeps, looks, strict=True):
        axis.plot([r["t_best"] for r in rows], [r["cost_best"] for r in rows], **look)
    axis.set_xscale("log")
    axis.set_xticks([1, 1.5, 2, 3, 4], ["1", "1.5", "2", "3", "4"])
    axis.minorticks_off()
    axis.set_xlabel("step / best static (log scale)")
    axis.set_ylabel("cost / best static")
    weights = ", ".join(f"{r['value']:g}" for r in sweeps[0])
    axis.set_title(f"weight of cost, from above:\n{weights}", fontsize=10)
    axis.grid(linewidth=0.4, alpha=0.6)
    axis.margins(0.12)


if __name__ == "__main__":
    command.run(main, __doc__)
