"""Refuses options of verl that a run of ours can't honour, and tells those that it has no use for, before Ray starts.

Most are tables: one line an option. Whatever is neither here nor in ``startup.py`` is verl's own and works as in verl.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_rlhfless.config import RlhflessConfig
from verl_rlhfless.errors import ConfigError, DataError, UnsupportedError

logger = logging.getLogger(__name__)

_ROLLOUT = "actor_rollout_ref.rollout"
_ENTRY, _RUNNER = "verl.trainer.main_ppo", "TaskRunnerV1"


@dataclass(frozen=True, slots=True)
class Option:
    """An option of verl and the values of it for which a run of ours is refused or warned.

    Attributes:
        key: verl's key.
        applies: Whether a value is one of those.
        rule: Why the value can't be honoured, or why it has no effect.
        action: What to do instead; empty where the option only has no effect.
    """

    key: str
    applies: Callable[[Any], bool]
    rule: str
    action: str = ""


def _is_true(value: Any) -> bool:
    return value is True


def _is_false(value: Any) -> bool:
    return value is False


_OPTIONS = (
    Option(
        "skip.rollout_tq.enable",
        _is_true,
        "a skipped rollout's samples come from a file, and a run of ours counts those that it asked for",
        "Set it to False, or use +rlhfless=off.",
    ),
    Option(
        "actor_rollout_ref.hybrid_engine",
        _is_false,
        "asks for verl's separate_async trainer, and ours is synchronous",
        "Remove it, or use +rlhfless=off.",
    ),
    Option(
        f"{_ROLLOUT}.data_parallel_size",
        lambda size: size != 1,
        "a replica of ours is parallel over tensors only",
        "Set it to 1, or use +rlhfless=off.",
    ),
    Option(
        f"{_ROLLOUT}.pipeline_model_parallel_size",
        lambda size: size != 1,
        "a replica of ours is parallel over tensors only",
        "Set it to 1, or use +rlhfless=off.",
    ),
)
_WITHOUT_EFFECT = (
    Option(f"{_ROLLOUT}.free_cache_engine", _is_false, "an elastic replica sleeps or ends between two rollouts"),
    Option(
        f"{_ROLLOUT}.checkpoint_engine.backend",
        lambda name: name not in (None, "naive"),
        "elastic replicas get their weights from the store of rlhfless.weights",
    ),
    Option(f"{_ROLLOUT}.prometheus.enable", _is_true, "elastic replicas come and go, and Prometheus is told of none"),
    Option(
        f"{_ROLLOUT}.profiler.enable",
        _is_true,
        "elastic replicas are not profiled; the trainer's ranks are",
    ),
)
_REPLICA_ARGUMENTS = (
    "tensor_parallel_size",
    "data_parallel_size",
    "pipeline_parallel_size",
    "worker_extension_cls",
    "distributed_executor_backend",
    "enable_sleep_mode",
    "enable_prefix_caching",
    "gpu_memory_utilization",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
)
_INSTEAD = {
    "tensor_parallel_size": f"{_ROLLOUT}.tensor_model_parallel_size",
    "enable_sleep_mode": f"+{_ROLLOUT}.enable_sleep_mode",
    "enable_prefix_caching": f"{_ROLLOUT}.enable_prefix_caching",
    "gpu_memory_utilization": f"{_ROLLOUT}.gpu_memory_utilization",
    "max_model_len": f"{_ROLLOUT}.max_model_len",
    "max_num_batched_tokens": f"{_ROLLOUT}.max_num_batched_tokens",
    "max_num_seqs": f"{_ROLLOUT}.max_num_seqs",
}
_LEGACY = ("custom_reward_function", "reward_model", "sandbox_fusion")


def check_recipe(config: DictConfig, settings: RlhflessConfig) -> None:
    """Check the options of a recipe that runs on a rollout of ours.

    Raises:
        ConfigError: One can't be honoured.
    """
    for option in _OPTIONS:
        value = OmegaConf.select(config, option.key)
        if value is not None and option.applies(value):
            raise ConfigError(option.key, value, option.rule, option.action)
    _check_adapter_has_rank(config)
    _check_engine_arguments(config)
    _check_prefix_cache(config, settings)
    _check_nodes(config, settings)
    _check_legacy_reward(config)


def tell_what_has_no_effect(config: DictConfig) -> None:
    """Warn of options that mean nothing to elastic replicas; the run is the same without them."""
    for option in _WITHOUT_EFFECT:
        value = OmegaConf.select(config, option.key)
        if option.applies(value):
            logger.warning("rlhfless: %s=%s has no effect: %s.", option.key, value, option.rule)


def check_adapters_are_merged(config: DictConfig) -> None:
    """Refuse LoRA adapters that stay apart: verl's checkpoint-engine path drops them, and replicas serve the base."""
    key = "actor_rollout_ref.model"
    ranks = {name: OmegaConf.select(config, f"{key}.{name}", default=0) or 0 for name in ("lora_rank", "lora.rank")}
    if OmegaConf.select(config, f"{key}.lora.merge", default=False):
        return
    for name, rank in ranks.items():
        if rank > 0:
            rule = "elastic replicas load merged weights only; the adapter would be lost"
            raise ConfigError(f"{key}.{name}", rank, rule, f"Set {key}.lora.merge=True, or use +rlhfless=off.")


