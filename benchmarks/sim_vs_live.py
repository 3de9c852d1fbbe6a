"""How well the simulator foretells live runs: calibrated on one paced run, held against another, and the other way.

A run is the folder of a finished comparison of ``stock`` and ``elastic`` with paced engines that park and a trainer
that leaves: ``OUT/parked`` of ``rlhfless demo --out OUT --columns parked``. A run does not record the device that it
was paced to; unless it is given, that is the demo's.

python -m benchmarks.sim_vs_live RUN_A RUN_B [--pace JSON [--pace JSON]] [--plot OUT.png]

Writes benchmarks/results/sim_vs_live.json. The simulated policies are the live ones; lengths are those of the run that
is predicted, everything else that it took comes from the other run.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.live_arm import LiveArm
from benchmarks.live_costs import Costs, calibrate, calibrated, known_costs
from benchmarks.live_run import ARMS, LiveRun, LiveStep
from benchmarks.record import write_result
from verl_rlhfless.demo.columns import PACE, WARM_UP
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.policy.arm import Arm
from verl_rlhfless.policy.baselines.stock import StockSync
from verl_rlhfless.policy.learnt import CostModel
from verl_rlhfless.policy.snapshot import PoolSnapshot
from verl_rlhfless.report.environment import code
from verl_rlhfless.sim.cluster import Cluster
from verl_rlhfless.sim.records import StepRecord
from verl_rlhfless.sim.run import ArmRun
from verl_rlhfless.sim.workload import StepData

FIGURES = {"step_s": "seconds of a step", "gpu_s": "leased GPU-seconds of a step"}
MAX_ERROR = 0.15
"""Median relative error of a figure over a run's steps that is promised at most."""
MAX_RATIO_POINTS = 5.0
"""Error of elastic over stock in points, the ratio of the medians over a run's steps, that is promised at most."""
POLL_S = 2.0
"""Stock's trainer looks for finished samples this often: ``poll_interval`` in verl's ppo/v1/replay_buffer.py."""
NOT_MODELLED = (
    "the host: what an iteration or a trainer phase overran its declared time, beyond a fixed part of each phase",
    "the spread of wakes, grants and returns: each takes the calibration run's median",
    "the order in which requests reach stock's balancer: the simulator deals them out in batch order",
    "progress that policies see up to half a second late, and what the router itself takes",
    "what a live planner still counts with of the first step's imports: the simulated one knows the medians",
    "prompt tokens that samples of different prompts share, and vLLM's own block size",
    "first steps, and steps in which an engine started cold: they do not count",
)


