"""The settings of a run's router, for tests without a recipe."""

from __future__ import annotations

from typing import Any

from verl_rlhfless.config import parse_config
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.live.routing import RoutingSettings
from verl_rlhfless.policy.perf import EngineLimits

PARTS = {"predictor": "history", "dispatcher": "length_bucket", "prefix_dedup": "on", "migration": "cut_and_migrate"}
_POOLS: dict[str, dict[str, Any]] = {
    "resident": {"pool": {"name": "resident"}},
    "elastic": {"pool": {"name": "elastic"}, "weights": {"name": "store"}, "planner": {"name": "fixed"}},
}


_MODEL = {
    "num_attention_heads": 4, "hidden_size": 128, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 256, "vocab_size": 512,
}  # fmt: skip
_PACE = PaceModel(60.0, 2.0, 0.1, tp_speedup={2: 1.6})


def settings(pool: str, planner: dict[str, Any] | None = None, **parts: str) -> RoutingSettings:
    """Return those of a model of four heads on paced GPUs: replicas of one GPU, four to lease together."""
    chosen = {section: {"name": name} for section, name in {**PARTS, **parts}.items()}
    config = parse_config({**_POOLS[pool], **({"planner": planner} if planner else {}), **chosen})
    return RoutingSettings(config, 1, 4, EngineLimits(8, 8192), 100, _MODEL, _PACE, (), 2, 4)
