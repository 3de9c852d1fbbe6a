"""What a recipe resolves to, asked of Hydra itself: nothing is trained, and scripts are read as verl reads them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from verl_rlhfless.ab.command import Recipe, shell_environment
from verl_rlhfless.ab.process import end_group
from verl_rlhfless.config import LEAVING_STRATEGIES
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.live.variables import CHECK_ONLY_VARIABLE

LOGGER = 'trainer.logger=["console","file"]'
"""An override of every arm: without verl's file nothing would be known of its steps."""

_NODE = "rlhfless_probe"
_TIMEOUT_S = 300.0
_ROLLOUT = "actor_rollout_ref.rollout"
_KEYS = {
    "gpus_per_node": "trainer.n_gpus_per_node",
    "nnodes": "trainer.nnodes",
    "tp": f"{_ROLLOUT}.tensor_model_parallel_size",
    "prompts": "data.train_batch_size",
    "samples": f"{_ROLLOUT}.n",
    "mini_batch": "actor_rollout_ref.actor.ppo_mini_batch_size",
    "epochs": "trainer.total_epochs",
    "seed": "data.seed",
    "mode": "trainer.v1.trainer_mode",
    "use_v1": "trainer.use_v1",
    "ours": "rlhfless.pool.name",
    "rollout_dtype": f"{_ROLLOUT}.dtype",
    "strategy": "actor_rollout_ref.actor.strategy",
    "logger": "trainer.logger",
    "switch": "trainer.v1.separate_async.hybrid_rollout.enable_switch",
    "has_reward_pool": "reward.reward_model.enable_resource_pool",
    "has_reward_model": "reward.reward_model.enable",
    "reward_nnodes": "reward.reward_model.nnodes",
    "reward_gpus_per_node": "reward.reward_model.n_gpus_per_node",
    "has_teachers": "distillation.enabled",
    "teacher_nnodes": "distillation.nnodes",
    "teacher_gpus_per_node": "distillation.n_gpus_per_node",
    "ray_address": "ray_kwargs.ray_init.address",
    "ray_num_cpus": "ray_kwargs.ray_init.num_cpus",
    "ray_num_gpus": "ray_kwargs.ray_init.num_gpus",
    "resume_mode": "trainer.resume_mode",
    "resume_from": "trainer.resume_from_path",
}
_TRAINED = (
    *("data", "actor_rollout_ref", "algorithm", "critic", "reward", "distillation"),
    *(f"trainer.{key}" for key in ("n_gpus_per_node", "nnodes", "save_freq", "test_freq", "val_before_train")),
)
"""What says how a recipe trains."""
_COUNTS = ("gpus_per_node", "nnodes", "tp", "prompts", "samples", "mini_batch")
_UNNAMED = ("trainer.project_name=probe", "trainer.experiment_name=probe")  # which scripts like to make of the date
_BEGIN = f"# @package {_NODE}\n"
_END = "is_complete: true"
_REFUSED = "rlhfless: error: "
_VALID_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_OF_SHELLS = ("PWD", "OLDPWD", "SHLVL", "_")
_ASIDE = re.compile(r"Set the environment|\++ |INFO|WARNING")
_HYDRA_ERRORS = ("Could not", "Error", "In '", "Key ", "You must", "missing ", "no viable", "mismatched")


