"""The elastic trainer, and the class that ``trainer.v1.trainer_mode=rlhfless_sync`` selects.

Three classes add to verl's synchronous trainer in turn: ``RequestTrainer`` our router, on verl's resident replicas,
``FusionTrainer`` inference during the rollout, and ``ElasticTrainerSync`` replicas that exist only while they generate.

Every token of a sample comes from the weights of its step: version k is published at the end of step k, and a
replica of step k + 1 pulls exactly that version before it is registered.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, open_dict
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.utils.debug import marked_timer

from verl_rlhfless.config import TRAINER_MODE, RlhflessConfig
from verl_rlhfless.errors import (
    ConfigError,
    DeviceMismatchError,
    LeaseLostError,
    LeaseTimeoutError,
    ReplicaError,
)
from verl_rlhfless.live import weight_engine
from verl_rlhfless.live.announcement import announcement_of
from verl_rlhfless.live.budget import gpu_budget
from verl_rlhfless.live.cluster_check import check_cluster
from verl_rlhfless.live.fleet import Fleet
from verl_rlhfless.live.fusion_trainer import FusionTrainer
from verl_rlhfless.live.pool import TRAINER_POOL, ElasticResourcePoolManager
from verl_rlhfless.live.replica_life import WeightSource
from verl_rlhfless.live.replica_places import ReplicaPlaces
from verl_rlhfless.live.request_trainer import RequestTrainer
from verl_rlhfless.live.residency import expand_segments
from verl_rlhfless.live.retry import once, retry
from verl_rlhfless.live.settings import settings_of
from verl_rlhfless.live.suspendable import why_lease_is_kept
from verl_rlhfless.live.suspended_checkpoint import save_suspended
from verl_rlhfless.live.trainer_lease import Gpus, TrainerLease
from verl_rlhfless.live.warm_pool import WarmPool
from verl_rlhfless.live.weight_store import create_store
from verl_rlhfless.live.worker_group import ElasticWorkerGroup
from verl_rlhfless.policy.learnt import Standby, StepTimes
from verl_rlhfless.policy.schedule import largest_fleet, scheduled_fleet, validation_fleet
from verl_rlhfless.types import FleetDecision
from verl_rlhfless_patches import verl_worker_group

logger = logging.getLogger(__name__)

_PHASES = ("reward", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor")  # verl's timers

COSTS_FILE = "rlhfless_costs.json"
"""What starts, phases and iterations took, in a checkpoint's folder."""


