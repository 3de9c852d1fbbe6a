"""What a run's configuration means for the router: which policy routes, and what it believes of the replicas."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from verl_rlhfless.config import RlhflessConfig
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.live.announcement import Announcement
from verl_rlhfless.live.budget import gpu_budget
from verl_rlhfless.live.devices import UNPACED_CPU, PoolBounds, declared_pool, find_gpu, gpu_pool
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.live.replay import plan_of
from verl_rlhfless.live.sizes import legal_sizes
from verl_rlhfless.live.suspendable import why_lease_is_kept
from verl_rlhfless.live.variables import PACE_VARIABLE
from verl_rlhfless.policy.elastic import Resizing
from verl_rlhfless.policy.goal import Goal
from verl_rlhfless.policy.perf import EngineLimits
from verl_rlhfless.policy.routing import Routing, RoutingPolicy
from verl_rlhfless.policy.shapes import parse_model_config
from verl_rlhfless.policy.snapshot import PoolSnapshot

_UNKNOWN_KV_TOKENS = 2**24  # an engine tells its own; the declared device's is only used to plan


@dataclass(frozen=True, slots=True)
class Nodes:
    """The cluster: GPUs of each node, names of all resources, and memory of a GPU (0 where the device is the host)."""

    num_gpus: tuple[int, ...]
    resources: tuple[str, ...]
    device_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """Plain values that travel to the router's process.

    Attributes:
        config: The plugin's configuration.
        tp: Tensor-parallel size of every replica.
        gpus_per_node: GPUs of a node.
        limits: Of every engine.
        response_length: Most tokens of a response.
        model: The model's ``config.json``.
        pace: The declared device; ``None`` when iterations are not paced.
        resources: Names of the cluster's resources.
        trainer_gpus: GPUs of the trainer's lease.
        replica_gpus: Most GPUs that replicas of an elastic fleet may lease together.
        keeps_trainer: The trainer holds its lease during every rollout too.
        device_bytes: Memory of a GPU, measured; 0 where the device is the host.
    """

    config: RlhflessConfig
    tp: int
    gpus_per_node: int
    limits: EngineLimits
    response_length: int
    model: Mapping[str, Any]
    pace: PaceModel | None
    resources: tuple[str, ...]
    trainer_gpus: int = 0
    replica_gpus: int = 0
    keeps_trainer: bool = True
    device_bytes: int = 0

    @classmethod
    def of_run(cls, run: Any, config: RlhflessConfig, model: Mapping[str, Any], nodes: Nodes) -> RoutingSettings:
        """Return the settings of a run of ``verl.trainer.main_ppo`` with the configuration ``run``.

        Args:
            run: verl's configuration.
            config: The plugin's.
            model: The model's ``config.json``.
            nodes: The cluster.
        """
        rollout = run.actor_rollout_ref.rollout
        pace = os.environ.get(PACE_VARIABLE)
        trainer_gpus = run.trainer.n_gpus_per_node * run.trainer.nnodes
        budget = gpu_budget(run, config.pool.max_gpus, sum(nodes.num_gpus))
        keeps_trainer = bool(why_lease_is_kept(run, config.pool.suspend_trainer))
        return cls(
            config=config,
            tp=rollout.tensor_model_parallel_size,
            gpus_per_node=max(nodes.num_gpus, default=0) if config.plans else run.trainer.n_gpus_per_node,
            limits=EngineLimits(rollout.max_num_seqs, rollout.max_num_batched_tokens, rollout.gpu_memory_utilization),
            response_length=rollout.response_length,
            model=model,
            pace=PaceModel.parse(pace) if pace else None,
            resources=nodes.resources,
            trainer_gpus=trainer_gpus,
            replica_gpus=max(0, budget - trainer_gpus) if keeps_trainer else budget,
            keeps_trainer=keeps_trainer,
            device_bytes=nodes.device_bytes,
        )

    @property
    def remembers(self) -> bool:
        """Whether a step's lengths are remembered for later ones."""
        return self.config.predictor.name != "off"

    def arm(self, announced: Announcement, fleet: Sequence[int]) -> Routing:
        """Return the policy of one step on replicas of these tensor-parallel sizes."""
        config = self.config
        return Routing(
            fleet=tuple(fleet),
            dispatcher=config.dispatcher.name,
            migration=config.migration.name,
            keeps_groups=config.prefix_dedup.name == "on",
            learns=config.predictor.name == "history",
            tau=config.migration.tau,
            seed=config.dispatcher.seed,
            is_resident=not config.is_elastic,
            truth=self._truth(announced) if config.predictor.name == "oracle" else None,
        )

    def resizing(self, routing: RoutingPolicy) -> Resizing:
        """Return the policy of a rollout whose fleet was planned, from the one that routes."""
        consolidates = self.config.migration.name == "cut_and_migrate"
        return Resizing(routing, self.goal(), consolidates)

    def goal(self) -> Goal:
        """Return what a plan is to achieve."""
        planner = self.config.planner
        price = None if planner.usd_per_gpu_hour is None else planner.usd_per_gpu_hour / 3600
        limit = planner.max_usd_per_step
        return Goal(
            cost_weight=planner.cost_weight,
            max_step_s=planner.max_step_s,
            max_gpu_s=None if limit is None or price is None else limit / price,
            min_replicas=planner.min_replicas,
            max_replicas=planner.max_replicas,
            usd_per_gpu_s=price,
        )

    def planning_pool(self) -> PoolSnapshot:
        """Return what a plan may lease, as declared.

        Raises:
            ConfigError: No GPU is left for replicas, or no tensor-parallel size is possible.
        """
        if not self.replica_gpus:
            rule = (
                "leaves no GPU of the cluster for a replica beside verl's pools of reward and teacher models and the "
                f"trainer's {self.trainer_gpus}, which it keeps"
            )
            action = "Add GPUs, or use +rlhfless=resident, which needs none beside the trainer's."
            raise ConfigError("rlhfless.pool.max_gpus", self.config.pool.max_gpus, rule, action)
        sizes = legal_sizes(self.config.planner, self.model, min(self.gpus_per_node, self.replica_gpus))
        if self.pace is not None:
            sizes = tuple(tp for tp in sizes if tp == 1 or tp in self.pace.tp_speedup)
        if not sizes:
            rule = f"leaves no size that fits on {self.replica_gpus} GPUs for replicas and is declared"
            asked = self.config.planner.tensor_parallel_sizes
            action = "Raise rlhfless.pool.max_gpus, or declare tp_speedup in rlhfless.instrument.pace."
            raise ConfigError("rlhfless.planner.tensor_parallel_sizes", asked, rule, action)
        pool = self._pool(self._holding(sizes), self.replica_gpus)
        trainer = replace(pool.trainer, num_gpus=self.trainer_gpus)
        may_share = not self.keeps_trainer and self.config.pool.share_trainer == "auto"
        return replace(
            pool, trainer=trainer, keeps_trainer=self.keeps_trainer, has_resident=may_share, shares_engines=True
        )

    def _holding(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes at which a replica holds the model; all of those that were asked for must."""
        found = []
        for tp in sizes if self.config.planner.tensor_parallel_sizes is None else ():
            with contextlib.suppress(ConfigError):
                self._pool((tp,), tp)
                found.append(tp)
        return tuple(found) or sizes

    def pool(self, fleet: Sequence[int]) -> PoolSnapshot:
        """Return what is known of replicas of these tensor-parallel sizes.

        Declared, from a data sheet, or measured on this kind of host.

        Raises:
            ConfigError: The policy needs a price of an iteration, and there is none for this model or GPU.
        """
        return self._pool(tuple(sorted(set(fleet))), sum(fleet))

    def _pool(self, sizes: tuple[int, ...], num_gpus: int) -> PoolSnapshot:
        bounds = PoolBounds(sizes, num_gpus, self.gpus_per_node, self.limits, _UNKNOWN_KV_TOKENS)
        gpu = None if self.pace else find_gpu(self.resources, self.device_bytes)
        if gpu is None or (
            self.config.is_placement_fixed and not self.config.plans
        ):  # a fixed placement asks for no price
            return declared_pool(bounds, self.pace or UNPACED_CPU)
        try:
            return gpu_pool(bounds, parse_model_config(self.model, "the model's config.json"), gpu)
        except ConfigError as error:
            key, name = "rlhfless.dispatcher.name", self.config.dispatcher.name
            action = "Set rlhfless/dispatcher=stock and rlhfless/migration=off for this model."
            raise ConfigError(key, name, f"has no price of an iteration: {error}", action) from error

    def _truth(self, announced: Announcement) -> np.ndarray[Any, np.dtype[np.int64]]:
        replay = self.config.replay
        assert replay.trace is not None
        plan = plan_of(replay.trace, replay.scale, self.response_length)
        return np.array(
            [
                plan.forced_tokens(announced.step, group.row, session)
                for group in announced.groups
                for session in range(group.n)
            ]
        )