@dataclass(frozen=True, slots=True)
class RecipeFacts:
    """What the arms have to know of a recipe.

    Attributes:
        gpus_per_node: ``trainer.n_gpus_per_node``.
        nnodes: ``trainer.nnodes``.
        tp: Tensor-parallel size of the rollout.
        prompts: Prompts of a step.
        samples: Responses to each prompt.
        mini_batch: ``ppo_mini_batch_size``.
        epochs: ``trainer.total_epochs``.
        seed: Of the data's order; ``None`` = not set.
        is_fp32: Whether engine and trainer compute in float32, so that their probabilities agree closely.
        has_switch: Whether this verl can lend idle trainer GPUs to the rollout.
        can_leave: Whether the trainer may give its GPUs back during rollouts.
        extra_gpus: GPUs of pools of their own for a reward model and for teachers.
        ray_limits: Keys of ``ray_kwargs.ray_init`` that don't go with a cluster that runs.
        environment: What the recipe changes in the environment of its process, by name.
        first_step: Step of the checkpoint that it begins with; 0 = none.
        trained: Digest of how it trains, after its configuration files and variables.
    """

    gpus_per_node: int
    nnodes: int
    tp: int
    prompts: int
    samples: int
    mini_batch: int
    epochs: int
    seed: int | None
    is_fp32: bool
    has_switch: bool
    can_leave: bool
    extra_gpus: int
    ray_limits: tuple[str, ...]
    environment: Mapping[str, str]
    first_step: int = 0
    trained: str = ""

    @property
    def trainer_gpus(self) -> int:
        """GPUs of verl's trainer, which stock shares with the rollout."""
        return self.gpus_per_node * self.nnodes

    @property
    def num_gpus(self) -> int:
        """The budget of every arm."""
        return self.trainer_gpus + self.extra_gpus

    @property
    def is_on_cpu(self) -> bool:
        """Whether the recipe runs on the CPU platform, whose GPUs are declared only."""
        return self.environment.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def probe(recipe: Recipe) -> RecipeFacts:
    """Return what the recipe resolves to, from Hydra's own composition of it (about 20 s of imports).

    Raises:
        ConfigError: It cannot be composed, takes no overrides, or chooses what the arms choose.
    """
    inherited = shell_environment()
    return read_facts(recipe.text, _compose(recipe, inherited), inherited)


def _compose(recipe: Recipe, environment: Mapping[str, str]) -> str:
    keys = {**_KEYS, "precision": "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype"}
    asked = [f'{name}:"${{oc.select:{key},null}}"' for name, key in keys.items()]
    trained = ",".join(f'{key.replace(".", "_")}:"${{oc.select:{key},null}}"' for key in _TRAINED)
    asked += ['environment:"${rlhfless.environment:}"', f"trained:{{{trained}}}", _END.replace(" ", "")]
    node = f"+{_NODE}={{{','.join(asked)}}}"  # no blanks: many scripts end in $@ without quotes
    code, out, errors = _ask(
        recipe, [LOGGER, *_UNNAMED, node, "--cfg", "job", "--package", _NODE, "--resolve"], environment
    )
    if code != 0 or (_BEGIN not in out and _hydra_error(out)):  # a pipe has the exit code of its last command
        rule = f"verl does not accept it: {_error_line(out + errors)}"
        raise ConfigError("COMMAND", recipe.text, rule, "Try it with `--cfg job` appended.")
    return out


