from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import pytest

from verl_rlhfless.config import PoolConfig, RlhflessConfig, parse_config
from verl_rlhfless.errors import ConfigError

ELASTIC = {"pool": {"name": "elastic"}, "weights": {"name": "store"}, "planner": {"name": "fixed"}}

PARTS = {"predictor": "history", "dispatcher": "length_bucket", "prefix_dedup": "on", "migration": "cut_and_migrate"}

BAD = [
    # what is given, key of the error, part of the rule, part of what to do
    ("elastic", "rlhfless", "group of keys", "rlhfless=NAME"),
    ({"pool": "elastic"}, "rlhfless.pool", "group of keys", "rlhfless/pool=NAME"),
    ({"plannr": {}}, "rlhfless.plannr", "not a known key", "Did you mean rlhfless.planner?"),
    ({"pool": {"max_gpu": 4}}, "rlhfless.pool.max_gpu", "not a known key", "Did you mean rlhfless.pool.max_gpus?"),
    ({"pool": {"zzz": 4}}, "rlhfless.pool.zzz", "not a known key", "Known keys: name, max_gpus"),
    ({"pool": {"name": "elastik"}}, "rlhfless.pool.name", "one of off, elastic, resident", "Did you mean elastic?"),
    ({"pool": {"name": None}}, "rlhfless.pool.name", "a string", "rlhfless.pool.name"),
    ({"pool": {"max_gpus": 0}}, "rlhfless.pool.max_gpus", ">= 1", "rlhfless.pool.max_gpus=1"),
    ({"pool": {"max_gpus": 2.5}}, "rlhfless.pool.max_gpus", "an integer", "rlhfless.pool.max_gpus"),
    ({"pool": {"max_gpus": True}}, "rlhfless.pool.max_gpus", "an integer", "rlhfless.pool.max_gpus"),
    ({"pool": {"max_gpus": "4"}}, "rlhfless.pool.max_gpus", "an integer", "rlhfless.pool.max_gpus"),
    ({"pool": {"grant_timeout_s": math.inf}}, "rlhfless.pool.grant_timeout_s", "finite", "=300"),
    ({"pool": {"drain_timeout_s": math.nan}}, "rlhfless.pool.drain_timeout_s", "finite", "=60"),
    ({"pool": {"resume_timeout_s": -1}}, "rlhfless.pool.resume_timeout_s", ">= 0.1", "=600"),
    ({"pool": {"park": "sometimes"}}, "rlhfless.pool.park", "one of auto, always, never", "rlhfless.pool.park"),
    ({"pool": {"park_residual_bytes": -1}}, "rlhfless.pool.park_residual_bytes", ">= 0", "=0"),
    ({"weights": {"name": "nccl"}}, "rlhfless.weights.name", "one of off, store", "rlhfless.weights.name"),
    ({"weights": {"bucket_mib": 2048}}, "rlhfless.weights.bucket_mib", "1 .. 1024", "=256"),
    ({"weights": {"max_versions": 3}}, "rlhfless.weights.max_versions", "1 .. 2", "=2"),
    ({"planner": {"name": "fixd"}}, "rlhfless.planner.name", "one of off, fixed", "Did you mean fixed?"),
    ({"planner": {"schedule": []}}, "rlhfless.planner.schedule", "not be empty", "[1,2]"),
    ({"planner": {"schedule": [1, 0]}}, "rlhfless.planner.schedule", "0 is not", "[1,2,1,2]"),
    ({"planner": {"schedule": [1, 2.5]}}, "rlhfless.planner.schedule", "2.5 is not", "[1,2,1,2]"),
    ({"planner": {"schedule": [True]}}, "rlhfless.planner.schedule", "True is not", "[1,2,1,2]"),
    ({"planner": {"schedule": ["two"]}}, "rlhfless.planner.schedule", "'two' is not", "[1,2,1,2]"),
    ({"planner": {"schedule": 2}}, "rlhfless.planner.schedule", "a list", "[1,2,1,2]"),
    ({"planner": {"schedule": "1,2"}}, "rlhfless.planner.schedule", "a list", "[1,2,1,2]"),
    ({"planner": {"name": "cost_awar"}}, "rlhfless.planner.name", "one of off, fixed, cost_aware", "Did you mean cost"),
    ({"planner": {"cost_weight": 1.5}}, "rlhfless.planner.cost_weight", "0 .. 1", "=0.5"),
    ({"planner": {"max_step_s": 0}}, "rlhfless.planner.max_step_s", ">= 0.001", "rlhfless.planner.max_step_s"),
    (
        {"planner": {"max_usd_per_step": 1.0}},
        "rlhfless.planner.max_usd_per_step",
        "price of a GPU",
        "usd_per_gpu_hour=",
    ),
    ({"planner": {"name": "fixed", "max_step_s": 9.0}}, "rlhfless.planner.max_step_s", "plans none", "=cost_aware"),
    (
        {"planner": {"min_replicas": 3, "max_replicas": 2}},
        "rlhfless.planner.min_replicas",
        "at most rlhfless.planner.max_replicas=2",
        "Correct one",
    ),
    ({"planner": {"tensor_parallel_sizes": []}}, "rlhfless.planner.tensor_parallel_sizes", "not be empty", "[1,2]"),
    ({"planner": {"tensor_parallel_sizes": [0]}}, "rlhfless.planner.tensor_parallel_sizes", "0 is not", "[1,2]"),
    ({"planner": {"tensor_parallel_sizes": 2}}, "rlhfless.planner.tensor_parallel_sizes", "a list", "[1,2,1,2]"),
    (
        {**ELASTIC, "planner": {"name": "cost_aware"}},
        "rlhfless.planner.name",
        "plans from predicted lengths",
        "predictor=history",
    ),
    ({"replay": {"scale": 0}}, "rlhfless.replay.scale", "0.001 .. 1000", "=1"),
    ({"replay": {"trace": 7}}, "rlhfless.replay.trace", "a string", "rlhfless.replay.trace"),
    *[
        ({stage: {"name": "magic"}}, f"rlhfless.{stage}.name", "one of off", f"rlhfless.{stage}.name")
        for stage in ("predictor", "prefix_dedup", "migration", "fusion")
    ],
    ({"dispatcher": {"name": "length"}}, "rlhfless.dispatcher.name", "one of stock", "Did you mean length_bucket?"),
    ({"dispatcher": {"seed": -1}}, "rlhfless.dispatcher.seed", "0 .. 2.14748e+09", "rlhfless.dispatcher.seed"),
    ({"migration": {"tau": 1.5}}, "rlhfless.migration.tau", "0 .. 1", "=0.8"),
    ({"migration": {"progress_interval_s": 0}}, "rlhfless.migration.progress_interval_s", "0.01 .. 60", "=0.5"),
    ({"migration": {"max_retries": -1}}, "rlhfless.migration.max_retries", "0 .. 100", "=3"),
    ({"migration": {"max_retries": 1.5}}, "rlhfless.migration.max_retries", "an integer", "an integer"),
    ({"prefix_dedup": {"training": "on"}}, "rlhfless.prefix_dedup.training", "one of off, prefix_grouper", ""),
    *[
        ({part: {"name": name}}, f"rlhfless.{part}.name", "needs our router", "rlhfless/pool=resident")
        for part, name in PARTS.items()
    ],
    ({**ELASTIC, "predictor": {"name": "oracle"}}, "rlhfless.predictor.name", "replayed trace", "replay.trace=FILE"),
    ({**ELASTIC, "pool": {"name": "resident"}}, "rlhfless.weights.name", "verl's own replicas", "rlhfless/weights=off"),
    ({**ELASTIC, "weights": {}}, "rlhfless.weights.name", "only together", "+rlhfless=default"),
    ({"fusion": {"name": "on"}}, "rlhfless.fusion.name", "stock verl", "rlhfless/pool=elastic"),
    (
        {"pool": {"name": "resident"}, "fusion": {"name": "on"}},
        "rlhfless.fusion.name",
        "a replica on every trainer GPU",
        "rlhfless/fusion=off",
    ),
    ({**ELASTIC, "fusion": {"end_timeout_s": 0}}, "rlhfless.fusion.end_timeout_s", ">= 0.1", "=600"),
    ({"planner": {"name": "fixed"}}, "rlhfless.pool.name", "rlhfless.planner.name=fixed", "+rlhfless=off"),
]


