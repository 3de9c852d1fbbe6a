"""Runs the arms one after another on the same recipe and budget, and writes ``ab.json``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from verl_rlhfless.ab.arms import Arm, ablated
from verl_rlhfless.ab.cluster import private_cluster
from verl_rlhfless.ab.compare import Comparison, compare, is_sound
from verl_rlhfless.ab.training import ArmOutcome, Say, Training, observed_environment, train
from verl_rlhfless.demo import ablation, recipe
from verl_rlhfless.demo.assets import Assets, Problem, build_assets, read_problems
from verl_rlhfless.demo.columns import COLUMNS, Column, as_json, render_columns, summarise
from verl_rlhfless.demo.workload import Workload
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.outputs import check_folder
from verl_rlhfless.report.environment import code, hardware, versions
from verl_rlhfless.report.folder import write_report
from verl_rlhfless.report.guards import GuardLimits
from verl_rlhfless.report.requests import render_requests
from verl_rlhfless.schema import what_to_do

_ARM_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the user of ``rlhfless demo`` may choose."""

    out: Path
    data: Path | None = None
    steps: int = 7
    seed: int = 1
    arms: tuple[str, ...] = ("stock", "elastic")
    columns: tuple[str, ...] = ("unpaced",)
    ablate: bool = False
    trace: Path | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError("--steps", self.steps, "must be >= 1", "Use 7 for medians over 6 steps.")
        if not 0 <= self.seed < 2**31:
            raise ConfigError("--seed", self.seed, "must be between 0 and 2**31 - 1", "Choose another seed.")
        for name in self.arms:
            if name not in recipe.ARMS:
                raise ConfigError(
                    "--arms",
                    name,
                    f"must be among {', '.join(recipe.ARMS)}",
                    what_to_do(name, recipe.ARMS, "Separate several by commas."),
                )
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ConfigError("--arms", ",".join(self.arms), "must name each arm once", "Use --arms stock,elastic.")
        for name in self.columns:
            if name not in COLUMNS:
                raise ConfigError(
                    "--columns",
                    name,
                    f"must be among {', '.join(COLUMNS)}",
                    what_to_do(name, COLUMNS, "Separate several by commas."),
                )
        if not self.columns or len(set(self.columns)) < len(self.columns):
            raise ConfigError(
                "--columns", ",".join(self.columns), "must name each column once", "Use --columns parked."
            )
        check_folder("--out", self.out)
        if self.data is not None and (self.trace is not None or self.ablate):
            raise ConfigError("--data", str(self.data), "does not go with a replayed trace", "Give one of the two.")

    def chosen_arms(self) -> list[Arm]:
        """Return the arms to run, in order."""
        arms = [recipe.ARMS[name] for name in self.arms]
        return [variant for arm in arms for variant in ablated(arm)] if self.ablate else arms


def run_demo(options: DemoOptions) -> int:
    """Run the chosen arms in the chosen columns, print the tables, and return the exit code.

    Each column's record is ``ab.json`` in a folder of its own; ``columns.json`` holds the medians of all. The code is 1
    if an arm or a guard failed, or a paced arm is void.

    Raises:
        RlhflessError: An option or the data is wrong; nothing was started.
    """
    say: Say = partial(print, flush=True)
    made_by = {**code(), "versions": versions(), "hardware": hardware(recipe.NUM_GPUS)}
    work = _prepare(options)
    options.out.mkdir(parents=True, exist_ok=True)
    say(f"building a tiny Qwen3, its tokenizer and {len(work.problems)} problems")
    assets = build_assets(options.out.resolve() / "assets", list(work.problems), options.seed)
    records = {name: _run_column(COLUMNS[name], options, work, assets, say) for name in options.columns}
    summaries = summarise(records)
    target = options.out / "columns.json"
    target.write_text(json.dumps(as_json(summaries, made_by), indent=2) + "\n")
    say(render_columns(summaries))
    say(work.told)
    say(f"wrote {target}")
    return int(not all(map(is_sound, records.values())) or any(summary.is_void for summary in summaries))


