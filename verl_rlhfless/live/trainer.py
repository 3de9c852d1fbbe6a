"""The trainer of ``trainer.v1.trainer_mode=rlhfless_sync``; the elastic one's replicas exist only while they generate.

Every token of a sample comes from the weights of its step: version k is published at the end of step k, and a
replica of step k + 1 pulls exactly that version before it is registered.
"""

from __future__ import annotations

from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug import marked_timer
from verl.workers.config import HFModelConfig

from verl_rlhfless.config import TRAINER_MODE, RlhflessConfig, parse_config
from verl_rlhfless.errors import ConfigError, DeviceMismatchError, LeaseLostError, LeaseTimeoutError, ReplicaError
from verl_rlhfless.live import weight_engine
from verl_rlhfless.live.fleet import Fleet
from verl_rlhfless.live.host_memory import check_nodes, count_parameters, measure_nodes, memory_of_run
from verl_rlhfless.live.pool import TRAINER_POOL, ElasticResourcePoolManager
from verl_rlhfless.live.replica import WeightSource
from verl_rlhfless.live.request_trainer import RequestTrainer
from verl_rlhfless.live.suspendable import why_lease_is_kept
from verl_rlhfless.live.suspended_checkpoint import save_suspended
from verl_rlhfless.live.trainer_lease import Gpus, TrainerLease
from verl_rlhfless.live.warm_pool import WarmPool
from verl_rlhfless.live.weights import create_store
from verl_rlhfless.live.worker_group import ElasticWorkerGroup
from verl_rlhfless.policy.schedule import largest_fleet, scheduled_fleet
from verl_rlhfless.types import FleetDecision
from verl_rlhfless_patches import verl_worker_group


class ElasticTrainerSync(RequestTrainer):
    """Synchronous PPO / GRPO whose rollout replicas are leased, loaded, drained and released inside every step."""

    def __init__(self, config: DictConfig, settings: RlhflessConfig) -> None:
        self._store_name = f"rlhfless-weights-{ray.get_runtime_context().get_job_id()}"
        _adapt_to_verl(config, settings, self._store_name)
        self._data_state: Any = None  # of the data loader, before the prompts of a rollout without a trainer
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
        self._check_host_memory()
        self._store = create_store(self._store_name, self._settings.weights)
        with verl_worker_group.use(ElasticWorkerGroup):
            super()._setup()
        warm_servers = WarmPool(self._num_warm_servers(), self.config.actor_rollout_ref.rollout.max_num_seqs)
        self._fleet = Fleet(self.config, self._settings, self._router, self._events, warm_servers)
        self._trainer_lease = self._make_trainer_lease()

    def _check_host_memory(self) -> None:
        """Refuse nodes that lack host memory, before anything is started on them.

        Raises:
            HostMemoryError: The message names node, holders and shortage.
        """
        model: HFModelConfig = omega_conf_to_dataclass(self.config.actor_rollout_ref.model)
        kept = why_lease_is_kept(self.config, self._settings.pool.suspend_trainer, self._settings.fusion.name)
        memory = memory_of_run(self.config, self._settings, count_parameters(model), can_suspend=not kept)
        for account in check_nodes(memory, measure_nodes()):
            parts = {need.what: need.num_bytes for need in account.needs}
            self._events.write("host_memory", node=account.node.node_id, num_bytes=account.num_bytes, parts=parts)

    def _make_trainer_lease(self) -> TrainerLease:
        pool, max_gpus = self.resource_pool_manager.resource_pool_dict[TRAINER_POOL], self._settings.pool.max_gpus

        def budget() -> int:
            return int(ray.cluster_resources().get(pool.accelerator.resource, 0)) if max_gpus is None else max_gpus

        kept = why_lease_is_kept(self.config, self._settings.pool.suspend_trainer, self._settings.fusion.name)
        gpus = Gpus(pool.world_size, budget)
        return TrainerLease(self.actor_rollout_wg, gpus, self._settings.pool, self._events, kept)

    def _num_warm_servers(self) -> int:
        wanted = self._settings.pool.warm_servers
        return max(self._settings.planner.schedule) if wanted is None else wanted

    def fit(self, agent_loop_manager: Any) -> None:
        """Train; whatever ends the run, no replica and no lease is left behind."""
        try:
            super().fit(agent_loop_manager)
        finally:
            self._trainer_lease.close()
            self._fleet.close()

    # ---- weights

    def _publish(self) -> None:
        self._fleet.make_room_on_hosts()
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
        fleet = scheduled_fleet(self.global_steps, self._settings.planner.schedule, self._tp())
        if self._trainer_lease.before_rollout(fleet.num_gpus).is_suspended:
            self._data_state = self.train_dataloader.state_dict()
        self._start_fleet(fleet)
        self._trainer_lease.during_rollout(self._fleet)
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
            self._fleet.parking.is_last = self._is_last_rollout(validates=self.config.trainer.test_freq > 0)
            self._fleet.release()
        super().on_sample_end()
        with marked_timer("rlhfless_resume", self.timing_raw):
            self._rollout_metrics |= self._take_back(self.global_steps - 1, self._data_state)

    def on_validate_begin(self) -> None:
        fleet = largest_fleet(self.global_steps, self._settings.planner.schedule, self._tp())
        self._trainer_lease.before_rollout(fleet.num_gpus, is_validation=True)
        self._start_fleet(fleet)
        self._trainer_lease.during_rollout(self._fleet)
        self._fleet.wait_started()

    def on_validate_end(self) -> None:
        self._fleet.parking.is_last = self._is_last_rollout(validates=False)
        self._fleet.release()
        self._take_back(self.global_steps, self.train_dataloader.state_dict())

    def _take_back(self, step: int, data_state: Any) -> dict[str, float]:
        """Lease the trainer's GPUs again and return metrics; if that fails, save what is on the host and end the run.

        Args:
            step: The last step whose update the trainer holds.
            data_state: Where the data loader was after that step.

        Raises:
            LeaseLostError: The GPUs were not granted; the message says where to go on from.
        """
        try:
            return self._trainer_lease.after_rollout()
        except (LeaseTimeoutError, DeviceMismatchError) as error:
            limit = f"rlhfless.pool.resume_timeout_s={self._settings.pool.resume_timeout_s:g}"
            self._events.write("trainer_lost", reason=str(error))
            where = save_suspended(self, step, data_state)
            raise LeaseLostError(f"the trainer's GPUs did not come back ({limit}): {error} {where}") from error

    def _is_last_rollout(self, *, validates: bool) -> bool:
        return self.global_steps >= self.total_training_steps and not validates

    def _get_n_gpus_for_throughput(self) -> int:
        num_gpus, trainer = int(self.resource_pool_manager.get_n_gpus()), self._trainer_lease.num_gpus
        is_shared = self._trainer_lease.decision.is_first
        return num_gpus + (max(0, self._fleet.max_gpus - trainer) if is_shared else self._fleet.max_gpus)


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
