"""What trainer and replicas may lease: never the GPUs that verl's other pools hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from verl_rlhfless.config import parse_config
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.live import cluster_check
from verl_rlhfless.live import trainer as trainer_module
from verl_rlhfless.live.budget import check_gpus, gpu_budget, other_pools
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.routing_settings import Nodes, RoutingSettings
from verl_rlhfless.live.trainer import ElasticTrainerSync
from verl_rlhfless.policy.host_memory import HostMemory

REWARD = ["reward.reward_model.n_gpus_per_node=2", "reward.reward_model.nnodes=2", "reward.reward_model.enable=True"]
OWN_POOL = [*REWARD, "reward.reward_model.enable_resource_pool=True"]
TEACHER = ["distillation.enabled=True", "distillation.n_gpus_per_node=3", "distillation.nnodes=1"]


def recipe(*overrides: str) -> DictConfig:
    needed = ["actor_rollout_ref.rollout.name=vllm", "trainer.n_gpus_per_node=8"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=["+rlhfless=default", *needed, *overrides])


@pytest.mark.parametrize(
    ("overrides", "held"),
    [
        ([], {}),
        (REWARD, {}),
        (OWN_POOL, {"reward.reward_model": 4}),
        (["reward.reward_model.enable_resource_pool=True"], {}),
        ([*OWN_POOL, *TEACHER], {"reward.reward_model": 4, "distillation": 3}),
    ],
    ids=["none", "colocated reward model", "reward model", "no reward model", "reward and teacher models"],
)
def test_pools_of_reward_and_teacher_models_are_not_leased(overrides: list[str], held: dict[str, int]) -> None:
    run = recipe(*overrides)
    assert other_pools(run) == held
    assert gpu_budget(run, None, 16) == 16 - sum(held.values())
    assert gpu_budget(run, 6, 16) == 6, "a limit of the user's is what trainer and replicas may lease"


@pytest.mark.parametrize(("suspend", "left"), [("auto", 12), ("never", 4)])
def test_a_plan_has_what_the_other_pools_leave(suspend: str, left: int) -> None:
    run = recipe(*OWN_POOL, f"rlhfless.pool.suspend_trainer={suspend}")
    config = parse_config(OmegaConf.to_container(run.rlhfless, resolve=True))
    settings = RoutingSettings.of_run(run, config, {}, Nodes((8, 8), (), device_bytes=80))
    assert (settings.replica_gpus, settings.device_bytes) == (left, 80)


def test_a_trainer_leaves_where_the_other_pools_leave_no_room_for_it_beside_replicas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer: Any = ElasticTrainerSync.__new__(ElasticTrainerSync)
    trainer.config = recipe(*OWN_POOL)
    trainer._settings = parse_config(OmegaConf.to_container(trainer.config.rlhfless, resolve=True))
    pool = SimpleNamespace(world_size=8, accelerator=SimpleNamespace(resource="GPU"))
    trainer.resource_pool_manager = SimpleNamespace(resource_pool_dict={trainer_module.TRAINER_POOL: pool})
    trainer._events, trainer.actor_rollout_wg = EventLog(None), None
    monkeypatch.setattr(trainer_module.ray, "cluster_resources", lambda: {"GPU": 16.0})
    lease = trainer._make_trainer_lease()
    assert not lease.before_rollout(4).is_first
    monkeypatch.setattr(lease, "_suspend", lambda: None)
    assert lease.before_rollout(5).is_first


def check(num_gpus: int, *overrides: str) -> None:
    run = recipe("actor_rollout_ref.rollout.tensor_model_parallel_size=2", *overrides)
    check_gpus(run, parse_config(OmegaConf.to_container(run.rlhfless, resolve=True)), num_gpus)


STAYS, FIXED = "rlhfless.pool.suspend_trainer=never", "rlhfless/planner=fixed"


@pytest.mark.parametrize(
    ("num_gpus", "overrides", "needs"),
    [
        (8, [STAYS], "the trainer's 8 GPUs and the smallest planned fleet, 1 replicas of 1 GPUs, need 9"),
        (9, [STAYS, FIXED], "the largest scheduled fleet, 1 replicas of 2 GPUs, need 10"),
        (11, OWN_POOL, "need 8, and reward.reward_model holds 4"),
    ],
    ids=["a plan", "a schedule", "a reward model"],
)
def test_a_run_that_the_cluster_has_no_room_for_is_refused_before_its_trainer_is_built(
    num_gpus: int, overrides: list[str], needs: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check(num_gpus, *overrides)
    for part in (needs, f"the cluster has {num_gpus} GPUs", "+rlhfless=resident", "rlhfless.pool.max_gpus"):
        assert part in str(refused.value)
    check(num_gpus + 1, *overrides)


@pytest.mark.parametrize(
    ("num_gpus", "overrides"),
    [(8, [STAYS, "rlhfless.pool.max_gpus=16"]), (0, [STAYS]), (8, [])],
    ids=["it grows up to max_gpus", "it has to grow for the trainer", "a trainer that leaves"],
)
def test_a_cluster_that_grows_or_that_the_trainer_leaves_is_not_refused(num_gpus: int, overrides: list[str]) -> None:
    check(num_gpus, *overrides)


def test_the_nodes_are_looked_at_before_the_trainer_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = ElasticTrainerSync.__new__(ElasticTrainerSync)
    trainer.config = recipe(STAYS)
    trainer._settings = parse_config(OmegaConf.to_container(trainer.config.rlhfless, resolve=True))
    nodes = [HostMemory(name, 10**13, 10**13, num_gpus=4) for name in ("node-0", "node-1")]
    monkeypatch.setattr(cluster_check, "measure_nodes", lambda: nodes)
    with pytest.raises(ConfigError, match="the cluster has 8 GPUs"):
        trainer._setup()