@dataclass(frozen=True, slots=True)
class _Work:
    """What every arm trains on, with a line that says where the lengths come from."""

    problems: tuple[Problem, ...]
    overrides: tuple[str, ...]
    num_samples: int
    told: str
    workload: Workload | None = None


def _prepare(options: DemoOptions) -> _Work:
    """Return the replayed workload, or the user's own problems, whose responses are as long as the model makes them.

    Raises:
        RlhflessError: Data or trace are missing, malformed or too small.
    """
    if options.data is not None:
        problems = read_problems(options.data)
        if len(problems) < recipe.PROMPTS_PER_STEP:
            rule = f"must hold at least {recipe.PROMPTS_PER_STEP} problems"
            raise ConfigError("--data", str(options.data), rule, "Add some.")
        samples = recipe.PROMPTS_PER_STEP * recipe.SAMPLES_PER_PROMPT
        return _Work(tuple(problems), (), samples, "lengths are the model's own")
    workload = ablation.prepare(options.trace, options.out.resolve(), options.seed)
    told = f"lengths are those of {workload.trace} (times {workload.scale:g})"
    samples = ablation.SIZE.prompts * ablation.SIZE.samples
    return _Work(workload.problems, tuple(ablation.overrides(workload)), samples, told, workload)


def _run_column(column: Column, options: DemoOptions, work: _Work, assets: Assets, say: Say) -> dict[str, Any]:
    say(f"{column.name}: {column.title}")
    folder = options.out.resolve() / column.name
    in_folder = replace(options, out=folder)
    arms = [
        replace(column.applied_to(arm), overrides=(*work.overrides, *column.applied_to(arm).overrides))
        for arm in options.chosen_arms()
    ]
    limits = GuardLimits(num_steps=options.steps, num_samples=work.num_samples, max_gpus=recipe.NUM_GPUS)
    pace = column.pace.to_json() if column.pace else None
    comparison = Comparison(
        folder,
        tuple(arms),
        limits,
        recipe.NUM_GPUS,
        options.seed,
        pace=asdict(column.pace) if column.pace else None,
    )
    record = compare(comparison, lambda arm, tell: run_arm(arm, assets, in_folder, tell, pace), say)
    if work.workload is not None:
        least = ablation.least_prefill_of_steps(assets.model, work.workload, options.steps)
        say(render_requests(record["arms"], least))
    say(f"wrote {write_report(folder)}")
    return record


def run_arm(arm: Arm, assets: Assets, options: DemoOptions, say: Say, pace: str | None = None) -> ArmOutcome:
    """Train one arm on a private Ray cluster under the observer and return how it ended.

    ``pace`` declares the device that each replica stands for (``rlhfless.instrument.pace``); ``None`` = the CPU itself.
    """
    folder = options.out.resolve() / arm.name
    training = Training(
        argv=arm_command(arm, assets, options, folder),
        folder=folder,
        open_cluster=partial(private_cluster, recipe.NUM_GPUS),
        environment=recipe.CPU_ENVIRONMENT,
        pace=pace,
        timeout_s=_ARM_TIMEOUT_S,
    )
    return train(training, say)


def arm_environment(folder: Path, pace: str | None = None) -> dict[str, str]:
    """Return what every process of an arm inherits: the CPU platform, where to record, and the declared device."""
    return observed_environment(recipe.CPU_ENVIRONMENT, folder, pace)


def arm_command(arm: Arm, assets: Assets, options: DemoOptions, folder: Path) -> list[str]:
    """Return the command line that trains an arm, whose output goes to ``folder``."""
    shared = recipe.common_overrides(assets, folder, options.steps, options.seed)
    return [sys.executable, "-m", "verl.trainer.main_ppo", *shared, *arm.overrides]
