"""All elastic replicas of a step: started together, registered with verl's router, drained and released together."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from typing import Any

from omegaconf import open_dict

from verl_rlhfless.config import RlhflessConfig
from verl_rlhfless.errors import ReplicaError, RlhflessError
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.replica import ElasticReplica, WeightSource
from verl_rlhfless.types import FleetDecision, ReplicaSpec

logger = logging.getLogger(__name__)


class Fleet:
    """Enacts fleet decisions; it never decides how many replicas a step gets."""

    def __init__(self, run_config: Any, config: RlhflessConfig, router: Any, events: EventLog) -> None:
        self._rollout = run_config.actor_rollout_ref.rollout
        self._model = run_config.actor_rollout_ref.model
        self._config = config
        self._router = router
        self._events = events
        self._ranks = itertools.count()
        self.replicas: list[ElasticReplica] = []

    @property
    def num_gpus(self) -> int:
        """GPUs that the fleet leases now."""
        return sum(replica.world_size for replica in self.replicas)

    def start(self, decision: FleetDecision, weights: WeightSource) -> None:
        """Start every replica of the decision at once; the step goes on with those that come up.

        Raises:
            ReplicaError: None came up; the message holds each replica's reason.
        """
        assert not self.replicas, "a fleet is released before the next one starts"
        logger.info("rlhfless: step %d: %s", decision.step, decision.reason)
        candidates = [self._new_replica(spec) for spec in decision.replicas]
        outcomes = asyncio.run(self._start_all(candidates, weights))
        failures = []
        for replica, outcome in zip(candidates, outcomes, strict=True):
            if isinstance(outcome, Exception):
                failures.append(f"{replica.name}: {outcome}")
                self._events.write("replica_failed", replica=replica.name, reason=str(outcome))
                logger.error("rlhfless: %s", failures[-1])
        if not self.replicas:
            raise ReplicaError(f"step {decision.step}: no rollout replica came up. " + " | ".join(failures))

    async def _start_all(self, candidates: list[ElasticReplica], weights: WeightSource) -> list[BaseException | None]:
        return await asyncio.gather(
            *[self._start_one(replica, weights) for replica in candidates], return_exceptions=True
        )

    async def _start_one(self, replica: ElasticReplica, weights: WeightSource) -> None:
        report = await replica.start(weights)
        self.replicas.append(replica)
        assert replica.lease is not None
        self._events.write(
            "pulled", lease=replica.lease.name, version=report.version, checksum=report.checksum, seconds=report.seconds
        )
        await self._router.add_servers.remote({replica.server_address: replica.server_handle})
        self._events.write("replica_ready", lease=replica.lease.name)

    def _new_replica(self, spec: ReplicaSpec) -> ElasticReplica:
        rollout = self._rollout.copy()
        with open_dict(rollout):
            rollout.tensor_model_parallel_size = spec.tp
        return ElasticReplica(next(self._ranks), rollout, self._model, self._config.pool)

    def release(self) -> None:
        """Take every replica out of the router, drain it, end it, and give its lease back.

        Raises:
            RlhflessError: A replica could not be ended or its lease not be returned; the others are released all
                the same.
        """
        leaving, self.replicas = self.replicas, []
        if not leaving:
            return
        outcomes = asyncio.run(self._release_all(leaving))
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failures:
            raise failures[0] if isinstance(failures[0], RlhflessError) else ReplicaError(str(failures[0]))

    async def _release_all(self, leaving: list[ElasticReplica]) -> list[BaseException | None]:
        addresses = [replica.server_address for replica in leaving]
        left = await asyncio.gather(self._router.remove_servers.remote(addresses), return_exceptions=True)
        released = await asyncio.gather(*[self._release_one(replica) for replica in leaving], return_exceptions=True)
        return [*left, *released]

    async def _release_one(self, replica: ElasticReplica) -> None:
        report = await replica.release()
        assert replica.lease is not None
        self._events.write(
            "replica_released", lease=replica.lease.name, state=replica.state.value, **dataclasses.asdict(report)
        )
