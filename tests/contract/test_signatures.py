"""Whatever verl calls on a class that we subclass, our override takes; its tests and its callers name arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import pytest
import ray

pytest.importorskip("vllm", reason="verl's replica and server need vLLM")

from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.single_controller.ray.base import RayResourcePool, RayWorkerGroup, ResourcePoolManager
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.router import GlobalRequestLoadBalancer
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from verl_rlhfless.live.client import ElasticClient
from verl_rlhfless.live.pool import ElasticResourcePool, ElasticResourcePoolManager
from verl_rlhfless.live.replica import ElasticReplica
from verl_rlhfless.live.request_server import RequestServer
from verl_rlhfless.live.request_trainer import RequestTrainer
from verl_rlhfless.live.rollout_router import RolloutRouter
from verl_rlhfless.live.server import ElasticServer
from verl_rlhfless.live.stage import StageManager, StageWorker
from verl_rlhfless.live.trainer import ElasticTrainerSync
from verl_rlhfless.live.weight_engine import BACKEND, StoreCheckpointEngine
from verl_rlhfless.live.worker_group import ElasticWorkerGroup

PAIRS = [
    (PPOTrainerSync, RequestTrainer),
    (PPOTrainerSync, ElasticTrainerSync),
    (RayWorkerGroup, ElasticWorkerGroup),
    (RayResourcePool, ElasticResourcePool),
    (ResourcePoolManager, ElasticResourcePoolManager),
    (GlobalRequestLoadBalancer, RolloutRouter),
    (LLMServerClient, ElasticClient),
    (vLLMReplica, ElasticReplica),
    (vLLMHttpServer, RequestServer),
    (vLLMHttpServer, ElasticServer),
    (AgentLoopManagerTQ, StageManager),
    (AgentLoopWorkerTQ.__ray_metadata__.modified_class, StageWorker),
    (CheckpointEngine, StoreCheckpointEngine),
]


def _overrides(stock: type, ours: type) -> Iterator[str]:
    """Yield the methods of verl's class that ours, or a class of ours between the two, writes anew."""
    between = [cls for cls in ours.__mro__ if cls.__module__.startswith("verl_rlhfless")]
    for name in dir(stock):
        is_method = inspect.isroutine(getattr(stock, name)) and not name.startswith("__")
        if is_method and any(name in vars(cls) for cls in between):
            yield name


def _signature(method: Callable[..., object]) -> inspect.Signature:
    """Return the signature as written: `ray.remote` adds an argument for tracing to every method of its class."""
    signature = inspect.signature(method)
    return signature.replace(parameters=[p for name, p in signature.parameters.items() if name != "_ray_trace_ctx"])


def why_not(stock: inspect.Signature, ours: inspect.Signature) -> str:
    """Return why a call that fits verl's signature does not fit ours; empty when every one does."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    has_any_name = any(mine.kind is inspect.Parameter.VAR_KEYWORD for mine in ours.parameters.values())
    for name, parameter in stock.parameters.items():
        mine = ours.parameters.get(name)
        if parameter.kind not in variable and mine is None and not has_any_name:
            return f"does not take {name}"
        if mine is not None and mine.default is mine.empty and parameter.default is not parameter.empty:
            return f"needs {name}, which callers of verl may leave out"
    for name, mine in ours.parameters.items():
        if name not in stock.parameters and mine.kind not in variable and mine.default is mine.empty:
            return f"needs {name}, which verl does not give"
    return ""


@pytest.mark.parametrize(("stock", "ours"), PAIRS, ids=lambda cls: cls.__name__)
def test_an_override_takes_every_call_that_verl_may_make(stock: type, ours: type) -> None:
    names = list(_overrides(stock, ours))
    assert names, "nothing is overridden: the pair is wrong"
    for name in names:
        theirs, mine = _signature(getattr(stock, name)), _signature(getattr(ours, name))
        assert not (reason := why_not(theirs, mine)), f"{ours.__name__}.{name}{mine} {reason}; verl: {theirs}"


def test_an_argument_that_ray_adds_is_not_asked_of_an_override() -> None:
    class Actor:
        def method(self, a: int) -> None: ...

    written = inspect.signature(Actor.method)
    ray.remote(Actor)
    assert inspect.signature(Actor.method) != written, "ray no longer adds an argument: this rule can go"
    assert _signature(Actor.method) == written


def test_the_store_is_found_by_the_name_that_recipes_give() -> None:
    assert CheckpointEngineRegistry.get(BACKEND) is StoreCheckpointEngine


@pytest.mark.parametrize(
    ("theirs", "mine", "reason"),
    [
        (lambda self, a, b=1: 0, lambda self, a, b=2: 0, ""),
        (lambda self, a, b=1: 0, lambda self, a, **more: 0, ""),
        (lambda self, a, b=1: 0, lambda self, a: 0, "does not take b"),
        (lambda self, a, b=1: 0, lambda self, a, b: 0, "needs b, which callers of verl may leave out"),
        (lambda self, a: 0, lambda self, a, c: 0, "needs c, which verl does not give"),
        (lambda self, a: 0, lambda self, a, c=3: 0, ""),
    ],
)
def test_the_rule_itself(theirs: object, mine: object, reason: str) -> None:
    assert why_not(inspect.signature(theirs), inspect.signature(mine)) == reason  # type: ignore[arg-type]
