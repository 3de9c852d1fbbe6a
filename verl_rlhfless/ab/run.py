"""``rlhfless ab``: a user's recipe once per arm, on the running Ray cluster or on private ones."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from verl_rlhfless.ab.arms import Arm, build_arms, parse_names
from verl_rlhfless.ab.cluster import CPU_HOST, Cluster, HostSize, check_address, private_cluster, running_cluster
from verl_rlhfless.ab.command import Recipe, hydra_quoted, parse_recipe, shell_environment
from verl_rlhfless.ab.compare import Comparison, arm_names, compare, is_sound
from verl_rlhfless.ab.kept import CHECKPOINT_FOLDER, HYDRA_FOLDER, Kept
from verl_rlhfless.ab.probe import LOGGER, RecipeFacts, check_arm, probe
from verl_rlhfless.ab.training import ArmOutcome, Say, Training, train
from verl_rlhfless.doctor import count_gpus
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.live.startup import check_plugin_policy
from verl_rlhfless.outputs import check_folder
from verl_rlhfless.report.environment import code, gpu_names, versions
from verl_rlhfless.report.folder import write_report
from verl_rlhfless.report.guards import MAX_PROBS_DIFF, GuardLimits
from verl_rlhfless.report.observed import ROLLOUT_FOLDER
from verl_rlhfless.trace import read_trace

_ADDRESS = "RAY_ADDRESS"


@dataclass(frozen=True, slots=True)
class AbOptions:
    """What the user of ``rlhfless ab`` chooses.

    Attributes:
        command: The recipe.
        out: Folder of the comparison.
        arms: Names, with commas.
        steps: Training steps of each arm.
        trainer_gpus: GPUs of the trainer; ``None`` = see :func:`~verl_rlhfless.ab.arms.build_arms`.
        trace: Lengths to replay in every arm; ``None`` = the model's own.
        plugin_overrides: Appended to the plugin's arms only.
        timeout_h: After this time an arm is ended and has failed.
    """

    command: str
    out: Path
    arms: str
    steps: int
    trainer_gpus: int | None = None
    trace: Path | None = None
    plugin_overrides: tuple[str, ...] = ()
    timeout_h: float = 24.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError("--steps", self.steps, "must be >= 1", "Use 3 or more: the first step is a warm-up.")
        if not self.timeout_h > 0:
            raise ConfigError("--arm-timeout-h", self.timeout_h, "must be > 0", "Use 24, for instance.")
        check_folder("--out", self.out)
        for override in self.plugin_overrides:
            if "=" not in override and not override.startswith("~"):
                rule = "must be a Hydra override"
                raise ConfigError("--plugin-override", override, rule, "Write --plugin-override KEY=VALUE.")


@dataclass(frozen=True, slots=True)
class Plan:
    """A comparison that can be run.

    Attributes:
        recipe: The user's command.
        facts: What it resolves to.
        options: What the user chose.
        comparison: The arms and their limits.
        kept: What of an earlier run is kept.
        address: Of the running cluster; ``None`` = private ones.
    """

    recipe: Recipe
    facts: RecipeFacts
    options: AbOptions
    comparison: Comparison
    kept: Kept
    address: str | None

    def overrides(self, arm: Arm) -> list[str]:
        """Return what is appended to the recipe in an arm."""
        return [*common_overrides(self.facts, self.options, self.options.out / arm.name), *arm.overrides]


def prepare(options: AbOptions, environ: Mapping[str, str] = os.environ) -> Plan:
    """Return the plan of a comparison; nothing is started but the recipe's own composition by Hydra.

    Raises:
        ConfigError: Bad input; the message is one line.
        DataError: The trace is missing or malformed.
    """
    names = parse_names(options.arms)
    recipe = parse_recipe(options.command, Path.cwd())
    if options.trace is not None:
        for _ in read_trace(options.trace):  # every line, before an arm runs for hours
            pass
    address = environ.get(_ADDRESS) or None
    if address is not None:
        check_address(address)
    out = options.out.resolve()
    common = {"text": recipe.text, "digest": recipe.digest()}
    kept = Kept(out, common, {**versions(), **code(), "gpus": gpu_names()})
    kept.check()
    print("reading the recipe as verl does (some 20 s of imports)", flush=True)
    facts = probe(recipe)
    _check_host(facts, address)
    check_plugin_policy({**environ, **facts.environment})  # else stock's engines would record nothing
    inherited = facts.environment.values() if address is not None else ()
    recipe.check_words([str(out), str(options.trace or ""), *options.plugin_overrides, *inherited])
    kept = replace(kept, versions={**kept.versions, "trained": facts.trained, "trace": _digest(options.trace)})
    arms = build_arms(names, facts, options.trainer_gpus, options.plugin_overrides)
    limits = GuardLimits(
        num_steps=options.steps,
        num_samples=facts.prompts * facts.samples,
        max_gpus=facts.num_gpus,
        probs_diff=MAX_PROBS_DIFF if facts.is_fp32 else None,
    )
    comparison = Comparison(out, tuple(arms), limits, facts.num_gpus, facts.seed, {**common, "steps": options.steps})
    plan = Plan(recipe, facts, replace(options, out=out), comparison, kept, address)
    for arm in arms:
        if arm.is_ours and kept.finished(arm.name, recipe.argv(plan.overrides(arm))) is None:
            print(f"checking that {arm.name} can run", flush=True)  # before the first arm runs for hours
            check_arm(recipe, arm.name, plan.overrides(arm), {_ADDRESS: address or "private"})
    return plan


def _digest(trace: Path | None) -> str | None:
    return hashlib.sha256(trace.read_bytes()).hexdigest()[:16] if trace is not None else None


def _check_host(facts: RecipeFacts, address: str | None) -> None:
    if (own := facts.environment.get(_ADDRESS)) is not None:
        rule = "the recipe chooses its Ray cluster itself, which is not the one that is watched"
        raise ConfigError(_ADDRESS, own, rule, "Remove it there, and set it for this command.")
    if address is not None:
        return
    if facts.nnodes > 1:
        rule = "needs a Ray cluster, and none is given"
        raise ConfigError("trainer.nnodes", facts.nnodes, rule, f"Start one on all nodes and set {_ADDRESS}.")
    if facts.is_on_cpu:
        return
    found = count_gpus()
    if found < facts.num_gpus:
        rule = f"this host has {found} GPUs, and no Ray cluster is given"
        action = f"Set {_ADDRESS}, use fewer, or VERL_PLATFORM=cpu in front of the command to debug without a GPU."
        raise ConfigError("trainer.n_gpus_per_node", facts.gpus_per_node, rule, action)


def run_ab(plan: Plan) -> int:
    """Run the arms, write ``ab.json`` and the report, and return the exit code: 1 if an arm or a guard failed."""
    _end_with_clusters()
    say: Say = partial(print, flush=True)
    plan.kept.claim()
    where = "private Ray clusters" if plan.address is None else f"the Ray cluster at {plan.address}"
    say(f"arms {arm_names(plan.comparison.arms)}, each on {plan.facts.num_gpus} GPUs of {where}")
    record = compare(plan.comparison, partial(_train_arm, plan), say)
    say(f"wrote {write_report(plan.options.out)}")
    return int(not is_sound(record))


def _end_with_clusters() -> None:
    """Let a signal, such as of a terminal that is closed, end what was started as well as this process."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def _train_arm(plan: Plan, arm: Arm, say: Say) -> ArmOutcome:
    folder = plan.options.out / arm.name
    argv = plan.recipe.argv(plan.overrides(arm))
    earlier = plan.kept.finished(arm.name, argv)
    if earlier is not None:
        say("kept from an earlier run with the same recipe, overrides and versions")
        return earlier
    plan.kept.forget(arm.name)
    training = Training(
        argv=argv,
        folder=folder,
        open_cluster=partial(_cluster, plan),
        environment={"PATH": shell_environment()["PATH"], **plan.facts.environment},
        cwd=plan.recipe.folder,
        timeout_s=plan.options.timeout_h * 3600,
        num_steps=plan.options.steps,
    )
    outcome = train(training, say)
    plan.kept.keep(arm.name, argv, outcome)
    return outcome


