"""Checks a run in the launching process, before Ray starts: bad input ends it with one line and nothing left behind.

The Hydra groups ``default`` and ``off`` register ``StartupCheck`` as a callback. Hydra turns exceptions of callbacks
into warnings, therefore a failed check leaves through ``SystemExit``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from verl_rlhfless.config import TRAINER_MODE, RlhflessConfig
from verl_rlhfless.errors import ConfigError, LeaseLostError, RlhflessError, UnsupportedError
from verl_rlhfless.live.budget import Demand, other_pools
from verl_rlhfless.live.fusion_check import check_fusion
from verl_rlhfless.live.instrument import instrument_environment
from verl_rlhfless.live.model_check import check_model_at_hand
from verl_rlhfless.live.recipe_check import (
    check_adapters_are_merged,
    check_data_files,
    check_entry,
    check_recipe,
    tell_what_has_no_effect,
)
from verl_rlhfless.live.replay import check_replay
from verl_rlhfless.live.seams import check_estimator, check_prefix_grouper, check_seams
from verl_rlhfless.live.settings import settings_of
from verl_rlhfless.live.suspendable import tell_what_is_not_saved, why_lease_is_kept
from verl_rlhfless.live.variables import CHECK_ONLY_VARIABLE
from verl_rlhfless.versions import REQUIREMENTS, check_requirement

PLUGIN_NAME = "rlhfless"
"""Name of our entry point in the group ``verl.plugins``."""

_MODE_KEY = "trainer.v1.trainer_mode"
_ROLLOUT = "actor_rollout_ref.rollout"
_STRATEGIES = ("fsdp", "fsdp2", "megatron")
_POLICY_KEY = "VERL_USE_EXTERNAL_PLUGINS"


class StartupCheck(Callback):
    """Hydra callback that checks the composed configuration and prints what is active."""

    def on_job_start(self, config: DictConfig, *, task_function: Callable[..., Any] | None = None, **_: Any) -> None:
        """Check ``config``; print one line and exit with 1 if it can't work."""
        try:
            print(f"rlhfless: {check_run(config, os.environ, task_function)}", flush=True)
            os.environ.update(instrument_environment(settings_of(config).instrument))
            if os.environ.get(CHECK_ONLY_VARIABLE):
                raise SystemExit(0)
        except Exception as error:  # whatever it is, Hydra would print a warning and start the run unchecked
            text = str(error) if isinstance(error, RlhflessError) else f"{type(error).__name__}: {error}"
            print(f"rlhfless: error: {' '.join(text.split())}", file=sys.stderr, flush=True)
            raise SystemExit(1) from error

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """End a run that lost the trainer's GPUs with one line and an exit code of its own: it may be tried again."""
        error = job_return._return_value  # the property raises what the run raised
        if isinstance(error, LeaseLostError):
            text = str(getattr(error, "cause", error))  # in Ray's error, which came from another process
            print(f"rlhfless: error: {' '.join(text.split())}", file=sys.stderr, flush=True)
            raise SystemExit(LeaseLostError.EXIT_CODE) from error


def check_run(config: DictConfig, environ: Mapping[str, str], task: Callable[..., Any] | None = None) -> str:
    """Return the start-up line: what is active, on which versions.

    Args:
        config: The composed configuration of ``verl.trainer.main_ppo``.
        environ: The process environment.
        task: The function that Hydra is about to call, if it is known.

    Raises:
        RlhflessError: The configuration is invalid, unsupported, or can't become active.
    """
    settings = settings_of(config)
    check_trainer_mode(config, settings)
    active = settings.active()
    if not active:
        return "all plugins are off: stock verl"
    check_plugin_policy(environ)
    versions = [f"{item.distribution} {check_requirement(item)}" for item in REQUIREMENTS]
    load_plugin()
    if settings.has_own_rollout:
        if task is not None:
            check_entry(task)
        check_backend(config)
        check_rollout(config, settings)
        check_recipe(config, settings)
        check_model_at_hand(config, settings)
    if settings.is_elastic:
        check_elastic(config, settings)
        check_parking(config, settings)
        check_budget(config, settings, environ)
        if not why_lease_is_kept(config, settings.pool.suspend_trainer):
            tell_what_is_not_saved(config)
        tell_what_has_no_effect(config)
    if settings.fusion.name == "on":
        check_fusion(config)
    check_data_files(config)
    instrument_environment(settings.instrument)
    if settings.replay.trace is not None:
        _check_replay(config, settings.replay.trace, environ)
    if settings.has_own_rollout:  # last, since it imports verl's trainer
        check_seams()
        check_estimator(config.algorithm.adv_estimator)
        _check_trainer_registered()
    return f"active: {_describe(active, settings)} ({', '.join(versions)})"


