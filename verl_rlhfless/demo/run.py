"""Runs the arms one after another on the same recipe and budget, and writes ``ab.json``."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from verl_rlhfless.config import InstrumentConfig
from verl_rlhfless.demo import ablation, recipe
from verl_rlhfless.demo.assets import Assets, Problem, arithmetic_problems, build_assets, read_problems
from verl_rlhfless.demo.cluster import Cluster, private_cluster
from verl_rlhfless.demo.workload import Workload
from verl_rlhfless.errors import ConfigError, RlhflessError
from verl_rlhfless.live.instrument import instrument_environment
from verl_rlhfless.live.observer import Observer
from verl_rlhfless.report.ab import build_ab
from verl_rlhfless.report.guards import GuardLimits
from verl_rlhfless.report.requests import render_requests
from verl_rlhfless.report.table import render

_POLL_S = 0.5
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

    def chosen_arms(self) -> list[recipe.Arm]:
        """Return the arms to run, in order."""
        arms = [recipe.ARMS[name] for name in self.arms]
        return [variant for arm in arms for variant in ablation.ablated(arm)] if self.ablate else arms

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


@dataclass(frozen=True, slots=True)
class ArmOutcome:
    """How an arm ended.

    Attributes:
        folder: Everything that the arm wrote.
        exit_code: Of ``python -m verl.trainer.main_ppo``.
        leftovers: Engine processes and shared-memory segments that outlived the training job.
    """

    folder: Path
    exit_code: int
    leftovers: tuple[str, ...]


def run_demo(options: DemoOptions) -> int:
    """Run the chosen arms, print one table, write ``ab.json``, and return the exit code: 1 if an arm or a guard failed.

    Raises:
        RlhflessError: An option or the data is wrong; nothing was started.
    """
    say = partial(print, flush=True)
    problems, workload = _work(options)
    options.out.mkdir(parents=True, exist_ok=True)
    say(f"building a tiny Qwen3, its tokenizer and {len(problems)} problems")
    assets = build_assets(options.out.resolve() / "assets", problems, options.seed)
    replayed = tuple(ablation.overrides(workload)) if workload else ()
    outcomes = {
        arm.name: run_arm(recipe.Arm(arm.name, (*replayed, *arm.overrides)), assets, options, say)
        for arm in options.chosen_arms()
    }
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.exit_code != 0}
    for name, outcome in failed.items():
        say(
            f"{name}: verl ended with exit code {outcome.exit_code}; the end of {outcome.folder / 'train.log'} says why"
        )
    limits = GuardLimits(
        num_steps=options.steps,
        num_samples=recipe.PROMPTS_PER_STEP * (ablation.SIZE.samples if workload else recipe.SAMPLES_PER_PROMPT),
        max_gpus=recipe.NUM_GPUS,
        pulling_arms=tuple(name for name in outcomes if name.startswith(recipe.ELASTIC.name)),
    )
    ab = build_ab(
        {name: outcome.folder for name, outcome in outcomes.items()},
        seed=options.seed,
        num_gpus=recipe.NUM_GPUS,
        limits=limits,
        left_behind={
            name: outcome.leftovers for name, outcome in outcomes.items() if name.startswith(recipe.ELASTIC.name)
        },
    )
    target = options.out / "ab.json"
    target.write_text(json.dumps(ab, indent=2) + "\n")
    say(render(ab))
    if workload:
        say(f"lengths are those of {workload.trace} (times {workload.scale:g})")
        say(render_requests(ab["arms"], ablation.least_prefill_of_steps(assets.model, workload, options.steps)))
    say(f"wrote {target}")
    return int(bool(failed) or not all(guard["ok"] for guard in ab["guards"]))


def _work(options: DemoOptions) -> tuple[list[Problem], Workload | None]:
    """Return the problems of the run, and the workload whose lengths it replays, if any."""
    if not options.is_replayed:
        return options.problems(), None
    workload = ablation.prepare(options.trace, options.out.resolve(), options.seed)
    return list(workload.problems), workload


def run_arm(
    arm: recipe.Arm, assets: Assets, options: DemoOptions, say: Callable[[str], None], pace: str | None = None
) -> ArmOutcome:
    """Train one arm on a private Ray cluster under the observer and return how it ended.

    ``pace`` declares the device that each replica stands for (``rlhfless.instrument.pace``); ``None`` = the CPU itself.
    """
    folder = options.out.resolve() / arm.name
    folder.mkdir(parents=True, exist_ok=True)
    command = arm_command(arm, assets, options, folder)
    with private_cluster(recipe.NUM_GPUS, arm_environment(folder, pace)) as cluster, Observer(folder):
        exit_code = _train(command, cluster, folder, lambda line: say(f"{arm.name}: {line}"))
        return ArmOutcome(folder, exit_code, tuple(cluster.leftovers()))


def arm_environment(folder: Path, pace: str | None = None) -> dict[str, str]:
    """Return what every process of an arm inherits: the CPU platform, where to record, and the declared device."""
    observed = InstrumentConfig(pace=pace, observer=str(folder))
    return {**recipe.CPU_ENVIRONMENT, **instrument_environment(observed)}


def arm_command(arm: recipe.Arm, assets: Assets, options: DemoOptions, folder: Path) -> list[str]:
    """Return the command line that trains an arm, whose output goes to ``folder``."""
    shared = recipe.common_overrides(assets, folder, options.steps, options.seed)
    return [sys.executable, "-m", "verl.trainer.main_ppo", *shared, *arm.overrides]


def _train(command: Sequence[str], cluster: Cluster, folder: Path, say: Callable[[str], None]) -> int:
    log = folder / "train.log"
    say(f"starting verl, its log is {log}")
    started = time.monotonic()
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=cluster.child_environment()
        ) as process,
    ):
        try:
            done = 0
            while process.poll() is None:
                if time.monotonic() - started > _ARM_TIMEOUT_S:
                    raise RlhflessError(f"the arm did not end within {_ARM_TIMEOUT_S:g} s; see {log}")
                done = _tell_new_steps(folder / "metrics.jsonl", done, started, say)
                time.sleep(_POLL_S)
            _tell_new_steps(folder / "metrics.jsonl", done, started, say)
            return process.returncode
        finally:
            process.kill()


def _tell_new_steps(metrics: Path, done: int, started: float, say: Callable[[str], None]) -> int:
    if not metrics.exists():
        return done
    lines = metrics.read_text().splitlines(keepends=True)
    for line in lines[done:]:
        if not line.endswith("\n"):
            break
        done += 1
        data = json.loads(line)["data"]
        if "timing_s/step" in data:  # a validation before the first step has a line of its own
            say(
                f"step {data['training/global_step']} took {data['timing_s/step']:.1f} s "
                f"(reward {data['critic/score/mean']:.3f}), {time.monotonic() - started:.0f} s since the start"
            )
    return done
