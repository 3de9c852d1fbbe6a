"""Whether the trainer may leave its devices in a run at all: the one place that knows what works on them meanwhile."""

from __future__ import annotations

import logging

from omegaconf import DictConfig

from verl_rlhfless.config import LEAVING_STRATEGIES
from verl_rlhfless.live.fusion_check import has_critic

logger = logging.getLogger(__name__)

_SAVED = "fsdp2"  # its shards can be read on the host


def why_lease_is_kept(config: DictConfig, suspend_trainer: str) -> str:
    """Return why the trainer never leaves its devices in this run; empty when it may.

    Args:
        config: verl's configuration.
        suspend_trainer: ``rlhfless.pool.suspend_trainer``.
    """
    strategies = {config.actor_rollout_ref.actor.strategy}
    if has_critic(config):
        strategies.add(config.critic.strategy)
    reasons = {
        "rlhfless.pool.suspend_trainer=never": suspend_trainer == "never",
        "only FSDP's state is known to leave its device and come back": not strategies <= LEAVING_STRATEGIES,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def tell_what_is_not_saved(config: DictConfig) -> None:
    """Warn of engines whose state is lost when the trainer, off its GPUs, does not regain them."""
    strategies = {"actor_rollout_ref.actor.strategy": config.actor_rollout_ref.actor.strategy}
    if has_critic(config):
        strategies["critic.strategy"] = config.critic.strategy
    unsaved = [key for key, strategy in strategies.items() if strategy != _SAVED]
    if unsaved and config.trainer.device != "cpu":
        logger.warning(
            "rlhfless: if the trainer's GPUs do not come back after a rollout, the run ends without a new checkpoint: "
            "state of %s can't be saved without its GPU. Set %s, or rlhfless.pool.suspend_trainer=never.",
            " and ".join(f"{key}={strategies[key]}" for key in unsaved),
            " and ".join(f"{key}={_SAVED}" for key in unsaved),
        )
