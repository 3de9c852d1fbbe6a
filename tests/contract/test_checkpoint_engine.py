"""Weights go through verl's own worker calls, in order, under their version: verl's colocated engine and our store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngineRegistry, CheckpointEngineWorker
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.rollout.utils import ensure_async_iterator

from tests.integration.conftest import Cluster
from verl_rlhfless.config import WeightsConfig
from verl_rlhfless.live import weight_engine
from verl_rlhfless.live.weight_store import create_store

WEIGHTS = [(f"layer{index}.weight", torch.full((4, 3), float(index))) for index in range(5)]


class Rollout:
    """verl's server adapter: what it is given."""

    version: int | None = None

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        self.version = global_steps
        self.weights = [(name, tensor.clone()) async for name, tensor in ensure_async_iterator(weights)]


@pytest.fixture(params=["naive", weight_engine.BACKEND])
def engine(request: pytest.FixtureRequest, ray_cluster: Cluster) -> Iterator[Any]:
    """One engine that is both ends, as colocated workers are."""
    if request.param == "naive":
        yield CheckpointEngineRegistry.new("naive", bucket_size=1, is_master=True)
        return
    name = f"contract-{request.node.name}"  # Ray keeps a killed actor's name for a while
    store = create_store(name, WeightsConfig(name="store", bucket_mib=1))
    yield CheckpointEngineRegistry.new(
        weight_engine.BACKEND, bucket_size=1, is_master=True, store_name=name, bucket_mib=1, timeout_s=30.0
    )
    ray.kill(store)


def send(engine: Any, version: int) -> None:
    """Do what a trainer's worker does with ``update_weights``; a colocated engine has no part in that."""
    if not isinstance(engine, weight_engine.StoreCheckpointEngine):
        engine.send_weights(iter(WEIGHTS), global_steps=version)
        return
    worker = ActorRolloutRefWorker.__new__(ActorRolloutRefWorker)
    worker.config = SimpleNamespace(
        rollout=SimpleNamespace(checkpoint_engine=SimpleNamespace(backend=weight_engine.BACKEND))
    )
    worker.actor = SimpleNamespace(engine=SimpleNamespace(get_per_tensor_param=lambda: (iter(WEIGHTS), None)))
    worker.checkpoint_engine = engine

    async def run() -> None:
        sent: Callable[..., Any] = ActorRolloutRefWorker.update_weights.__wrapped__
        await sent(worker, global_steps=version, mode="auto")

    asyncio.run(run())


def receive(engine: Any, version: int) -> Rollout:
    """Do what a rollout's worker does with ``update_weights``."""
    worker = CheckpointEngineWorker.__new__(CheckpointEngineWorker)
    worker.checkpoint_engine, worker.server_adapter = engine, Rollout()
    received: Callable[..., Any] = CheckpointEngineWorker.update_weights.__wrapped__
    asyncio.run(received(worker, global_steps=version))
    return worker.server_adapter  # type: ignore[no-any-return]


def test_what_is_sent_is_received_in_order_under_its_version(engine: Any) -> None:
    send(engine, 17)
    rollout = receive(engine, 17)
    assert rollout.version == 17
    assert [name for name, _ in rollout.weights] == [name for name, _ in WEIGHTS]
    for (_, received), (_, sent) in zip(rollout.weights, WEIGHTS, strict=True):
        assert torch.equal(received, sent)


def test_the_next_version_replaces_the_one_before(engine: Any) -> None:
    for version in (1, 2, 3):
        send(engine, version)
        assert receive(engine, version).version == version
