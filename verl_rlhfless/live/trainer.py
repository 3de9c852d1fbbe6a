"""The trainer of ``trainer.v1.trainer_mode=rlhfless_sync``; the elastic one's replicas exist only while they generate.

Every token of a sample comes from the weights of its step: version k is published at the end of step k, and a
replica of step k + 1 pulls exactly that version before it is registered.
"""

from __future__ import annotations

from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.utils.debug import marked_timer

from verl_rlhfless.config import TRAINER_MODE, RlhflessConfig, parse_config
from verl_rlhfless.errors import ConfigError, ReplicaError
from verl_rlhfless.live import weight_engine
from verl_rlhfless.live.fleet import Fleet
from verl_rlhfless.live.fusion_trainer import FusionTrainer
from verl_rlhfless.live.pool import ElasticResourcePoolManager
from verl_rlhfless.live.replica import WeightSource
from verl_rlhfless.live.request_trainer import RequestTrainer
from verl_rlhfless.live.warm_pool import WarmPool
from verl_rlhfless.live.weights import create_store
from verl_rlhfless.live.worker_group import ElasticWorkerGroup
from verl_rlhfless.policy.schedule import largest_fleet, scheduled_fleet
from verl_rlhfless.types import FleetDecision
from verl_rlhfless_patches import verl_worker_group


class ElasticTrainerSync(FusionTrainer):
    """Synchronous PPO / GRPO whose rollout replicas are leased, loaded, drained and released inside every step."""

    def __init__(self, config: DictConfig, settings: RlhflessConfig) -> None:
        self._store_name = f"rlhfless-weights-{ray.get_runtime_context().get_job_id()}"
        _adapt_to_verl(config, settings, self._store_name)
        self._enable_hybrid_replicas = False
        super().__init__(config, settings)

    # ---- set-up

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        stock: Any = self.resource_pool_manager
        self.resource_pool_manager: Any = ElasticResourcePoolManager(
            resource_pool_spec=stock.resource_pool_spec,
            mapping=stock.mapping,
            grant_timeout_s=self._settings.pool.grant_timeout_s,
        )

    def _setup(self) -> None:
        self._store = create_store(self._store_name, self._settings.weights)
        with verl_worker_group.use(ElasticWorkerGroup):
            super()._setup()
        warm_servers = WarmPool(self._num_warm_servers(), self.config.actor_rollout_ref.rollout.max_num_seqs)
        self._fleet = Fleet(self.config, self._settings, self._router, self._events, warm_servers)

    def _num_warm_servers(self) -> int:
        wanted = self._settings.pool.warm_servers
        return max(self._settings.planner.schedule) if wanted is None else wanted

    def fit(self, agent_loop_manager: Any) -> None:
        """Train; whatever ends the run, no replica and no lease is left behind."""
        try:
            super().fit(agent_loop_manager)
        finally:
            self._fleet.close()

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
        source = WeightSource(self._store_name, self._version, self._settings.weights.pull_timeout_s)
        self._fleet.start(decision, source)

    def prepare_step(self) -> dict[str, Any]:
        """Begin to start the step's replicas, and submit its prompts meanwhile: they wait in the router."""
        self._start_fleet(scheduled_fleet(self.global_steps, self._settings.planner.schedule, self._tp()))
        return dict(super().prepare_step())

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        """Run verl's step; when no replica came up, say why."""
        try:
            return super().step(metrics, timing_raw)
        except Exception as error:
            try:
                self._fleet.wait_started()
            except ReplicaError as cause:
                raise cause from error
            raise

    def on_sample_end(self) -> None:
        with marked_timer("rlhfless_release", self.timing_raw):
            self._fleet.wait_started()
            self._rollout_metrics["rlhfless/num_replicas"] = len(self._fleet.replicas)
            self._fleet.release()
        super().on_sample_end()

    def on_validate_begin(self) -> None:
        self._start_fleet(largest_fleet(self.global_steps, self._settings.planner.schedule, self._tp()))
        self._fleet.wait_started()

    def on_validate_end(self) -> None:
        self._fleet.release()

    def _get_n_gpus_for_throughput(self) -> int:
        return int(self.resource_pool_manager.get_n_gpus()) + self._fleet.max_gpus


@register_trainer(TRAINER_MODE)
class Trainer(PPOTrainer):
    """What verl's registry holds: makes the trainer that ``rlhfless.pool`` asks for."""

    def __new__(cls, config: DictConfig) -> RequestTrainer:
        """Return the elastic trainer, or the one with resident replicas."""
        values = OmegaConf.select(config, "rlhfless")
        settings = parse_config(OmegaConf.to_container(values, resolve=True) if values is not None else None)
        if not settings.has_own_rollout:
            raise ConfigError(
                "trainer.v1.trainer_mode",
                TRAINER_MODE,
                "needs our rollout, and rlhfless.pool.name is off",
                "Add +rlhfless=default or +rlhfless=resident, or use trainer.v1.trainer_mode=sync for stock verl.",
            )
        return (ElasticTrainerSync if settings.is_elastic else RequestTrainer)(config, settings)


def _adapt_to_verl(config: DictConfig, settings: RlhflessConfig, store_name: str) -> None:
    """Set the keys of verl that an elastic run needs, so that the user sets none of them."""
    rollout = config.actor_rollout_ref.rollout
    with open_dict(config):
        rollout.nnodes = max(1, rollout.nnodes)  # asserted by verl's server manager, which stays empty
        rollout.checkpoint_engine.backend = weight_engine.BACKEND
        rollout.checkpoint_engine.custom_backend_module = weight_engine.__name__
        rollout.checkpoint_engine.engine_kwargs = {
            weight_engine.BACKEND: {
                "store_name": store_name,
                "bucket_mib": settings.weights.bucket_mib,
                "timeout_s": settings.weights.pull_timeout_s,
            }
        }