def check_trainer_mode(config: DictConfig, settings: RlhflessConfig) -> None:
    """Check that the trainer mode and the pool are both ours or both verl's."""
    mode = OmegaConf.select(config, _MODE_KEY)
    if settings.has_own_rollout and mode != TRAINER_MODE:
        given = [item for item in _task_overrides(config) if item.lstrip("+").startswith(f"{_MODE_KEY}=")]
        source = f"the override {given[-1]!r}" if given else "a configuration file after the group"
        raise ConfigError(
            _MODE_KEY,
            mode,
            f"must be {TRAINER_MODE} while rlhfless.pool.name={settings.pool.name}, but {source} replaced it",
            f"Remove it, or append {_MODE_KEY}={TRAINER_MODE} as the last override.",
        )
    if mode == TRAINER_MODE and not settings.has_own_rollout:
        raise ConfigError(
            _MODE_KEY,
            mode,
            "needs our rollout, and rlhfless.pool.name is off",
            f"Use +rlhfless=default or +rlhfless=resident, or {_MODE_KEY}=sync for stock verl.",
        )


def check_plugin_policy(environ: Mapping[str, str]) -> None:
    """Check that verl is allowed to load our entry point."""
    policy = environ.get(_POLICY_KEY, "auto")
    allowed = [name.strip() for name in policy.strip().lower().split(",")]
    if allowed != ["auto"] and PLUGIN_NAME not in allowed:
        raise ConfigError(
            _POLICY_KEY,
            policy,
            "keeps verl from loading the plugin: it is configured but not active",
            f"Unset {_POLICY_KEY}, add {PLUGIN_NAME} to it, or use +rlhfless=off.",
        )


def check_backend(config: DictConfig) -> None:
    """Refuse what our rollout can't do: the v0 trainer, other engines, disaggregation."""
    if not config.trainer.use_v1:
        raise ConfigError("trainer.use_v1", False, "the v0 trainer is not supported", "Set trainer.use_v1=True.")
    rollout = config.actor_rollout_ref.rollout
    engine = OmegaConf.select(rollout, "name")
    if engine != "vllm":
        rule = "our rollout needs vllm; sglang, trtllm and others are not supported"
        raise ConfigError(f"{_ROLLOUT}.name", engine, rule, f"Set {_ROLLOUT}.name=vllm, or use +rlhfless=off.")
    if OmegaConf.select(rollout, "disaggregation.enabled"):
        rule = "prefill / decode disaggregation is not supported by our rollout"
        raise ConfigError(f"{_ROLLOUT}.disaggregation.enabled", True, rule, "Set it to False, or use +rlhfless=off.")


def check_rollout(config: DictConfig, settings: RlhflessConfig) -> None:
    """Refuse a recipe that brings its own router or rollout stage, or wants what our dispatcher can't promise."""
    rollout = config.actor_rollout_ref.rollout
    for key in ("router_config_path", "agent.agent_loop_manager_class"):
        value = OmegaConf.select(rollout, key)
        if value:
            rule = "a run of ours has its own router and rollout stage, and there can be one of each"
            raise ConfigError(f"{_ROLLOUT}.{key}", value, rule, "Remove it, or use +rlhfless=off.")
    if OmegaConf.select(rollout, "full_determinism") and not settings.is_placement_fixed:
        rule = "requests are placed by what is predicted and measured, so two runs are not alike"
        action = "Set rlhfless/dispatcher=stock and rlhfless/migration=off, or full_determinism=False."
        raise ConfigError(f"{_ROLLOUT}.full_determinism", True, rule, action)
    if settings.prefix_dedup.training == "prefix_grouper":
        check_prefix_grouper()


