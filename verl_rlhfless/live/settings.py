"""The plugin's configuration, read from the configuration of a run of verl."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from verl_rlhfless.config import RlhflessConfig, parse_config


def settings_of(config: DictConfig) -> RlhflessConfig:
    """Return the checked section ``rlhfless`` of ``verl.trainer.main_ppo``'s configuration; all off where it has none.

    Raises:
        ConfigError: The section breaks a rule.
    """
    section = OmegaConf.select(config, "rlhfless")
    return parse_config(OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section)