class ElasticTrainerSync(FusionTrainer):
    """Synchronous PPO / GRPO whose rollout replicas are leased, loaded, drained and released inside every step.

    A step, by the hooks of verl that are overridden here:

    1. ``_submit_batch_to_rollout``: the router plans the fleet. While verl submits the prompts, the trainer leaves its
       GPUs, if it does, and the replicas start.
    2. ``on_sample_begin``: agent loops generate on what is up; finished samples may be inferred meanwhile.
    3. ``on_sample_end``: the replicas are drained, parked or ended, and the trainer comes back onto its GPUs.
    4. verl's phases, up to the update of the actor.
    5. ``on_step_end``: the new weights are published for the next step's replicas.
    6. ``_consume_sync_metrics``: what the plan had predicted is recorded beside what the step took.
    """

    def __init__(self, config: DictConfig, settings: RlhflessConfig) -> None:
        self._store_name = f"rlhfless-weights-{ray.get_runtime_context().get_job_id()}"
        _use_weight_store(config, settings, self._store_name)
        self._data_state: Any = None  # of the data loader, before the prompts of a rollout without a trainer
        self._enable_hybrid_replicas = False
        self._decision: FleetDecision | None = None  # of the step, once its first prompts are there
        self._step_began_s = 0.0
        self._publish_s: float | None = None
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
        for account in check_cluster(self.config, self._settings):
            parts = {need.what: need.num_bytes for need in account.needs}
            self._events.write("host_memory", node=account.node.node_id, num_bytes=account.num_bytes, parts=parts)
        self._store = create_store(self._store_name, self._settings.weights)
        with verl_worker_group.use(ElasticWorkerGroup):
            super()._setup()
        warm_servers = WarmPool(self._num_warm_servers(), self.config.actor_rollout_ref.rollout.max_num_seqs)
        self._fleet = Fleet(self.config, self._settings, self._router, self._events, warm_servers)
        self._trainer_lease = self._make_trainer_lease()
        share = float(self.config.actor_rollout_ref.rollout.gpu_memory_utilization)
        self._places = ReplicaPlaces(self._trainer_lease, self.actor_rollout_wg, self._settings.pool, share)

    def _make_trainer_lease(self) -> TrainerLease:
        pool, max_gpus = self.resource_pool_manager.resource_pool_dict[TRAINER_POOL], self._settings.pool.max_gpus

        def budget() -> int:
            num_gpus = int(ray.cluster_resources().get(pool.accelerator.resource, 0))
            return gpu_budget(self.config, max_gpus, num_gpus)

        kept = why_lease_is_kept(self.config, self._settings.pool.suspend_trainer)
        gpus = Gpus(pool.world_size, budget)
        return TrainerLease(self.actor_rollout_wg, gpus, self._settings.pool, self._events, kept)

    def _num_warm_servers(self) -> int:
        wanted, planner = self._settings.pool.warm_servers, self._settings.planner
        if wanted is not None:
            return wanted
        if not self._settings.plans:
            return max(planner.schedule)
        return self._largest_fleet(min(self._routing.planning_pool().perf))

    def _largest_fleet(self, tp: int) -> int:
        """Return how many replicas of ``tp`` GPUs a planned fleet has at most."""
        possible, most = max(1, self._routing.replica_gpus // tp), self._settings.planner.max_replicas
        return possible if most is None else min(most, possible)

    def fit(self, agent_loop_manager: Any) -> None:
        """Train; whatever ends the run, no replica and no lease is left behind."""
        try:
            super().fit(agent_loop_manager)
        finally:
            self._trainer_lease.close()
            self._fleet.close()

    # ---- checkpoints

    def _save_checkpoint(self) -> None:
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / COSTS_FILE).write_text(retry(self._router.costs.remote), encoding="utf-8")
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self._restore(COSTS_FILE, self._router.restore_costs)

    # ---- weights

    def _publish(self) -> None:
        self._fleet.look_after_standby()
        of_ranks = ray.get(
            self.actor_rollout_wg.update_weights(global_steps=self.global_steps, mode=weight_engine.BACKEND)
        )
        (report,) = filter(None, of_ranks)  # rank 0 publishes; the others return nothing
        self._version = self.global_steps
        self._events.write("published", version=self._version, **report)

    def on_init_end(self) -> None:
        self._publish()
        # Stock's weight sync ends with this. The ranks share no CUDA memory, which such segments would not allow.
        ray.get([rank.__ray_call__.remote(expand_segments) for rank in self.actor_rollout_wg.workers])

    def on_step_end(self) -> None:
        with marked_timer("update_weights", self.timing_raw, color="red"):
            self._publish()
        self._publish_s = self.timing_raw["update_weights"]

    # ---- rollout

    def _may_fuse(self) -> bool:
        shares = self._places.shares_for_good or (self._decision is not None and self._decision.is_resident)
        return super()._may_fuse() and not self._trainer_lease.decision.is_suspended and not shares

    def _tp(self) -> int:
        return int(self.config.actor_rollout_ref.rollout.tensor_model_parallel_size)

    def _start_fleet(self, decision: FleetDecision, *, is_validation: bool = False) -> None:
        source = WeightSource(self._store_name, self._version, self._settings.weights.pull_timeout_s)
        trainer = self._trainer_lease.before_rollout(
            decision.num_gpus, is_validation=is_validation, is_shared=decision.is_resident
        )
        shared = self._places.devices_for(decision)
        self._fleet.start(decision, source, imports_first=trainer.is_first, shared=shared)
        self._trainer_lease.during_rollout(self._fleet)

    def _limit_fleets(self) -> None:
        """Lower what later fleets may lease, once the trainer could not leave; call it between rollouts."""
        if (room := self._places.limit()) is not None:
            self._routing = dataclasses.replace(self._routing, replica_gpus=room, keeps_trainer=True)
            retry(lambda: self._router.reroute.remote(self._routing))

    def prepare_step(self) -> dict[str, Any]:
        """Submit the step's prompts, and begin to start its replicas."""
        self._decision, self._step_began_s = None, time.monotonic()
        if not self._trainer_lease.kept_because:
            self._data_state = self.train_dataloader.state_dict()
        return dict(super().prepare_step())

    def _submit_batch_to_rollout(self, batch: Any) -> int:
        """Submit prompts as verl does; beside the first of a step the trainer leaves and its replicas begin to start.

        The prompts wait in the router: agent loops take as long to build as a parked engine to wake.
        """
        if self._decision is not None:
            return super()._submit_batch_to_rollout(batch)
        self._limit_fleets()
        self._decision = decision = self._places.placed(self._decide_fleet(batch))
        self._fleet.expect(decision)
        with ThreadPoolExecutor(1, "rlhfless-start") as beside:
            started = beside.submit(self._start_fleet, decision)
            num_prompts = super()._submit_batch_to_rollout(batch)
        started.result()
        return num_prompts

    def _decide_fleet(self, batch: Any) -> FleetDecision:
        if not self._settings.plans:
            return scheduled_fleet(self.global_steps, self._settings.planner.schedule, self._tp())
        announced, standby = announcement_of(batch, self.config.actor_rollout_ref.rollout), self._standby()
        try:
            decision: FleetDecision = retry(lambda: self._router.plan.remote(announced, standby))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        self._events.write("planned", **dataclasses.asdict(decision))
        return decision

    def _standby(self) -> Standby:
        """Return what waits for a replica, and what of it can wake beside the trainer."""
        beside = self._places.beside(self._fleet.parking.parked_on)
        return dataclasses.replace(self._fleet.standby, beside=beside)

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        """Run verl's step; when no replica came up, say why."""
        try:
            batch = super().step(metrics, timing_raw)
            if self._settings.plans:
                self._learn_costs(timing_raw)
            return batch
        except Exception as error:
            try:
                self._fleet.wait_started()
            except ReplicaError as cause:
                raise cause from error
            raise

    def _learn_costs(self, timing_raw: dict[str, float]) -> None:
        """Tell the planner what the step took, before a checkpoint is written."""
        released = self._fleet.releases_s
        times = StepTimes(
            starts=tuple(self._fleet.starts),
            release_s=sum(released) / len(released) if released else None,
            phases_s=sum(timing_raw.get(name, 0.0) for name in _PHASES),
            publish_s=self._publish_s,
            moves_s=self._trainer_lease.moves_s,
        )
        retry(once(self._router, "learn_costs", times))

    def on_sample_end(self) -> None:
        with marked_timer("rlhfless_release", self.timing_raw):
            self._fleet.give_up_waiting()
            self._fleet.wait_started()
            self._fleet.parking.is_last = self._is_last_rollout(validates=self.config.trainer.test_freq > 0)
            self._fleet.release()
        super().on_sample_end()
        self._rollout_metrics["rlhfless/num_replicas"] = self._fleet.num_started
        with marked_timer("rlhfless_resume", self.timing_raw):
            self._rollout_metrics |= self._take_back(self.global_steps - 1, self._data_state)

    def _consume_sync_metrics(self) -> dict[str, Any]:
        if self._decision is not None and self._decision.forecast is not None:
            self._rollout_metrics |= self._account(self._decision)
        return super()._consume_sync_metrics()

    def _account(self, decision: FleetDecision) -> dict[str, float]:
        """Record what a planned step was expected to take and took, its replicas' and the trainer's leases together."""
        step_s = time.monotonic() - self._step_began_s
        given_back_gpu_s = self._rollout_metrics.get("rlhfless/trainer_gpu_s_given_back", 0.0)
        gpu_s = self._fleet.gpu_s + self._routing.trainer_gpus * step_s - given_back_gpu_s
        measured = {"step_s": step_s, "gpu_s": gpu_s, "rollout_s": self._rollout_metrics["rlhfless/rollout_s"]}
        self._events.write("accounted", step=decision.step, replicas_gpu_s=self._fleet.gpu_s, **measured)
        assert decision.forecast is not None
        predicted = {f"predicted_{name}": value for name, value in dataclasses.asdict(decision.forecast).items()}
        planned = {"planned_replicas": len(decision.replicas), "planned_gpus": decision.num_gpus}
        return {f"rlhfless/{name}": float(value) for name, value in (measured | predicted | planned).items()}

    def on_validate_begin(self) -> None:
        self._limit_fleets()
        decision = self._places.placed(self._decide_validation_fleet())
        self._fleet.expect(decision)
        self._start_fleet(decision, is_validation=True)
        self._fleet.wait_started()

    def _decide_validation_fleet(self) -> FleetDecision:
        planner = self._settings.planner
        if not self._settings.plans:
            return largest_fleet(self.global_steps, planner.schedule, self._tp())
        asleep, num_gpus = self._fleet.parking.sizes_together, self._routing.replica_gpus
        return validation_fleet(self.global_steps, asleep, self._tp(), num_gpus, planner.max_replicas)

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
        settings = settings_of(config)
        if not settings.has_own_rollout:
            raise ConfigError(
                "trainer.v1.trainer_mode",
                TRAINER_MODE,
                "needs our rollout, and rlhfless.pool.name is off",
                "Add +rlhfless=default or +rlhfless=resident, or use trainer.v1.trainer_mode=sync for stock verl.",
            )
        return (ElasticTrainerSync if settings.is_elastic else RequestTrainer)(config, settings)


def _use_weight_store(config: DictConfig, settings: RlhflessConfig, store_name: str) -> None:
    """Set the keys of verl by which its weight sync publishes into our store, so that the user sets none of them."""
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
                "rollout_dtype": rollout.dtype,
            }
        }
