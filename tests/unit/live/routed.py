"""The settings of a run's router, for tests without a recipe, and a worker's calls of a router, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from verl_rlhfless.config import parse_config
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.live.router import Router
from verl_rlhfless.live.routing_settings import RoutingSettings
from verl_rlhfless.live.tickets import Delivery, Grant, Message, Refusal
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


@dataclass
class News:
    """What one call brought."""

    grants: list[Grant] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    servers: dict[str, Any] = field(default_factory=dict)


class Letters:
    """The correspondence of the worker "w" with a router that is always in reach."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._num_sent = self._num_received = 0

    async def send(self, messages: Sequence[Message]) -> News:
        self._num_sent += 1
        return self._read(await self._router.send("w", self._num_received, self._num_sent, messages))

    async def more(self, timeout_s: float = 5.0) -> News:
        return self._read(await self._router.grants("w", self._num_received, timeout_s))

    def _read(self, delivery: Delivery) -> News:
        news = News()
        for item, server in delivery.items[self._num_received - delivery.first :]:
            self._num_received += 1
            if isinstance(item, Refusal):
                news.refusals.append(item)
            else:
                news.grants.append(item)
                news.servers[item.server] = server
        return news
