"""Seconds and memory of the simulator on one core against their budgets, and how they grow with the batch.

python -m benchmarks.scaling          # about 3 minutes; writes benchmarks/results/scaling.json
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from benchmarks import command
from benchmarks.policy import step
from benchmarks.record import write_result
from verl_rlhfless.policy.ours import Ours
from verl_rlhfless.policy.shapes import MODELS
from verl_rlhfless.policy.transitions import LeaseTimes
from verl_rlhfless.sim.cell import Cell
from verl_rlhfless.sim.cluster import CLUSTERS

BUDGET_GIB = 2
SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_REPEATS = 9


def simulated(groups: int, n: int, cluster: str, repeats: int = _REPEATS) -> dict[str, float]:
    """A step of our arm, planning and looks included, as the mean of two in one run: the median of some repeats."""
    first, second = step(groups, n), step(groups, n, 1)
    data = (first, replace(second, batch=replace(second.batch, step=2)))
    cell = Cell(data, CLUSTERS[cluster], MODELS["qwen2.5-7b"], LeaseTimes())
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        record = cell.run(Ours())
        taken.append((time.process_time() - began) / len(data))
    return {
        "groups": groups,
        "samples": groups * n,
        "repeats": repeats,
        "s_per_step": round(statistics.median(taken), 3),
        "worst_s_per_step": round(max(taken), 3),
        "us_per_sample": round(1e6 * statistics.median(taken) / (groups * n), 1),
        "num_preemptions": record.steps[1].num_preemptions,
        "simulated_step_s": round(record.steps[1].step_s, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),  # of this and smaller sizes
    }


def judged(point: Mapping[str, float], budget_s: float) -> dict[str, float]:
    """Return a size with its budgets, and whether its median and its peak are within them."""
    is_met = point["s_per_step"] <= budget_s and point["peak_gib"] <= BUDGET_GIB
    return {**point, "budget_s": budget_s, "budget_gib": BUDGET_GIB, "is_met": is_met}


def exponent(curve: list[dict[str, float]]) -> float:
    """Return ``a`` of the power law ``seconds ~ samples ** a`` that fits the curve."""
    x, y = (np.log([point[key] for point in curve]) for key in ("samples", "s_per_step"))
    return round(float(np.polyfit(x, y, 1)[0]), 2)


def main() -> None:
    """Measure CPU seconds of one process; the smallest first, so that the peak memory of each size is known."""
    load = os.getloadavg()[0]
    small = simulated(128, 8, "h100-16")
    curve = []
    for groups in SIZES:
        curve.append(simulated(groups, 16, "h100-160", _REPEATS if groups <= 1024 else 1))
        print(curve[-1], flush=True)
    large = next(point for point in curve if point["groups"] == 1024)
    found = {
        "load_average_before": load,
        "simulate_128x8_on_16": judged(small, budget_s=0.1),
        "simulate_1024x16_on_160": judged(large, budget_s=3.0),
        "growth_16_on_160": curve,
        "growth_exponent": exponent(curve),
    }
    write_result("scaling", found, command="python -m benchmarks.scaling")


if __name__ == "__main__":
    command.run(main, __doc__)
