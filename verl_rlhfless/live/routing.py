"""What a run's configuration means for the router: which policy routes, and what it believes of the replicas."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_rlhfless.config import RlhflessConfig
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.live.announcement import Announcement
from verl_rlhfless.live.devices import UNPACED_CPU, Fleet, declared_pool, find_gpu, gpu_pool
from verl_rlhfless.live.pacing import PACE_ENV, PaceModel
from verl_rlhfless.live.replay import plan_of
from verl_rlhfless.policy.perf import EngineLimits
from verl_rlhfless.policy.routing import Routing
from verl_rlhfless.policy.shapes import parse_model_config
from verl_rlhfless.policy.snapshot import PoolSnapshot

_UNKNOWN_KV_TOKENS = 2**24  # an engine tells its own; the declared device's is only used to plan


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
    """

    config: RlhflessConfig
    tp: int
    gpus_per_node: int
    limits: EngineLimits
    response_length: int
    model: Mapping[str, Any]
    pace: PaceModel | None
    resources: tuple[str, ...]

    @classmethod
    def of_run(
        cls, run: Any, config: RlhflessConfig, model: Mapping[str, Any], resources: Iterable[str]
    ) -> RoutingSettings:
        """Return the settings of a run of ``verl.trainer.main_ppo`` with the configuration ``run``."""
        rollout = run.actor_rollout_ref.rollout
        pace = os.environ.get(PACE_ENV)
        return cls(
            config=config,
            tp=rollout.tensor_model_parallel_size,
            gpus_per_node=run.trainer.n_gpus_per_node,
            limits=EngineLimits(rollout.max_num_seqs, rollout.max_num_batched_tokens, rollout.gpu_memory_utilization),
            response_length=rollout.response_length,
            model=model,
            pace=PaceModel.parse(pace) if pace else None,
            resources=tuple(resources),
        )

    def arm(self, announced: Announcement, num_replicas: int) -> Routing:
        """Return the policy of one step."""
        config = self.config
        return Routing(
            fleet=(self.tp,) * num_replicas,
            dispatcher=config.dispatcher.name,
            migration=config.migration.name,
            keeps_groups=config.prefix_dedup.name == "on",
            learns=config.predictor.name == "history",
            tau=config.migration.tau,
            seed=config.dispatcher.seed,
            is_resident=not config.is_elastic,
            truth=self._truth(announced) if config.predictor.name == "oracle" else None,
        )

    def pool(self, num_replicas: int) -> PoolSnapshot:
        """Return what is known of the replicas: declared, from a data sheet, or measured on this kind of host.

        Raises:
            ConfigError: The policy needs a price of an iteration, and there is none for this model or GPU.
        """
        fleet = Fleet((self.tp,), num_replicas * self.tp, self.gpus_per_node, self.limits, _UNKNOWN_KV_TOKENS)
        gpu = None if self.pace else find_gpu(self.resources)
        if gpu is None or self.config.is_placement_fixed:  # a fixed placement asks for no price
            return declared_pool(fleet, self.pace or UNPACED_CPU)
        try:
            return gpu_pool(fleet, parse_model_config(self.model, "the model's config.json"), gpu)
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