def check_arm(recipe: Recipe, name: str, overrides: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run an arm of this plugin up to its start-up check, which ends it before Ray starts.

    Raises:
        ConfigError: The check refuses it, or the arm does not get there.
    """
    code, out, errors = _ask(recipe, overrides, {**shell_environment(), **environment, CHECK_ONLY_VARIABLE: "1"})
    refused = [line.partition(_REFUSED)[2] for line in (out + errors).splitlines() if _REFUSED in line]
    if refused or (code != 0 and "rlhfless: active: " not in out):
        why = refused[-1] if refused else _error_line(out + errors)
        raise ConfigError("--arms", name, f"cannot run: {why.rstrip('.')}", "Or leave this arm out.")


def _ask(recipe: Recipe, overrides: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str, str]:
    """Run the recipe with overrides that end it before it trains, and return its exit code and what it wrote."""
    with subprocess.Popen(
        recipe.argv(overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        cwd=recipe.folder,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            out, errors = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            rule = f"did not print its configuration within {_TIMEOUT_S:g} s"
            raise ConfigError("COMMAND", recipe.text, rule, "Try it with `--cfg job` appended.") from None
        finally:
            end_group(process)
    return process.returncode, out, errors


def _error_line(said: str) -> str:
    """Return what names the error: of Hydra's own its first lines, of a traceback the last one."""
    plain = _plain(said)
    return _hydra_error(said) or (plain[-1] if plain else "it ended without a word")


def _hydra_error(said: str) -> str:
    plain = _plain(said)
    first = next((i for i, line in enumerate(plain) if line.startswith(_HYDRA_ERRORS)), len(plain))
    return " ".join(plain[first : first + 2])


def _plain(said: str) -> list[str]:
    """Return the lines without hints, without what a shell traces (``set -x``) and without log messages."""
    lines = [line.strip() for line in said.splitlines()]
    return [line for line in lines if line and not _ASIDE.match(line)]


def read_facts(text: str, out: str, inherited: Mapping[str, str]) -> RecipeFacts:
    """Return the facts that Hydra printed to ``out`` for the recipe ``text``.

    Args:
        text: The recipe.
        out: What its process wrote.
        inherited: The environment that the recipe was given.

    Raises:
        ConfigError: The answer is missing (the overrides did not arrive), or it chooses what the arms choose.
    """
    answer, is_complete, _ = out.partition(_BEGIN)[2].partition(f"\n{_END}")
    if not is_complete:
        raise ConfigError("COMMAND", text, "overrides do not reach verl", 'End its training command in "$@".')
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(answer))  # type: ignore[assignment]
    _check(values)
    has_pool = values["has_reward_model"] and values["has_reward_pool"]
    reward_gpus = values["reward_nnodes"] * values["reward_gpus_per_node"] if has_pool else 0
    teacher_gpus = values["teacher_nnodes"] * values["teacher_gpus_per_node"] if values["has_teachers"] else 0
    return RecipeFacts(
        **{name: values[name] for name in _COUNTS},
        epochs=values["epochs"],
        seed=values["seed"],
        is_fp32=values["rollout_dtype"] == "float32" and values["precision"] in ("fp32", "float32"),
        has_switch=values["switch"] is not None,
        can_leave=values["strategy"] in LEAVING_STRATEGIES,
        extra_gpus=int(reward_gpus + teacher_gpus),
        ray_limits=tuple(name for name in ("num_cpus", "num_gpus") if values[f"ray_{name}"] is not None),
        environment=_changed(values["environment"], inherited),
        first_step=_first_step(values),
        trained=hashlib.sha256(json.dumps(values["trained"]).encode()).hexdigest()[:16],
    )


def _changed(environment: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return what a process has in its environment that it did not inherit, and the platform that it runs on."""
    pairs = (item.partition("=") for item in base64.b64decode(environment).decode(errors="replace").split("\0"))
    return {
        name: value
        for name, _, value in pairs
        if _VALID_NAME.fullmatch(name) and name not in _OF_SHELLS
        if value != inherited.get(name) or name == "VERL_PLATFORM"
    }


def _first_step(values: Mapping[str, Any]) -> int:
    """Return the step of the checkpoint that a recipe names, which verl takes from the end of its path."""
    step = str(values["resume_from"]).rpartition("global_step_")[2]
    return int(step) if values["resume_mode"] == "resume_path" and step.isdecimal() else 0


def _check(values: Mapping[str, Any]) -> None:
    if not values["use_v1"]:
        raise ConfigError("trainer.use_v1", False, "the v0 trainer is not supported", "Set trainer.use_v1=True.")
    if values["mode"] != "sync":
        rule = "the recipe chooses a trainer mode itself, which is what the arms do"
        raise ConfigError("trainer.v1.trainer_mode", values["mode"], rule, "Remove it, and name the mode in --arms.")
    if values["ours"] is not None:
        rule = "the recipe chooses parts of this plugin itself, which is what the arms do"
        raise ConfigError("rlhfless.pool.name", values["ours"], rule, "Remove +rlhfless=... from the recipe.")
    if values["logger"] != ["console", "file"]:
        rule = "the recipe sets it after the overrides that it hands on, where it wins over them"
        raise ConfigError("trainer.logger", values["logger"], rule, 'Move "$@" to the end of its training command.')
    if values["ray_address"] is not None:
        rule = "the recipe chooses its Ray cluster itself, which is not the one that is watched"
        action = "Remove it, and set RAY_ADDRESS for this command."
        raise ConfigError("ray_kwargs.ray_init.address", values["ray_address"], rule, action)
    for name in (*_COUNTS, "epochs"):
        if not isinstance(values[name], int) or values[name] < 1:
            raise ConfigError(_KEYS[name], values[name], "must be a whole number from 1 on", "Set it in the recipe.")
