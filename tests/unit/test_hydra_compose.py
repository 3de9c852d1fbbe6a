"""``+rlhfless=...`` composes with verl's own recipe, without a search path, and changes nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from verl_rlhfless.config import FusionConfig, PlannerConfig, RlhflessConfig, parse_config

REQUESTS = {
    "predictor": "history",
    "dispatcher": "length_bucket",
    "prefix_dedup": "on",
    "migration": "cut_and_migrate",
}
CALLBACK = {"rlhfless": {"_target_": "verl_rlhfless.live.startup.StartupCheck"}}


def compose_ppo(*overrides: str, name: str = "ppo_trainer", with_hydra: bool = False) -> DictConfig:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(name, overrides=list(overrides), return_hydra_config=with_hydra)


def read(config: DictConfig) -> RlhflessConfig:
    return parse_config(OmegaConf.to_container(config.rlhfless, resolve=True))


def plain(config: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(config)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


@pytest.mark.parametrize("name", ["ppo_trainer", "ppo_megatron_trainer.yaml"])
def test_default_switches_the_elastic_trainer_on(name: str) -> None:
    config = compose_ppo("+rlhfless=default", name=name)
    assert config.trainer.v1.trainer_mode == "rlhfless_sync"
    parts = {"pool": "elastic", "weights": "store", "planner": "cost_aware", **REQUESTS, "fusion": "on"}
    assert read(config).active() == parts


def test_default_changes_only_the_mode_and_our_own_keys() -> None:
    stock, ours = plain(compose_ppo()), plain(compose_ppo("+rlhfless=default"))
    del ours["rlhfless"]
    assert ours["trainer"]["v1"].pop("trainer_mode") == "rlhfless_sync"
    assert stock["trainer"]["v1"].pop("trainer_mode") == "sync"
    assert ours == stock


def test_off_is_stock_below_our_own_key_and_hydras() -> None:
    stock, ours = plain(compose_ppo()), plain(compose_ppo("+rlhfless=off"))
    assert parse_config(ours.pop("rlhfless")) == RlhflessConfig()
    assert ours == stock


@pytest.mark.parametrize("choice", ["default", "off"])
def test_the_start_up_check_is_the_only_change_of_hydras_node(choice: str) -> None:
    stock = plain(compose_ppo(with_hydra=True).hydra)
    ours = plain(compose_ppo(f"+rlhfless={choice}", with_hydra=True).hydra)
    for values in (stock, ours):
        del values["overrides"], values["job"]["override_dirname"], values["runtime"]["choices"]
    assert stock.pop("callbacks") == {}
    assert ours.pop("callbacks") == CALLBACK
    assert ours == stock


def test_the_values_of_the_groups_are_those_of_the_schema() -> None:
    elastic = compose_ppo("+rlhfless=default").rlhfless
    parts = {"pool": "elastic", "weights": "store", "planner": "cost_aware", **REQUESTS, "fusion": "on"}
    values = {part: {"name": name} for part, name in parts.items()}
    schema = parse_config({**values, "pool": {"name": "elastic", "suspend_trainer": "auto"}})
    assert read(compose_ppo("+rlhfless=default")) == schema
    for section, values in elastic.items():
        assert set(values) == set(type(getattr(schema, section)).__dataclass_fields__) - {"KEY"}, section


def test_a_group_and_its_values_are_chosen_with_plain_overrides() -> None:
    config = compose_ppo("+rlhfless=default", "rlhfless/planner=fixed", "rlhfless.planner.schedule=[1,2,1,2]")
    assert read(config).planner.schedule == (1, 2, 1, 2)


def test_a_planned_fleet_is_chosen_like_any_part_and_its_limits_are_plain_overrides() -> None:
    prices = ["rlhfless.planner.max_usd_per_step=2", "rlhfless.planner.usd_per_gpu_hour=3.5"]
    config = compose_ppo("+rlhfless=default", "rlhfless/planner=cost_aware", *prices)
    assert set(config.rlhfless.planner) == set(PlannerConfig.__dataclass_fields__) - {"KEY"}
    planner = read(config).planner
    assert planner == PlannerConfig("cost_aware", max_usd_per_step=2.0, usd_per_gpu_hour=3.5)


def test_fusion_is_switched_off_with_one_override() -> None:
    default = read(compose_ppo("+rlhfless=default"))
    unfused = read(compose_ppo("+rlhfless=default", "rlhfless/fusion=off"))
    assert unfused == dataclasses.replace(default, fusion=FusionConfig(name="off"))


def test_every_part_can_be_switched_alone() -> None:
    config = compose_ppo("+rlhfless=off", "rlhfless/planner=fixed", "rlhfless.replay.trace=lengths.jsonl")
    assert config.rlhfless.planner.name == "fixed"
    assert config.rlhfless.pool.name == "off"
    assert config.rlhfless.replay.trace == "lengths.jsonl"


def test_resident_keeps_verls_replicas_and_switches_the_request_parts_on() -> None:
    config = compose_ppo("+rlhfless=resident")
    assert config.trainer.v1.trainer_mode == "rlhfless_sync"
    assert read(config).active() == {"pool": "resident", **REQUESTS}


REQUEST_PARTS = [
    f"{part}={name}"
    for part, names in {
        "predictor": "off history",
        "dispatcher": "stock length_bucket random",
        "prefix_dedup": "off on",
        "migration": "off cut_and_migrate rlhfuse rlhfless",
    }.items()
    for name in names.split()
]


@pytest.mark.parametrize("choice", REQUEST_PARTS)
def test_every_request_part_composes_and_has_all_its_keys(choice: str) -> None:
    part, name = choice.split("=")
    values = compose_ppo("+rlhfless=resident", f"rlhfless/{choice}").rlhfless
    section = getattr(parse_config(OmegaConf.to_container(values)), part)
    assert section.name == name
    assert set(values[part]) == set(type(section).__dataclass_fields__) - {"KEY"}


def test_a_later_override_of_the_trainer_mode_wins_in_hydra() -> None:
    assert compose_ppo("+rlhfless=default", "trainer.v1.trainer_mode=sync").trainer.v1.trainer_mode == "sync"


@pytest.mark.parametrize("override", ["rlhfless/planner=magic", "rlhfless.pool.max_gpu=4"])
def test_unknown_names_and_keys_are_refused(override: str) -> None:
    with pytest.raises(HydraException, match=r"planner/magic|max_gpu"):
        compose_ppo("+rlhfless=default", override)