@pytest.mark.parametrize(("values", "key", "rule", "action"), BAD, ids=[f"{n}-{bad[1]}" for n, bad in enumerate(BAD)])
def test_bad_input_names_key_value_rule_and_action(values: Any, key: str, rule: str, action: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    assert caught.value.key == key
    assert rule in caught.value.rule
    assert action in caught.value.action
    message = str(caught.value)
    assert message.startswith(f"{key}={caught.value.value!r}: ")
    assert "\n" not in message


def test_the_error_reports_the_value_that_was_given() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"planner": {"schedule": [1, 0]}})
    assert caught.value.value == [1, 0]


def test_a_config_error_survives_pickling() -> None:
    error = ConfigError("a.b", 3, "must be 4", "Set it.")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.key, copy.value) == (str(error), "a.b", 3)


@pytest.mark.parametrize("values", [None, {}, {"pool": {}}])
def test_nothing_configured_is_all_off(values: Any) -> None:
    config = parse_config(values)
    assert config == RlhflessConfig()
    assert not config.is_elastic
    assert config.active() == {}


def test_an_elastic_run_is_read_as_given() -> None:
    config = parse_config(
        {
            **ELASTIC,
            "planner": {"name": "fixed", "schedule": [1, 2, 1, 2]},
            "pool": {"name": "elastic", "max_gpus": 4, "grant_timeout_s": 5},
        }
    )
    assert config.is_elastic
    assert config.pool.max_gpus == 4
    assert config.pool.grant_timeout_s == 5.0
    assert config.planner.schedule == (1, 2, 1, 2)
    assert config.active() == {"pool": "elastic", "weights": "store", "planner": "fixed"}