def predict(run: LiveRun, costs: Costs) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the simulated steps of both arms of a run, by arm and step."""
    stage = Stage.of(run, costs, run.data)
    return {
        "stock": stage.steps(StockSync(run.settings.tp)),
        "elastic": stage.steps(LiveArm(run.settings, stage.known)),
    }


@dataclass(frozen=True)
class Stage:
    """What arms are simulated on: leases, engines and phases that take what a run took, and lengths.

    Attributes:
        pool: What may be leased.
        data: Prompts and lengths by step.
        known: What a live planner has learnt of the pool after some steps.
    """

    pool: PoolSnapshot
    data: Sequence[StepData]
    known: CostModel

    @classmethod
    def of(cls, run: LiveRun, costs: Costs, data: Sequence[StepData]) -> Stage:
        """Return a run's device with what some run took, ``costs``."""
        declared = run.settings.planning_pool()
        pool = calibrated(declared, run.pace, costs)
        return cls(pool, data, known_costs(declared, pool, data[0]))

    def steps(self, arm: Arm) -> dict[int, dict[str, Any]]:
        """Return what each step of an arm takes, by its number."""
        pool = self.pool
        cluster = Cluster("declared", pool.trainer.gpu, pool.num_gpus // pool.gpus_per_node, pool.gpus_per_node, 0.0)
        record = ArmRun(arm, cluster, pool, self.data).run()
        return {step.step: _predicted(step, pool.trainer.num_gpus, arm.name) for step in record.steps}


def _predicted(step: StepRecord, num_gpus: int, arm: str) -> dict[str, Any]:
    polled_s = -step.gen_s % POLL_S if arm == StockSync.name else 0.0
    gpu_s = step.gpu_s_allocated + polled_s * num_gpus
    return {"step_s": step.step_s + polled_s, "gpu_s": gpu_s, "fleet": step.fleet}


def compare(
    predicted: Mapping[str, Mapping[int, Mapping[str, Any]]], measured: Mapping[str, Mapping[int, LiveStep]]
) -> dict[str, Any]:
    """Return every step of both arms, predicted and measured, their errors, and whether the limits hold.

    Args:
        predicted: By arm and step, as ``predict`` returns them.
        measured: By arm and step; other steps are left out.
    """
    arms: dict[str, Any] = {}
    for arm in ARMS:
        rows = [
            {"step": n, "fleet": predicted[arm][n]["fleet"], "measured_replicas": len(live.stays) or None}
            | {name: _pair(predicted[arm][n][name], getattr(live, name)) for name in FIGURES}
            for n, live in measured[arm].items()
        ]
        errors = {name: median(abs(row[name]["error"]) for row in rows) for name in FIGURES}
        arms[arm] = {"steps": rows, "median_error": errors}
    ratios = {name: _ratio(arms, name) for name in FIGURES}
    is_within = all(error <= MAX_ERROR for arm in arms.values() for error in arm["median_error"].values())
    return {
        "arms": arms,
        "elastic_over_stock": ratios,
        "is_median_error_met": is_within,
        "is_ratio_met": all(abs(ratio["error_points"]) <= MAX_RATIO_POINTS for ratio in ratios.values()),
    }


def _pair(predicted: float, measured: float) -> dict[str, float]:
    return {"predicted": predicted, "measured": measured, "error": predicted / measured - 1}


def _ratio(arms: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return elastic over stock, of the medians over the steps as the demo's table has it."""

    def over(which: str) -> float:
        stock, elastic = (median(row[name][which] for row in arms[arm]["steps"]) for arm in ARMS)
        return float(elastic / stock)

    predicted, measured = over("predicted"), over("measured")
    return {"predicted": predicted, "measured": measured, "error_points": 100 * (predicted - measured)}


def draw(predictions: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write predicted over measured, one panel a figure: every counted step of both arms in every direction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(FIGURES), figsize=(10, 5))
    for axis, (name, title) in zip(axes, FIGURES.items(), strict=True):
        shown = []
        for colour, one in enumerate(predictions):
            for arm, marker in zip(ARMS, "so", strict=True):
                pairs = [(row[name]["measured"], row[name]["predicted"]) for row in one["arms"][arm]["steps"]]
                label = f"{arm}, {one['calibrated_on']} foretells {one['predicted']}"
                axis.plot(*zip(*pairs, strict=True), marker, color=f"C{colour}", label=label, alpha=0.75)
                shown += [value for pair in pairs for value in pair]
        ends = [0.9 * min(shown), 1.1 * max(shown)]
        axis.plot(ends, ends, color="black", linewidth=0.8)
        low, high = ([(1 + sign * MAX_ERROR) * end for end in ends] for sign in (-1, 1))
        axis.fill_between(ends, low, high, color="grey", alpha=0.15, label=f"within {MAX_ERROR:.0%}")
        axis.set(xlabel=f"measured {title}", ylabel=f"simulated {title}", xlim=ends, ylim=ends, aspect="equal")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def told(one: Mapping[str, Any]) -> str:
    """Return a direction's figures as text."""
    lines = [f"calibrated on {one['calibrated_on']}, predicts {one['predicted']}:"]
    for arm, found in one["arms"].items():
        for row in found["steps"]:
            cells = [
                f"{name} {row[name]['predicted']:6.1f} / {row[name]['measured']:6.1f} {row[name]['error']:+5.0%}"
                for name in FIGURES
            ]
            lines.append(f"  {arm:<8} step {row['step']}  " + "   ".join(cells))
        lines.append(f"  {arm:<8} median  " + ", ".join(f"{n} {e:.1%}" for n, e in found["median_error"].items()))
    for name, ratio in one["elastic_over_stock"].items():
        pair = f"{ratio['predicted']:.3f} / {ratio['measured']:.3f}"
        lines.append(f"  elastic over stock, {name}: {pair}, {ratio['error_points']:+.1f} points")
    met = {True: "met", False: "missed"}
    limits = (
        f"{MAX_ERROR:.0%} {met[one['is_median_error_met']]}, {MAX_RATIO_POINTS:g} points {met[one['is_ratio_met']]}"
    )
    return "\n".join([*lines, f"  {limits}"])


def main() -> None:
    """Predict each run from each other one and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument(
        "--pace", action="append", default=[], help="JSON or its file: of the first RUN, the second, .."
    )
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if len(options.runs) < 2 or len(options.pace) > len(options.runs):
        parser.error("give two runs or more, and at most as many --pace")
    paces = [PaceModel.parse(text) for text in options.pace] + [PACE] * len(options.runs)
    runs = {chr(ord("A") + i): LiveRun(folder, paces[i]) for i, folder in enumerate(options.runs)}
    costs = {name: calibrate(run) for name, run in runs.items()}
    for name, run in runs.items():
        void = ", void: the host was busier than the demo allows" if run.is_void else ""
        print(f"run {name}: counts steps {run.counted}; left out: the first {WARM_UP}, cold starts {run.cold}{void}")
    predictions = []
    for source, name in ((a, b) for a in runs for b in runs if a != b):
        run = runs[name]
        measured = {arm: {n: run.arms[arm][n] for n in run.counted} for arm in ARMS}
        found = compare(predict(run, costs[source]), measured)
        predictions.append({"calibrated_on": source, "predicted": name, **found})
        print(told(predictions[-1]))
    if options.plot:
        draw(predictions, options.plot)
    results = {
        "limits": {"median_error": MAX_ERROR, "ratio_points": MAX_RATIO_POINTS},
        "runs": {
            name: {
                "trace": run.trace,
                "pace": asdict(run.pace),
                "counted_steps": run.counted,
                "left_out": {"warm_up": WARM_UP, "cold_starts": run.cold},
                "is_void": run.is_void,
                "costs": asdict(costs[name]),
            }
            for name, run in runs.items()
        },
        "predictions": predictions,
        "not_modelled": NOT_MODELLED,
    }
    paces_told = "".join(f" --pace '{text}'" for text in options.pace)
    plot_told = f" --plot {options.plot.name}" if options.plot else ""
    command = f"python -m benchmarks.sim_vs_live {' '.join(f'RUN_{name}' for name in runs)}{paces_told}{plot_told}"
    parts = {"simulation": code()} | {f"run {name}": run.code for name, run in runs.items()}
    write_result("sim_vs_live", results, command=command, kind="measured and simulated", num_gpus=4, parts=parts)


if __name__ == "__main__":
    main()
