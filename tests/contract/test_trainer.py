"""The parts of verl's synchronous trainer that its own tests ask about, with ours in its place."""

from __future__ import annotations

from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="verl's trainer imports vLLM's replica")

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_rlhfless.config import PoolConfig, parse_config
from verl_rlhfless.live import request_trainer
from verl_rlhfless.live.fusion_trainer import FusionTrainer
from verl_rlhfless.live.replica_places import ReplicaPlaces
from verl_rlhfless.live.request_trainer import RequestTrainer
from verl_rlhfless.live.residency import expand_segments
from verl_rlhfless.live.trainer import ElasticTrainerSync
from verl_rlhfless.policy.learnt import Standby

TRAINERS = {PPOTrainerSync: [], RequestTrainer: ["+rlhfless=resident"], ElasticTrainerSync: ["+rlhfless=default"]}


@pytest.fixture(scope="module", params=TRAINERS, ids=lambda cls: cls.__name__)
def trainer(request: pytest.FixtureRequest) -> Any:
    """A trainer as far as its constructor's first lines: configuration and mode."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=["data.train_batch_size=64", *TRAINERS[request.param]])
    if request.param is not PPOTrainerSync:
        settings = parse_config(OmegaConf.to_container(config.rlhfless, resolve=True))
        request_trainer._adapt_to_verl(config, settings)
    trainer = request.param.__new__(request.param)
    trainer.config, trainer.trainer_mode = config, config.trainer.v1.trainer_mode
    return trainer


def sampler(trainer: Any, **values: Any) -> Any:
    """Return the sampler that the trainer builds with these settings of its configuration."""
    config = trainer.config.copy()
    for key, value in values.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    other = type(trainer).__new__(type(trainer))
    other.config, other.trainer_mode = config, trainer.trainer_mode
    return other._build_replay_buffer()


def test_the_sampler_is_the_synchronous_one(trainer: Any) -> None:
    """verl gives every trainer of another name the asynchronous one, which trains on stale samples."""
    built = sampler(trainer)
    assert type(built) is ReplayBuffer
    assert (built.filter_groups_metric, built.gen_batch_size) == (None, 64)


def test_dynamic_sampling_reaches_the_sampler(trainer: Any) -> None:
    built = sampler(
        trainer,
        algorithm__filter_groups__enable=True,
        algorithm__filter_groups__metric="acc",
        algorithm__filter_groups__max_inflight_gen_batches=3,
    )
    assert (built.filter_groups_metric, built.max_inflight_gen_batches, built.gen_batch_size) == ("acc", 3, 1)
    assert built.refill_fn.__name__ == "_add_prompts_to_generate"


def test_failed_groups_are_refilled_one_by_one_where_that_is_asked(trainer: Any) -> None:
    built = sampler(trainer, trainer__v1__sampler__sync_refill_failed_groups=True)
    assert (built.sync_refill_failed_groups, built.gen_batch_size) == (True, 1)


def test_filtering_without_a_metric_is_refused(trainer: Any) -> None:
    with pytest.raises(ValueError, match="metric must be set"):
        sampler(trainer, algorithm__filter_groups__enable=True, algorithm__filter_groups__metric=None)


def test_every_rank_trains_with_the_allocator_that_stocks_weight_sync_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    trainer: Any = ElasticTrainerSync.__new__(ElasticTrainerSync)
    rank = SimpleNamespace(__ray_call__=SimpleNamespace(remote=calls.append))
    trainer.actor_rollout_wg = SimpleNamespace(workers=[rank, rank])
    trainer._publish = partial(calls.append, "published")
    monkeypatch.setattr("ray.get", lambda refs: refs)
    trainer.on_init_end()
    assert calls == ["published", expand_segments, expand_segments]


def test_a_step_waits_for_no_gpus_once_its_samples_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    trainer: Any = ElasticTrainerSync.__new__(ElasticTrainerSync)
    trainer._fleet = SimpleNamespace(
        **{name: partial(calls.append, name) for name in ("give_up_waiting", "wait_started", "release")},
        parking=SimpleNamespace(is_last=False),
        num_started=1,
    )
    trainer.config = OmegaConf.create({"trainer": {"test_freq": -1}})
    trainer.timing_raw, trainer._rollout_metrics, trainer._data_state = {}, {}, None
    trainer.global_steps, trainer.total_training_steps = 1, 2
    trainer._take_back = lambda step, data_state: {}
    monkeypatch.setattr(FusionTrainer, "on_sample_end", lambda self: None)
    trainer.on_sample_end()
    assert calls == ["give_up_waiting", "wait_started", "release"]


@pytest.mark.parametrize(
    ("free_share", "kept_because", "setting", "num_beside"),
    [(0.4, "", "auto", 2), (0.39, "", "auto", 0), (1.0, "it must not leave", "auto", 0), (1.0, "", "never", 0)],
)
def test_engines_may_join_the_trainer_where_the_memory_that_their_recipe_gives_them_is_free(
    free_share: float, kept_because: str, setting: str, num_beside: int, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[float] = []

    def free_device_share(timeout_s: float) -> float:
        asked.append(timeout_s)
        return free_share

    trainer: Any = ElasticTrainerSync.__new__(ElasticTrainerSync)
    ranks: Any = SimpleNamespace(devices=lambda: "its devices", free_device_share=free_device_share)
    lease: Any = SimpleNamespace(kept_because=kept_because)
    trainer._places = ReplicaPlaces(lease, ranks, PoolConfig(share_trainer=setting), 0.4)
    sleeping = SimpleNamespace(parked_on=lambda devices: Counter({1: 2} if devices == "its devices" else {}))
    trainer._fleet = SimpleNamespace(standby=Standby({1: 3}), parking=sleeping)
    with caplog.at_level("INFO"):
        assert [sum(trainer._standby().beside.values()) for _ in range(2)] == [num_beside] * 2
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (free_share < 0.4), "once"
    assert all("takes 40 %" in text and "39 % is free" in text for text in told)
    asked.clear()
    sleeping.parked_on = lambda devices: Counter()
    assert trainer._standby() == Standby({1: 3}) and not asked, "no device is asked where nothing can wake"


@pytest.mark.parametrize(
    ("plans", "asleep", "sizes"), [(True, [1] * 8, [1] * 8), (True, [], [2] * 4), (False, [1] * 8, [2] * 3)]
)
def test_a_validation_wakes_what_the_plans_left_asleep(plans: bool, asleep: list[int], sizes: list[int]) -> None:
    trainer: Any = ElasticTrainerSync.__new__(ElasticTrainerSync)
    trainer._settings = SimpleNamespace(plans=plans, planner=SimpleNamespace(schedule=(1, 3), max_replicas=None))
    trainer._routing, trainer.global_steps = SimpleNamespace(replica_gpus=8), 5
    trainer._places = SimpleNamespace(limit=lambda: None, placed=lambda decision: decision)
    trainer.config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"tensor_model_parallel_size": 2}}})
    started: list[Any] = []
    trainer._fleet = SimpleNamespace(
        expect=started.append, wait_started=lambda: None, parking=SimpleNamespace(sizes_together=asleep)
    )
    trainer._start_fleet = lambda decision, is_validation: started.append(decision)
    trainer.on_validate_begin()
    announced, decision = started
    assert announced is decision and [replica.tp for replica in decision.replicas] == sizes