def check_elastic(config: DictConfig, settings: RlhflessConfig) -> None:
    """Refuse what leases can't do: weights of an engine nobody tried, adapters apart, other parallelism or tenants."""
    check_adapters_are_merged(config)
    reward = config.reward.reward_model
    if reward.enable and not reward.enable_resource_pool:
        rule = "a colocated reward model would stay on GPUs that the trainer gives back"
        action = (
            "Give it GPUs of its own (enable_resource_pool=True, nnodes, n_gpus_per_node), or use +rlhfless=resident."
        )
        raise ConfigError("reward.reward_model.enable_resource_pool", False, rule, action)
    strategy = config.actor_rollout_ref.actor.strategy
    if strategy not in _STRATEGIES:
        rule = f"elastic replicas get their weights from {', '.join(_STRATEGIES)} only"
        raise ConfigError("actor_rollout_ref.actor.strategy", strategy, rule, "Choose one, or use +rlhfless=resident.")
    if settings.plans and (size := config.actor_rollout_ref.rollout.expert_parallel_size) > 1:
        rule = "plans choose the size of a replica, and verl wants as many expert ranks as tensor ranks"
        raise ConfigError(f"{_ROLLOUT}.expert_parallel_size", size, rule, "Set it to 1, or rlhfless/planner=fixed.")


def check_parking(config: DictConfig, settings: RlhflessConfig) -> None:
    """Refuse to park engines always that can't free their device; ``auto`` ends them instead."""
    can_sleep = OmegaConf.select(config.actor_rollout_ref.rollout, "enable_sleep_mode", default=True)
    if settings.pool.park == "always" and not can_sleep and config.trainer.device != "cpu":
        rule = f"a parked engine frees its device by vLLM's sleep mode, and {_ROLLOUT}.enable_sleep_mode=False"
        raise ConfigError("rlhfless.pool.park", "always", rule, "Set enable_sleep_mode=True, or park=auto.")


def check_budget(config: DictConfig, settings: RlhflessConfig, environ: Mapping[str, str]) -> None:
    """Check that trainer and the fleet fit into ``max_gpus``, and with verl's other pools into a local cluster.

    The fleet is the largest scheduled one, or the smallest that may be planned.
    """
    ray_init = OmegaConf.select(config, "ray_kwargs.ray_init") or {}
    limits: dict[str, tuple[int | None, dict[str, int]]] = {"rlhfless.pool.max_gpus": (settings.pool.max_gpus, {})}
    if ray_init.get("address") is None and "RAY_ADDRESS" not in environ:
        limits["ray_kwargs.ray_init.num_gpus"] = ray_init.get("num_gpus"), other_pools(config)
    for key, (limit, others) in limits.items():
        demand = Demand.of_run(config, settings, others)
        if limit is not None and demand.total > limit:
            action = f"Raise it to {demand.total}, lower {demand.lowered_by}, or use +rlhfless=resident."
            raise ConfigError(key, limit, str(demand), action)


def _check_replay(config: DictConfig, trace: str, environ: Mapping[str, str]) -> None:
    if "RAY_ADDRESS" in environ and not Path(trace).is_absolute():
        rule = "must be an absolute path on a running Ray cluster, whose processes have another working directory"
        raise ConfigError("rlhfless.replay.trace", trace, rule, f"Write rlhfless.replay.trace={Path(trace).resolve()}.")
    check_replay(config)


def load_plugin() -> None:
    """Load our entry point; verl has done so already, but it hides why one fails."""
    found = entry_points(group="verl.plugins", name=PLUGIN_NAME)
    if not found:
        raise UnsupportedError(
            f"the entry point {PLUGIN_NAME!r} of group verl.plugins is missing: the plugin is configured but not "
            "active. Install the package with pip instead of putting its folder on PYTHONPATH."
        )
    for entry_point in found:
        try:
            entry_point.load()
        except Exception as error:
            raise UnsupportedError(
                f"the plugin {entry_point.value} can't be loaded: {type(error).__name__}: {error}. "
                "Run `rlhfless doctor`."
            ) from error


def _check_trainer_registered() -> None:
    from verl.trainer.ppo.v1.trainer_base import get_trainer_cls

    try:
        get_trainer_cls(TRAINER_MODE)
    except ValueError as error:
        raise UnsupportedError(f"{_MODE_KEY}={TRAINER_MODE!r}: {error} Run `rlhfless doctor`.") from error


def _task_overrides(config: DictConfig) -> Sequence[str]:
    return list(OmegaConf.select(config, "hydra.overrides.task") or [])


def _describe(active: Mapping[str, str], settings: RlhflessConfig) -> str:
    parts = [f"{section}={name}" for section, name in active.items()]
    if settings.is_elastic and not settings.plans:
        parts.append(f"schedule={list(settings.planner.schedule)}")
    return " ".join(parts)