def _cluster(plan: Plan, environment: Mapping[str, str]) -> AbstractContextManager[Cluster]:
    if plan.address is not None:
        return running_cluster(plan.address, plan.facts.num_gpus, environment)
    return private_cluster(plan.facts.num_gpus, environment, CPU_HOST if plan.facts.is_on_cpu else HostSize())


def common_overrides(facts: RecipeFacts, options: AbOptions, folder: Path) -> list[str]:
    """Return what is appended to the recipe in every arm: how long it runs, and where it writes."""
    last_step = facts.first_step + options.steps
    overrides = [
        f"trainer.total_training_steps={last_step}",
        f"trainer.total_epochs={max(facts.epochs, last_step)}",  # an epoch has at least one step
        LOGGER,
        f"trainer.rollout_data_dir={hydra_quoted(folder / ROLLOUT_FOLDER)}",
        f"trainer.default_local_dir={hydra_quoted(folder / CHECKPOINT_FOLDER)}",
        "trainer.default_hdfs_dir=null",  # where the recipe keeps what a real run wrote, under the same step numbers
        "trainer.validation_data_dir=null",
        f"hydra.run.dir={hydra_quoted(folder / HYDRA_FOLDER)}",
        *(f"ray_kwargs.ray_init.{name}=null" for name in facts.ray_limits),  # the cluster runs already
    ]
    if options.trace is not None:
        overrides += [f"rlhfless.replay.trace={hydra_quoted(options.trace.resolve())}", "data.shuffle=False"]
    return overrides
