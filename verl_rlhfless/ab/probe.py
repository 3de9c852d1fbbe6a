"""What a recipe resolves to, asked of Hydra itself: nothing is trained, and scripts are read as verl reads them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from verl_rlhfless.ab.command import Recipe, shell_environment
from verl_rlhfless.ab.process import end_group
from verl_rlhfless.config import LEAVING_STRATEGIES
from verl_rlhfless.errors import ConfigError

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
    "switch": "trainer.v1.separate_async.hybrid_rollout.enable_switch",
    "has_reward_pool": "reward.reward_model.enable_resource_pool",
    "has_reward_model": "reward.reward_model.enable",
    "reward_nnodes": "reward.reward_model.nnodes",
    "reward_gpus_per_node": "reward.reward_model.n_gpus_per_node",
    "ray_num_cpus": "ray_kwargs.ray_init.num_cpus",
    "ray_num_gpus": "ray_kwargs.ray_init.num_gpus",
}
_HYDRA_ERRORS = ("Could not", "Error", "In '", "Key ", "You must", "missing ", "no viable", "mismatched")
_YAML_LINE = re.compile(r"\w+:|\s")


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
        extra_gpus: GPUs of a pool of its own for a reward model.
        ray_limits: Keys of ``ray_kwargs.ray_init`` that don't go with a cluster that runs.
        environment: What the recipe assigns and exports to its process, by name.
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
    return read_facts(recipe.text, _compose(recipe))


def _compose(recipe: Recipe) -> str:
    names = dict.fromkeys([*recipe.variables, "VERL_PLATFORM"])
    asked = [f'{name}: "${{oc.select:{key},null}}"' for name, key in _KEYS.items()]
    precision = 'precision: "${oc.select:actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype,null}"'
    exported = ", ".join(f'{name}: "${{oc.env:{name},null}}"' for name in names)
    node = f"+{_NODE}={{{', '.join([*asked, precision])}, environment: {{{exported}}}}}"
    command = recipe.argv([node, "--cfg", "job", "--package", _NODE, "--resolve"])
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=recipe.folder,
        env=shell_environment(),
        start_new_session=True,
    ) as process:
        try:
            out, errors = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            rule = f"did not print its configuration within {_TIMEOUT_S:g} s"
            raise ConfigError("COMMAND", recipe.text, rule, "Try it with `--cfg job` appended.") from None
        finally:
            end_group(process)
    if process.returncode != 0:
        said = [line.strip() for line in errors.splitlines() if line.strip()]
        rule = f"verl does not accept it: {_error_line(said)}"
        raise ConfigError("COMMAND", recipe.text, rule, "Try it with `--cfg job` appended.")
    return out


def _error_line(lines: list[str]) -> str:
    """Return what names the error: of Hydra's own its first lines, of a traceback the last one."""
    plain = [line for line in lines if not line.startswith(("Set the environment", "+ ", "INFO", "WARNING"))]
    first = next((i for i, line in enumerate(plain) if line.startswith(_HYDRA_ERRORS)), None)
    if first is not None:
        return " ".join(plain[first : first + 2])
    return plain[-1] if plain else "it ended without a word"


def read_facts(text: str, out: str) -> RecipeFacts:
    """Return the facts that Hydra printed to ``out`` for the recipe ``text``.

    Raises:
        ConfigError: The answer is missing (the overrides did not arrive), or it chooses what the arms choose.
    """
    head, _, answer = out.partition(f"# @package {_NODE}\n")
    lines = answer.splitlines()
    end = next((i for i, line in enumerate(lines) if not _YAML_LINE.match(line)), len(lines))
    if head == out or not lines[:end]:
        raise ConfigError("COMMAND", text, "overrides do not reach verl", 'End its training command in "$@".')
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.create("\n".join(lines[:end])))  # type: ignore[assignment]
    _check(text, values)
    has_pool = values["has_reward_model"] and values["has_reward_pool"]
    return RecipeFacts(
        **{name: int(values[name]) for name in ("gpus_per_node", "nnodes", "tp", "prompts", "samples", "mini_batch")},
        epochs=int(values["epochs"]),
        seed=values["seed"],
        is_fp32=values["rollout_dtype"] == "float32" and values["precision"] in ("fp32", "float32"),
        has_switch=values["switch"] is not None,
        can_leave=values["strategy"] in LEAVING_STRATEGIES,
        extra_gpus=int(values["reward_nnodes"] * values["reward_gpus_per_node"]) if has_pool else 0,
        ray_limits=tuple(name for name in ("num_cpus", "num_gpus") if values[f"ray_{name}"] is not None),
        environment={name: str(value) for name, value in values["environment"].items() if value is not None},
    )


def _check(text: str, values: Mapping[str, Any]) -> None:
    if not values["use_v1"]:
        raise ConfigError("trainer.use_v1", False, "the v0 trainer is not supported", "Set trainer.use_v1=True.")
    if values["mode"] != "sync":
        rule = "the recipe chooses a trainer mode itself, which is what the arms do"
        raise ConfigError("trainer.v1.trainer_mode", values["mode"], rule, "Remove it, and name the mode in --arms.")
    if values["ours"] is not None:
        rule = "the recipe chooses parts of this plugin itself, which is what the arms do"
        raise ConfigError("rlhfless.pool.name", values["ours"], rule, "Remove +rlhfless=... from the recipe.")
    missing = [_KEYS[name] for name in ("gpus_per_node", "nnodes", "tp", "prompts", "samples") if not values[name]]
    if missing:
        raise ConfigError(missing[0], None, f"is not set, or 0, in {text!r}", "Set it in the recipe.")