def test_replay_and_instrument_count_as_active() -> None:
    config = parse_config({"replay": {"trace": "lengths.jsonl"}, "instrument": {"pace": "h100.json"}})
    assert config.active() == {"replay": "lengths.jsonl", "pace": "h100.json"}


def test_a_bare_yaml_off_means_off() -> None:
    assert parse_config({"fusion": {"name": False}}).fusion.name == "off"


def test_fusion_goes_with_an_elastic_pool() -> None:
    assert parse_config({**ELASTIC, "fusion": {"name": "on"}}).active()["fusion"] == "on"


def test_a_bare_yaml_on_means_on() -> None:
    assert parse_config({**ELASTIC, "prefix_dedup": {"name": True}}).prefix_dedup.name == "on"


@pytest.mark.parametrize("pool", [ELASTIC, {"pool": {"name": "resident"}}], ids=["elastic", "resident"])
def test_every_request_part_works_alone_and_with_the_others_on_either_pool(pool: dict[str, Any]) -> None:
    for part, name in PARTS.items():
        assert part in parse_config({**pool, part: {"name": name}}).active()
    assert set(PARTS) <= set(parse_config({**pool, **{part: {"name": name} for part, name in PARTS.items()}}).active())


def test_rules_hold_for_values_built_in_code_too() -> None:
    with pytest.raises(ConfigError, match=r"rlhfless\.pool\.start_timeout_s=0"):
        dataclasses.replace(PoolConfig(), start_timeout_s=0)
