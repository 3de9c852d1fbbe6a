"""The JSON record and the table of a comparison of arms. Every figure here is simulated, and says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from verl_rlhfless.ledger import usd
from verl_rlhfless.policy.plan import Goal
from verl_rlhfless.policy.transitions import RECIPES, LeaseTimes, Recipe
from verl_rlhfless.sim.bound import step_bound
from verl_rlhfless.sim.cell import Cell
from verl_rlhfless.sim.records import RunRecord

FORMAT = "rlhfless-sim/1"
LEGEND = """\
Every figure is simulated; a row holds means over the steps.
usd/step, total_usd     price of the leased GPU-hours; the total is the whole run's, with its initial start
x stock, cost/stock     how many times faster than stock_sync, and the share of its cost
t/best, cost/best       step time and cost over those of stock_sync_best_tp, the best static fleet
objective               (1 - cost weight) * t/best + cost weight * cost/best of each step; less is better
lower bound             no fleet takes less time, none costs less; below, none that is as fast as stock_sync_best_tp"""
_MEANS = ("step_s", "gen_s")


def cell_record(cell: Cell, records: Mapping[str, RunRecord], labels: Mapping[str, Any]) -> dict[str, Any]:
    """Return one entry of ``runs``.

    ``objective`` of a step is its weighted time and cost over those of ``stock_sync_best_tp`` in the same step (which
    always runs).

    Args:
        cell: Trace, cluster, model.
        records: By arm; holds ``stock_sync_best_tp``.
        labels: ``trace``, ``cluster``, ``model``, ``seed``; for a ``table`` also ``recipe``, ``calibration`` and what
            ``settings`` returns.
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


def settings(cell: Cell) -> dict[str, Any]:
    """Return what of a cell may be chosen beside trace, cluster, model and recipe, for its record."""
    return {
        "kv_transfer": cell.cluster.has_kv_transfer,
        "cold_start_s": cell.times.cold_start_s,
        "cost_weight": cell.goal.cost_weight,
        "parked_charge": cell.parked_charge,
    }


def table(run: Mapping[str, Any]) -> str:
    """Return one cell as text: means per step, and ratios to both stock arms (``LEGEND`` explains them)."""
    head = ", ".join([f"{run['trace']} on {run['cluster']}", run["model"], *_unusual(run), f"seed {run['seed']}"])
    columns = (
        f"{'arm':<20}{'step_s':>9}{'gen_s':>9}{'usd/step':>10}{'total_usd':>11}{'x stock':>9}{'cost/stock':>11}"
        f"{'t/best':>8}{'cost/best':>10}{'objective':>10}"
    )
    stock = run["arms"]["stock_sync"]["total"] if "stock_sync" in run["arms"] else None
    best = run["arms"]["stock_sync_best_tp"]["total"]
    lines = [f"{head} (simulated)", columns]
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


def _unusual(run: Mapping[str, Any]) -> list[str]:
    """Return the settings of a run that are not the usual ones."""
    usual = LeaseTimes()
    shown = {
        f"recipe {run['recipe']}": RECIPES[run["recipe"]] != Recipe(),
        "keys and values are transferred": run["kv_transfer"],
        f"calibration {run['calibration']}": run["calibration"] is not None,
        f"wake {run['wake_s']:g} s": run["wake_s"] != usual.wake_s,
        f"cold start {run['cold_start_s']:g} s": run["cold_start_s"] != usual.cold_start_s,
        f"cost weight {run['cost_weight']:g}": run["cost_weight"] != Goal().cost_weight,
        f"parked charge {run['parked_charge']:g}": run["parked_charge"] != 0,
    }
    return [text for text, is_shown in shown.items() if is_shown]
