"""Runs the arms one after another on the same recipe and budget, and writes ``ab.json``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from verl_rlhfless.ab.arms import Arm, ablated
from verl_rlhfless.ab.cluster import private_cluster
from verl_rlhfless.ab.compare import Comparison, compare, is_sound
from verl_rlhfless.ab.training import ArmOutcome, Say, Training, observed_environment, train
from verl_rlhfless.demo import ablation, recipe
from verl_rlhfless.demo.assets import Assets, Problem, arithmetic_problems, build_assets, read_problems
from verl_rlhfless.demo.workload import Workload
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.report.folder import write_report
from verl_rlhfless.report.guards import GuardLimits
from verl_rlhfless.report.requests import render_requests

_ARM_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the user of ``rlhfless demo`` may choose."""

    out: Path
    data: Path | None = None
    steps: int = 4
    seed: int = 1
    arms: tuple[str, ...] = ("stock", "elastic")
    ablate: bool = False
    trace: Path | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError("--steps", self.steps, "must be >= 1", "Use 4 or more to see the whole schedule.")
        if not 0 <= self.seed < 2**31:
            raise ConfigError("--seed", self.seed, "must be between 0 and 2**31 - 1", "Choose another seed.")
        for name in self.arms:
            if name not in recipe.ARMS:
                raise ConfigError(
                    "--arms", name, f"must be among {', '.join(recipe.ARMS)}", "Separate several by commas."
                )
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ConfigError("--arms", ",".join(self.arms), "must name each arm once", "Use --arms stock,elastic.")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError("--out", str(self.out), "is a file", "Name a folder.")
        if self.is_replayed and self.data is not None:
            raise ConfigError("--data", str(self.data), "does not go with a replayed trace", "Give one of the two.")

    @property
    def is_replayed(self) -> bool:
        """Whether response lengths come from a trace."""
        return self.ablate or self.trace is not None

    def chosen_arms(self) -> list[Arm]:
        """Return the arms to run, in order."""
        arms = [recipe.ARMS[name] for name in self.arms]
        return [variant for arm in arms for variant in ablated(arm)] if self.ablate else arms

    def problems(self) -> list[Problem]:
        """Return the data of the run: the given file, or arithmetic of its own.

        Raises:
            DataError: The file is missing, empty, malformed, or smaller than one step.
        """
        if self.data is None:
            return arithmetic_problems(1024, self.seed)
        problems = read_problems(self.data)
        if len(problems) < recipe.PROMPTS_PER_STEP:
            raise ConfigError(
                "--data", str(self.data), f"must hold at least {recipe.PROMPTS_PER_STEP} problems", "Add some."
            )
        return problems


def run_demo(options: DemoOptions) -> int:
    """Run the chosen arms, print one table, write ``ab.json``, and return the exit code: 1 if an arm or a guard failed.

    Raises:
        RlhflessError: An option or the data is wrong; nothing was started.
    """
    say: Say = partial(print, flush=True)
    problems, workload = _work(options)
    options.out.mkdir(parents=True, exist_ok=True)
    say(f"building a tiny Qwen3, its tokenizer and {len(problems)} problems")
    assets = build_assets(options.out.resolve() / "assets", problems, options.seed)
    replayed = tuple(ablation.overrides(workload)) if workload else ()
    limits = GuardLimits(
        num_steps=options.steps,
        num_samples=recipe.PROMPTS_PER_STEP * (ablation.SIZE.samples if workload else recipe.SAMPLES_PER_PROMPT),
        max_gpus=recipe.NUM_GPUS,
    )
    arms = tuple(replace(arm, overrides=(*replayed, *arm.overrides)) for arm in options.chosen_arms())
    comparison = Comparison(options.out.resolve(), arms, limits, recipe.NUM_GPUS, options.seed)
    record = compare(comparison, lambda arm, tell: run_arm(arm, assets, options, tell), say)
    if workload:
        say(f"lengths are those of {workload.trace} (times {workload.scale:g})")
        say(render_requests(record["arms"], ablation.least_prefill_of_steps(assets.model, workload, options.steps)))
    say(f"wrote {write_report(options.out.resolve())}")
    return int(not is_sound(record))


def _work(options: DemoOptions) -> tuple[list[Problem], Workload | None]:
    """Return the problems of the run, and the workload whose lengths it replays, if any."""
    if not options.is_replayed:
        return options.problems(), None
    workload = ablation.prepare(options.trace, options.out.resolve(), options.seed)
    return list(workload.problems), workload


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
