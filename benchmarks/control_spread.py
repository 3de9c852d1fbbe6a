"""What the planner and the dispatcher add over many workloads: the control arms, simulated on what a paced run took.

A paced run is one draw of lengths, and the next one differs by several percent. Here the demo's workload is drawn many
times, while leases, engines and trainer phases take what they took in OUT (``OUT/parked`` of ``rlhfless demo --out OUT
--columns parked``). ``fixed`` has the elastic arm's mean fleet, ``random`` its dispatcher. ``prompts`` knows every
prompt's true lengths, but not which sample is long: no predictor can know more before a rollout. ``oracle`` knows all.

python -m benchmarks.control_spread OUT/parked [--workloads 30]  # writes benchmarks/results/control_spread.json
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from benchmarks.control_arms import mean_schedule
from benchmarks.live_arm import LiveArm, Memory
from benchmarks.live_costs import calibrate
from benchmarks.live_run import LiveRun
from benchmarks.record import write_result
from benchmarks.sim_vs_live import Stage
from verl_rlhfless.demo import ablation
from verl_rlhfless.demo.columns import PACE, WARM_UP
from verl_rlhfless.live.routing_settings import RoutingSettings
from verl_rlhfless.policy.arm import Policy
from verl_rlhfless.policy.baselines.oracle import exact_prompts
from verl_rlhfless.policy.baselines.stock import StockSync
from verl_rlhfless.policy.predict import LengthModel
from verl_rlhfless.policy.prediction import Prediction, exact
from verl_rlhfless.policy.routing import Routing
from verl_rlhfless.policy.snapshot import Batch, PoolSnapshot, RolloutPlan
from verl_rlhfless.report.environment import code
from verl_rlhfless.sim.workload import StepData, load_steps

STEPS = 7
FIGURES = ("step", "gpu_s", "objective")


@dataclass(frozen=True)
class _ToldRouting(Routing):
    told: Prediction | None = None

    def predict(self, memory: LengthModel, batch: Batch) -> Prediction:
        """Return what the arm is told."""
        assert self.told is not None
        return self.told


@dataclass(frozen=True)
class ToldArm(LiveArm):
    """The elastic arm with predictions that look them up.

    Attributes:
        told: Prediction of each step, by its number.
        truth: True lengths of each step, by its number: nothing that is generated changes a prediction.
    """

    told: Mapping[int, Prediction] | None = None
    truth: Mapping[int, Any] | None = None

    def _routing(self, batch: Batch, fleet: tuple[int, ...]) -> Routing:
        assert self.told is not None and self.truth is not None
        plain = super()._routing(batch, fleet)
        values = {field.name: getattr(plain, field.name) for field in fields(Routing)}
        values["truth"] = self.truth[batch.step]
        return _ToldRouting(**values, told=self.told[batch.step])


@dataclass(frozen=True)
class FixedArm(LiveArm):
    """The elastic arm with a schedule of fleets, whose replicas stay for the whole rollout."""

    schedule: tuple[int, ...] = ()

    def plan(self, memory: Memory, pool: PoolSnapshot, batch: Batch) -> RolloutPlan:
        """Return a replica for every sample on the step's fleet."""
        fleet = (1,) * self.schedule[batch.step - 1]
        return self._routing(batch, fleet).plan(memory.lengths, self.pool, batch)

    def policy(self, memory: Memory, batch: Batch) -> Policy:
        """Return the decisions of the router alone."""
        return self._routing(batch, ()).policy(memory.lengths, batch)


def workload(run: LiveRun, seed: int) -> tuple[StepData, ...]:
    """Return a draw of the demo's workload, with as many prompt tokens as the run's prompts had."""
    with tempfile.TemporaryDirectory() as folder:
        steps = load_steps(ablation.prepare(None, Path(folder), seed).trace)[:STEPS]
    tokens = round(float(np.mean([data.batch.prompt_tokens.mean() for data in run.data])))
    return tuple(
        replace(data, batch=replace(data.batch, prompt_tokens=np.full_like(data.batch.prompt_tokens, tokens)))
        for data in steps
    )


def compare(settings: RoutingSettings, stage: Stage) -> dict[str, dict[str, float]]:
    """Return step, GPU-seconds and objective of each arm over stock's: medians over the steps after the warm-up."""
    random = replace(settings.config, dispatcher=replace(settings.config.dispatcher, name="random"))
    truth = {data.batch.step: data.lengths for data in stage.data}
    prompts = {data.batch.step: exact_prompts(data.batch, data.lengths) for data in stage.data}
    elastic = stage.steps(LiveArm(settings, stage.known))
    schedule = mean_schedule([_num_replicas(step["fleet"]) for step in elastic.values()])
    steps = {
        "elastic": elastic,
        "fixed": stage.steps(FixedArm(settings, stage.known, schedule=tuple(schedule))),
        "random": stage.steps(LiveArm(replace(settings, config=random), stage.known)),
        "prompts": stage.steps(ToldArm(settings, stage.known, told=prompts, truth=truth)),
        "oracle": stage.steps(
            ToldArm(settings, stage.known, told={n: exact(of) for n, of in truth.items()}, truth=truth)
        ),
    }
    stock = _medians(stage.steps(StockSync(settings.tp)))
    over = {arm: [mine / its for mine, its in zip(_medians(of), stock, strict=True)] for arm, of in steps.items()}
    return {arm: dict(zip(FIGURES, (*ratios, fmean(ratios)), strict=True)) for arm, ratios in over.items()}


def _medians(steps: Mapping[int, Mapping[str, Any]]) -> tuple[float, float]:
    counted = [step for number, step in steps.items() if number > WARM_UP]
    return median(step["step_s"] for step in counted), median(step["gpu_s"] for step in counted)


def _num_replicas(fleet: str) -> int:
    """Return the replicas that a step starts with, of a fleet in words such as ``3xTP1``."""
    return sum(int(size.split("x")[0]) for size in fleet.split(" ")[0].split("+"))


def summarise(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Return each arm's mean figures and their standard errors, and elastic's objective over each other arm's."""
    arms = {
        arm: {
            name: {"mean": fmean(values), "standard_error": stdev(values) / len(values) ** 0.5}
            for name in FIGURES
            for values in [[one[arm][name] for one in found]]
        }
        for arm in found[0]
    }
    mean = {arm: figures["objective"]["mean"] for arm, figures in arms.items()}
    return {"arms": arms, "elastic_objective_over": {arm: mean["elastic"] / mean[arm] for arm in mean}}


def main() -> None:
    """Simulate every arm on every workload and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="OUT", help="folder of a finished paced run of stock and elastic")
    parser.add_argument("--workloads", type=int, default=30)
    arguments = parser.parse_args()
    if arguments.workloads < 2:
        parser.error("--workloads must be 2 or more: a spread needs two")
    run = LiveRun(arguments.run, PACE)
    costs = calibrate(run)
    found = [
        compare(run.settings, Stage.of(run, costs, workload(run, seed))) for seed in range(1, arguments.workloads + 1)
    ]
    results = {"workloads": arguments.workloads, "steps": STEPS, "warm_up_steps": WARM_UP, **summarise(found)}
    command = f"python -m benchmarks.control_spread OUT/parked --workloads {arguments.workloads}"
    parts = {"simulation": code(), "run": run.code}
    write_result("control_spread", results, command=command, kind="simulated", num_gpus=4, parts=parts)


if __name__ == "__main__":
    main()
