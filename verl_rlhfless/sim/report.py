"""The JSON record and the table of a comparison of arms. Every figure here is simulated, and says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from verl_rlhfless.ledger import usd
from verl_rlhfless.sim.bound import step_bound
from verl_rlhfless.sim.cell import Cell
from verl_rlhfless.sim.records import RunRecord

FORMAT = "rlhfless-sim/1"
_MEANS = ("step_s", "gen_s")


def cell_record(cell: Cell, records: Mapping[str, RunRecord], labels: Mapping[str, Any]) -> dict[str, Any]:
    """Return one entry of ``runs``.

    ``objective`` of a step is its weighted time and cost over those of ``stock_sync_best_tp`` in the same step (which
    always runs).

    Args:
        cell: Trace, cluster, model.
        records: By arm; holds ``stock_sync_best_tp``.
        labels: ``trace``, ``cluster``, ``model``, ``seed``.
    """
    reference = records["stock_sync_best_tp"]
    weight = cell.goal.cost_weight
    arms = {}
    for name, record in records.items():
        steps = []
        for step, ref in zip(record.steps, reference.steps, strict=True):
            cost = step.gpu_lease_usd / ref.gpu_lease_usd if ref.gpu_lease_usd else 1.0
            steps.append({**asdict(step), "objective": (1 - weight) * step.step_s / ref.step_s + weight * cost})
        total = {key: value for key, value in asdict(record).items() if key != "steps"}
        total |= {key: float(np.mean([step[key] for step in steps])) for key in (*_MEANS, "objective")}
        total["gpu_lease_usd_per_step"] = float(np.mean([step["gpu_lease_usd"] for step in steps]))
        total |= {key: sum(step[key] for step in steps) for key in ("num_migrations", "prefill_tokens", "tokens")}
        arms[name] = {"steps": steps, "total": total}
    bounds = [step_bound(cell.pool, step) for step in cell.data]
    timely = [step_bound(cell.pool, step, ref.step_s) for step, ref in zip(cell.data, reference.steps, strict=True)]
    bound = {
        "step_s": float(np.mean([b.step_s for b in bounds])),
        "gpu_lease_usd": usd(float(np.mean([b.gpu_s for b in bounds])), cell.cluster.usd_per_gpu_h),
        "notslower_gpu_lease_usd": usd(float(np.mean([b.gpu_s for b in timely])), cell.cluster.usd_per_gpu_h),
    }
    return {**labels, "is_simulated": True, "wake_s": cell.times.wake_s, "arms": arms, "bound": bound}


def table(run: Mapping[str, Any]) -> str:
    """Return one cell as text: means per step, and ratios to both stock arms (time: how many times faster; cost.

    Share).
    """
    head = (
        f"{run['trace']} on {run['cluster']}, {run['model']}, wake {run['wake_s']:g} s, seed {run['seed']}"
        " (simulated; usd is gpu_lease_usd; total_usd holds the initial start)"
    )
    columns = (
        f"{'arm':<20}{'step_s':>9}{'gen_s':>9}{'usd/step':>10}{'total_usd':>11}{'x stock':>9}{'cost/stock':>11}"
        f"{'t/best':>8}{'cost/best':>10}{'objective':>10}"
    )
    stock = run["arms"]["stock_sync"]["total"] if "stock_sync" in run["arms"] else None
    best = run["arms"]["stock_sync_best_tp"]["total"]
    lines = [head, columns]
    for name, arm in run["arms"].items():
        total = arm["total"]
        step_s, cost = total["step_s"], total["gpu_lease_usd_per_step"]
        ratios = (
            "        -          -"
            if stock is None
            else (f"{stock['step_s'] / step_s:>9.2f}{cost / stock['gpu_lease_usd_per_step']:>11.2f}")
        )
        lines.append(
            f"{name:<20}{step_s:>9.1f}{total['gen_s']:>9.1f}{cost:>10.4f}{total['gpu_lease_usd']:>11.3f}{ratios:>20}"
            f"{step_s / best['step_s']:>8.2f}{cost / best['gpu_lease_usd_per_step']:>10.2f}{total['objective']:>10.3f}"
        )
    bound = run["bound"]
    lines.append(f"{'lower bound':<20}{bound['step_s']:>9.1f}{'':>9}{bound['gpu_lease_usd']:>10.4f}")
    timely = bound["notslower_gpu_lease_usd"]
    share = timely / best["gpu_lease_usd_per_step"]
    lines.append(f"{'  at a step <= best':<20}{best['step_s']:>9.1f}{'':>9}{timely:>10.4f}{'':>39}{share:>10.2f}")
    return "\n".join(lines)