def check_data_files(config: DictConfig) -> None:
    """Check that local training and validation files exist and hold something.

    Raises:
        DataError: One is missing or empty.
    """
    if OmegaConf.select(config, "data.custom_cls.path"):
        return  # a data set of the recipe's own may take any name
    for key in ("train_files", "val_files"):
        names = config.data[key]
        for name in [names] if isinstance(names, str) else names or []:
            path = Path(name).expanduser()
            if "://" in name or (path.is_file() and path.stat().st_size > 0) or path.is_dir():
                continue
            state = "is empty" if path.is_file() else "is missing"
            raise DataError(
                f"data.{key}={name!r}: the file {state}. Set data.{key} to an existing Parquet or JSON file."
            )


def check_entry(task: Callable[..., Any]) -> None:
    """Check that the launched program runs verl's v1 trainers: recipes with a trainer of their own would ignore ours.

    Args:
        task: The function that Hydra is about to call.

    Raises:
        UnsupportedError: Neither it nor its module names verl's runner.
    """
    scope = getattr(task, "__globals__", None)
    if scope is None:
        return
    names = {*scope, *task.__code__.co_names}
    modules = {value.__name__ for value in scope.values() if isinstance(value, ModuleType)}
    if _RUNNER not in names and _ENTRY not in modules:
        spec = scope.get("__spec__")
        program = spec.name if spec is not None else scope.get("__file__", scope.get("__name__"))
        raise UnsupportedError(
            f"{program}: has a trainer of its own, so the plugin is configured but not active. Start "
            f"`python -m {_ENTRY}`, or use +rlhfless=off."
        )


def _check_adapter_has_rank(config: DictConfig) -> None:
    """Refuse an adapter that verl would not load: its engines make a LoRA model only of a rank above 0."""
    key = "actor_rollout_ref.model"
    path = OmegaConf.select(config, f"{key}.lora_adapter_path")
    if path is not None and not (OmegaConf.select(config, f"{key}.lora_rank") or 0) > 0:
        rule = f"verl loads an adapter only if {key}.lora_rank > 0, and would train the whole model without it"
        raise ConfigError(f"{key}.lora_adapter_path", path, rule, f"Set {key}.lora_rank to the adapter's.")


def _check_engine_arguments(config: DictConfig) -> None:
    """Refuse arguments of vLLM that go past the keys of verl from which replicas are planned and counted."""
    given: Mapping[str, Any] = OmegaConf.select(config, f"{_ROLLOUT}.engine_kwargs.vllm") or {}
    for name in _REPLICA_ARGUMENTS:
        if given.get(name) is not None:
            rule = "replaces what our replicas are started and counted with"
            action = f"Set {_INSTEAD[name]} instead." if name in _INSTEAD else "Remove it, or use +rlhfless=off."
            raise ConfigError(f"{_ROLLOUT}.engine_kwargs.vllm.{name}", given[name], rule, action)


def _check_prefix_cache(config: DictConfig, settings: RlhflessConfig) -> None:
    if settings.prefix_dedup.name == "on" and not config.actor_rollout_ref.rollout.enable_prefix_caching:
        rule = "the samples of a group would be kept together for a cache that is not there"
        raise ConfigError(
            f"{_ROLLOUT}.enable_prefix_caching", False, rule, "Set it to True, or rlhfless/prefix_dedup=off."
        )


def _check_nodes(config: DictConfig, settings: RlhflessConfig) -> None:
    """Refuse replicas over several nodes where a node's size is known: a trainer over several takes whole ones."""
    tp, trainer = config.actor_rollout_ref.rollout.tensor_model_parallel_size, config.trainer
    if tp > trainer.n_gpus_per_node and (trainer.nnodes > 1 or not settings.is_elastic):
        rule = f"a node has {trainer.n_gpus_per_node} GPUs, and a replica over several nodes is not supported"
        action = f"Lower it to at most {trainer.n_gpus_per_node}, or use +rlhfless=off."
        raise ConfigError(f"{_ROLLOUT}.tensor_model_parallel_size", tp, rule, action)


def _check_legacy_reward(config: DictConfig) -> None:
    """Refuse reward keys of older recipes if the installed verl composes and then never reads them."""
    if _reads_legacy_reward():
        return
    for section in _LEGACY:
        for key, value in _set_leaves(OmegaConf.select(config, section) or {}):
            rule = "an older verl's key, which the installed one never reads: the reward would be another one"
            action = f"Set reward.{_successor(section, key)} instead."
            raise ConfigError(f"{section}.{key}", value, rule, action)


def _set_leaves(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in section.items():
        is_section = isinstance(value, Mapping)
        leaves += _set_leaves(value, f"{prefix}{key}.") if is_section else [(f"{prefix}{key}", value)]
    return [(key, value) for key, value in leaves if value is not None]


def _successor(section: str, key: str) -> str:
    """Return what a key of an older recipe is called below ``reward`` (verl's ``migrate_legacy_reward_impl``)."""
    if section != "reward_model":
        return f"{section}.{key}"
    moved = {
        "num_workers": "num_workers",
        "reward_manager": "reward_manager.name",
        "model.path": "reward_model.model_path",
    }
    return moved.get(key, key if key.startswith("reward_kwargs") else f"reward_model.{key}")


def _reads_legacy_reward() -> bool:
    spec = importlib.util.find_spec(_ENTRY)
    return spec is None or spec.origin is None or "migrate_legacy_reward" in Path(spec.origin).read_text("utf-8")
