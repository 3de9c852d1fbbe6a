"""Where replicas run: on leases of their own, or beside the trainer on its GPUs.

A plan chooses in each step. But a trainer that is found unable to leave its GPUs (memory stays on them) keeps them for
the rest of the run. From then on fleets lease only what the budget has beside it, or, where that is too little for any
replica, share the trainer's GPUs for good.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from verl_rlhfless.config import PoolConfig
from verl_rlhfless.errors import DeviceMemoryError
from verl_rlhfless.live.shared_lease import TrainerDevices
from verl_rlhfless.live.trainer_lease import TrainerLease
from verl_rlhfless.policy.schedule import fleet_within
from verl_rlhfless.types import FleetDecision

logger = logging.getLogger(__name__)


class Ranks(Protocol):
    """What is asked of the trainer's worker group."""

    def devices(self) -> TrainerDevices:
        """Return the trainer's devices."""

    def free_device_share(self, timeout_s: float) -> float:
        """Return the least share of a device's memory that is free."""


class ReplicaPlaces:
    """The places of a run's replicas.

    Args:
        lease: The trainer's.
        ranks: Its worker group.
        pool: The configuration.
        engine_share: Share of a GPU's memory that the recipe gives an engine.

    Attributes:
        room: GPUs that fleets may have beside a trainer that could not leave; ``None`` = no limit of that kind.
        shares_for_good: Whether replicas run on the GPUs of such a trainer.
    """

    def __init__(self, lease: TrainerLease, ranks: Ranks, pool: PoolConfig, engine_share: float) -> None:
        self._lease, self._ranks, self._pool, self._engine_share = lease, ranks, pool, engine_share
        self._was_to_leave = not lease.kept_because
        self._was_told_of_room = False
        self.room: int | None = None
        self.shares_for_good = False

    def beside(self, parked_on: Callable[[TrainerDevices], Counter[int]]) -> Counter[int]:
        """Return how many engines of each size can wake beside the trainer, of those that are parked on its devices."""
        if self._pool.share_trainer == "never" or self._lease.kept_because:
            return Counter()
        asleep = parked_on(self._ranks.devices())
        return asleep if asleep.total() and self._has_room_for_engines() else Counter()

    def devices_for(self, decision: FleetDecision) -> TrainerDevices | None:
        """Return the trainer's devices if a fleet runs on them, ``None`` if it leases.

        Call it when it is settled whether the trainer leaves.

        Raises:
            DeviceMemoryError: The trainer could not leave, and neither beside it nor on its GPUs is room for a replica.
        """
        if not decision.is_resident and self._could_not_leave:
            self.shares_for_good = self._must_share(decision)
        return self._ranks.devices() if decision.is_resident or self.shares_for_good else None

    def limit(self) -> int | None:
        """Return how many GPUs later fleets may have, the first time after the trainer could not leave, else ``None``.

        Call it between rollouts.
        """
        if not self._could_not_leave:
            return None
        self.room = self._lease.num_gpus if self.shares_for_good else self._lease.num_gpus_beside
        return self.room

    def placed(self, decision: FleetDecision) -> FleetDecision:
        """Return the part of a fleet that has room beside a trainer that could not leave, which no schedule knows."""
        if self.room is None:
            return decision
        return replace(fleet_within(decision, self.room), is_resident=self.shares_for_good)

    @property
    def _could_not_leave(self) -> bool:
        """Whether the trainer has been found to stay, and fleets are not limited yet."""
        return self._was_to_leave and bool(self._lease.kept_because) and self.room is None

    def _must_share(self, decision: FleetDecision) -> bool:
        if self._lease.num_gpus_beside >= min(replica.tp for replica in decision.replicas):
            return False
        if self._pool.share_trainer == "never" or not self._has_room_for_engines():
            raise DeviceMemoryError(self._lease.kept_because)
        logger.warning("rlhfless: replicas share the trainer's GPUs from now on.")
        return True

    def _has_room_for_engines(self) -> bool:
        """Return whether the trainer's GPUs have as much memory free as the recipe gives an engine."""
        wanted, free = self._engine_share, self._ranks.free_device_share(self._pool.resume_timeout_s)
        if free < wanted and not self._was_told_of_room:
            self._was_told_of_room = True
            logger.info(
                "rlhfless: a replica takes %.0f %% of a GPU's memory, and %.0f %% is free beside the trainer: replicas "
                "lease in every step. For steps that share the trainer's GPUs, lower "
                "actor_rollout_ref.rollout.gpu_memory_utilization or set the actor's param_offload and "
                "optimizer_offload.",
                100 * wanted,
                100 * free,
            )
        return free >= wanted
