"""Checks the model of a recipe against plans and prices: where its configuration is at hand, before Ray starts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_rlhfless.config import RlhflessConfig
from verl_rlhfless.errors import ConfigError, DataError
from verl_rlhfless.live.sizes import legal_sizes
from verl_rlhfless.live.suspendable import why_lease_is_kept
from verl_rlhfless.policy.shapes import parse_model_config

_KEY = "actor_rollout_ref.model.path"
_MOST_GPUS = 1024  # of one replica, where the run sets no limit
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_model_at_hand(config: DictConfig, settings: RlhflessConfig) -> None:
    """Check the recipe's model if this machine has its configuration, else leave it to the trainer's set-up.

    So is a file that leaves out what its model type has by default: there transformers has completed it.

    Raises:
        ConfigError: Plans or prices need a shape that the model does not have, or it has not the sizes asked for.
        DataError: Its configuration is not JSON.
    """
    path = OmegaConf.select(config, _KEY)
    file = _config_file(path) if isinstance(path, str) else None
    if file is None:
        return
    try:
        model = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error}). Correct the model's configuration.") from error
    if _leaves_out(model):
        return
    check_shape(config, settings, model)
    if settings.plans:
        stays = bool(why_lease_is_kept(config, settings.pool.suspend_trainer))
        held = config.trainer.n_gpus_per_node * config.trainer.nnodes if stays else 0
        limit = settings.pool.max_gpus
        legal_sizes(settings.planner, model, _MOST_GPUS if limit is None else limit - held)


def check_shape(config: DictConfig, settings: RlhflessConfig, model: Mapping[str, Any]) -> None:
    """Check that a model has a shape if plans or prices need one.

    Args:
        config: The configuration of ``verl.trainer.main_ppo``.
        settings: The plugin's.
        model: The model's ``config.json``.

    Raises:
        ConfigError: It has none, such as some with multi-head latent attention.
    """
    has_declared_price = config.trainer.device == "cpu" or settings.instrument.pace is not None
    if not settings.plans and (has_declared_price or settings.is_placement_fixed):
        return
    try:
        parse_model_config(model, "the model's config.json")
    except (ConfigError, DataError) as error:
        planner = "rlhfless/planner=fixed, " if settings.plans else ""
        rule = f"its iterations have no price, by which requests are placed{' and fleets planned' if planner else ''}"
        action = f"Set {planner}rlhfless/dispatcher=stock and rlhfless/migration=off for this model. ({error})"
        raise ConfigError(_KEY, OmegaConf.select(config, _KEY), rule, action) from error


def _leaves_out(model: Mapping[str, Any]) -> bool:
    """Return whether a key of the shape is missing."""
    try:
        parse_model_config(model, "the model's config.json")
    except DataError:
        return True
    except ConfigError:
        pass  # a shape that is refused where it is needed
    return False


def _config_file(path: str) -> Path | None:
    """Return the ``config.json`` of a model in a folder, or of one that was downloaded before."""
    local = Path(path).expanduser() / "config.json"
    if local.is_file():
        return local
    if not _HUB_NAME.fullmatch(path):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json")
    return Path(cached) if isinstance(cached, str) else None
