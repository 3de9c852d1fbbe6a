"""The elastic trainer: verl's own v1 ``sync`` trainer, whose rollout replicas exist only while they generate.

Every token of a sample comes from the weights of its step: version k is published at the end of step k, and a
replica of step k + 1 pulls exactly that version before it is registered.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.debug import marked_timer

from verl_rlhfless.config import TRAINER_MODE, RlhflessConfig, parse_config
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.live import weight_engine
from verl_rlhfless.live.completeness import RolloutLedger
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.fleet import Fleet
from verl_rlhfless.live.pool import ElasticResourcePoolManager
from verl_rlhfless.live.replica import WeightSource
from verl_rlhfless.live.weights import create_store
from verl_rlhfless.live.worker_group import ElasticWorkerGroup
from verl_rlhfless.policy.schedule import largest_fleet, scheduled_fleet
from verl_rlhfless.types import FleetDecision
from verl_rlhfless_patches import verl_worker_group

logger = logging.getLogger(__name__)
logger.setLevel(os.getenv("VERL_LOGGING_LEVEL", "INFO"))

_POLL_INTERVAL_S = 0.05  # verl's replay buffer polls every 2 s, which a short rollout would pay in full


@register_trainer(TRAINER_MODE)
class ElasticTrainerSync(PPOTrainerSync):
    """Synchronous PPO / GRPO whose rollout replicas are leased, loaded, drained and released inside every step."""

    def __init__(self, config: DictConfig) -> None:
        self._elastic = _read_elastic_config(config)
        self._store_name = f"rlhfless-weights-{ray.get_runtime_context().get_job_id()}"
        _adapt_to_verl(config, self._elastic, self._store_name)
        self._enable_hybrid_replicas = False
        super().__init__(config)
        self.replay_buffer.poll_interval = _POLL_INTERVAL_S
        self._events = EventLog.from_environment()
        self._rollout_ledger = RolloutLedger(config.actor_rollout_ref.rollout.n)
        self._fleet_gpus = 0

    # ---- set-up

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        stock: Any = self.resource_pool_manager
        self.resource_pool_manager: Any = ElasticResourcePoolManager(
            resource_pool_spec=stock.resource_pool_spec,
            mapping=stock.mapping,
            grant_timeout_s=self._elastic.pool.grant_timeout_s,
        )

    def _setup(self) -> None:
        self._store = create_store(self._store_name, self._elastic.weights)
        with verl_worker_group.use(ElasticWorkerGroup):
            super()._setup()
        router = self.llm_server_manager.global_load_balancer
        self._fleet = Fleet(self.config, self._elastic, router, self._events)
        logger.info("rlhfless: active: %s", self._elastic.active())

    def fit(self, agent_loop_manager: Any) -> None:
        """Train; whatever ends the run, no replica and no lease is left behind."""
        try:
            super().fit(agent_loop_manager)
        finally:
            self._fleet.release()

    # ---- weights

    def _publish(self) -> None:
        (report,) = [
            metrics
            for metrics in ray.get(
                self.actor_rollout_wg.update_weights(global_steps=self.global_steps, mode=weight_engine.BACKEND)
            )
            if metrics
        ]
        self._version = self.global_steps
        self._events.write("published", version=self._version, **report)

    def on_init_end(self) -> None:
        self._publish()

    def on_step_end(self) -> None:
        with marked_timer("update_weights", self.timing_raw, color="red"):
            self._publish()

    # ---- rollout

    def _tp(self) -> int:
        return int(self.config.actor_rollout_ref.rollout.tensor_model_parallel_size)

    def _start_fleet(self, decision: FleetDecision) -> None:
        self._fleet.start(decision, WeightSource(self._store_name, self._version, self._elastic.weights.pull_timeout_s))
        self._fleet_gpus = self._fleet.num_gpus

    def prepare_step(self) -> dict[str, Any]:
        """Start the step's replicas, then submit its prompts to them."""
        with marked_timer("rlhfless_start", self.timing_raw):
            self._start_fleet(scheduled_fleet(self.global_steps, self._elastic.planner.schedule, self._tp()))
        return {"rlhfless/num_replicas": len(self._fleet.replicas), **super().prepare_step()}

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        """Run verl's step. Name the groups of a rollout that lost all: verl only says that it has none."""
        try:
            return super().step(metrics, timing_raw)
        except RuntimeError:
            self._rollout_ledger.check((), self.config.data.train_batch_size)
            raise

    def _submit_batch_to_rollout(self, batch: Any) -> int:
        self._rollout_ledger.expect(batch)
        return int(super()._submit_batch_to_rollout(batch))

    def on_sample_end(self) -> None:
        with marked_timer("rlhfless_release", self.timing_raw):
            self._fleet.release()
        super().on_sample_end()

    def on_validate_begin(self) -> None:
        self._start_fleet(largest_fleet(self.global_steps, self._elastic.planner.schedule, self._tp()))

    def on_validate_end(self) -> None:
        self._fleet.release()

    def _balance_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        self._rollout_ledger.check(batch.keys, self.config.data.train_batch_size)
        return super()._balance_batch(batch, *args, **kwargs)

    def _get_n_gpus_for_throughput(self) -> int:
        return int(self.resource_pool_manager.get_n_gpus()) + self._fleet_gpus


def _read_elastic_config(config: DictConfig) -> RlhflessConfig:
    values = OmegaConf.select(config, "rlhfless")
    elastic = parse_config(OmegaConf.to_container(values, resolve=True) if values is not None else None)
    if not elastic.is_elastic:
        raise ConfigError(
            "trainer.v1.trainer_mode",
            TRAINER_MODE,
            "needs an elastic pool, and rlhfless.pool.name is off",
            "Add +rlhfless=default, or use trainer.v1.trainer_mode=sync for stock verl.",
        )
    return elastic


def _adapt_to_verl(config: DictConfig, elastic: RlhflessConfig, store_name: str) -> None:
    """Set the keys of verl that an elastic run needs, so that the user sets none of them."""
    rollout = config.actor_rollout_ref.rollout
    with open_dict(config):
        config.trainer.v1.trainer_mode = "sync"  # verl treats any other literal as asynchronous
        rollout.nnodes = max(1, rollout.nnodes)  # asserted by verl's server manager, which stays empty
        rollout.checkpoint_engine.backend = weight_engine.BACKEND
        rollout.checkpoint_engine.custom_backend_module = weight_engine.__name__
        rollout.checkpoint_engine.engine_kwargs = {
            weight_engine.BACKEND: {
                "store_name": store_name,
                "bucket_mib": elastic.weights.bucket_mib,
                "timeout_s": elastic.weights.pull_timeout_s,
            }
        }
