"""How our arm holds up when its assumptions change: wake, cold start, migration, prediction, weight, parked GPUs.

Usage: python benchmarks/sensitivity.py TRACE --json OUT --plot OUT.png [--cluster NAME] [--model NAME]. All simulated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from verl_rlhfless.policy.arm import Arm
from verl_rlhfless.policy.baselines.oracle import Oracle
from verl_rlhfless.policy.ours import Ours
from verl_rlhfless.policy.plan import Goal
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.snapshot import PoolSnapshot
from verl_rlhfless.policy.transitions import LeaseTimes
from verl_rlhfless.sim.cell import Cell, load_steps
from verl_rlhfless.sim.cluster import CLUSTERS


@dataclass(frozen=True)
class SlowMoves(Cell):
    """A cell in which a continuation takes ``factor`` times the prefill (and every prefill with it)."""

    factor: float = 1.0

    @property
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
    found = [{"value": value} | row(*make(value)) for value in values]
    print(found, flush=True)
    return found


def main(
    trace: Path,
    out: Annotated[Path, typer.Option("--json")],
    plot: Annotated[Path, typer.Option()],
    cluster: str = "l40s-16",
    model: str = "qwen2.5-7b",
) -> None:
    """Run every sweep and draw it."""
    data = load_steps(trace)
    base = Cell(data, CLUSTERS[cluster], MODELS[model], LeaseTimes())

    def scaled(factor: float) -> dict[int, np.ndarray]:  # type: ignore[type-arg]
        return {step.batch.step: np.maximum(1, (step.lengths * factor).astype(np.int64)) for step in data}

    found: dict[str, Any] = {
        "wake_s": sweep((1, 2, 5, 10, 30), lambda v: (replace(base, times=LeaseTimes(wake_s=v)), Ours())),
        "cold_start_s": sweep((5, 30, 60, 120), lambda v: (replace(base, times=LeaseTimes(cold_start_s=v)), Ours())),
        "migration_cost_factor": sweep(
            (0.5, 1, 2, 4), lambda v: (SlowMoves(data, base.cluster, base.shape, base.times, factor=v), Ours())
        ),
        "prediction_error_factor": sweep((0.5, 0.71, 1, 1.41, 2), lambda v: (base, Oracle(lengths=scaled(v)))),
        "cost_weight": sweep((0.0, 0.25, 0.5, 0.75, 1.0), lambda v: (base, Ours(Goal(cost_weight=v)))),
        "parked_charge": sweep((0.0, 0.1, 1.0), lambda v: (replace(base, parked_charge=v), Ours())),
    }
    record = {"simulated": True, "trace": trace.name, "cluster": cluster, "model": model, "sweeps": found}
    out.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, plot)


def draw(record: dict[str, Any], path: Path) -> None:
    """Write one panel a sweep: time and cost over the best static arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.5))
    for axis, (name, rows) in zip(axes.flat, record["sweeps"].items(), strict=True):
        x = [r["value"] for r in rows]
        axis.plot(x, [r["t_best"] for r in rows], "o-", label="step / best static")
        axis.plot(x, [r["cost_best"] for r in rows], "s-", label="cost / best static")
        axis.plot(x, [r["run_cost_best"] for r in rows], "^--", label="cost of the run, start included")
        axis.axhline(1.0, color="grey", linewidth=0.7)
        axis.set_xlabel(name)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.suptitle(f"ours, {record['trace']}, {record['cluster']}, {record['model']} (simulated)")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
