"""Refuses recipes whose inference can't begin during the rollout, before anything starts."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from verl_rlhfless.errors import ConfigError

_OFF = "or rlhfless/fusion=off."


def check_fusion(config: DictConfig) -> None:
    """Check that finished samples stay in the batch, and that there is something to infer.

    Raises:
        ConfigError: A finished sample may be thrown away, or the recipe has no forward-only phase.
    """
    if OmegaConf.select(config, "algorithm.filter_groups.enable"):
        rule = "groups are thrown away after they finish, so their samples may vanish during inference"
        raise ConfigError("algorithm.filter_groups.enable", True, rule, f"Set it to False, {_OFF}")
    key = "trainer.v1.sampler.custom_sampler.name"
    if sampler := OmegaConf.select(config, key):
        raise ConfigError(key, sampler, "a custom sampler may throw finished samples away", f"Remove it, {_OFF}")
    key = f"actor_rollout_ref.actor.{config.actor_rollout_ref.actor.strategy}.router_replay.mode"
    if (mode := OmegaConf.select(config, key) or "disabled") != "disabled":
        raise ConfigError(key, mode, "recorded routes are not kept per chunk", f"Set it to disabled, {_OFF}")
    key = "algorithm.rollout_correction.bypass_mode"
    if OmegaConf.select(config, key) and not _has_reference(config) and not has_critic(config):
        rule = "old log-probs are the rollout's own and there is neither reference nor critic: nothing to infer"
        raise ConfigError(key, True, rule, f"Set it to False, {_OFF}")


def has_critic(config: DictConfig) -> bool:
    """Return whether verl trains a critic."""
    enabled = config.critic.enable
    return bool(config.algorithm.adv_estimator == "gae" if enabled is None else enabled)


def _has_reference(config: DictConfig) -> bool:
    return bool(config.algorithm.use_kl_in_reward or config.actor_rollout_ref.actor.use_kl_loss)
