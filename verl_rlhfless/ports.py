"""What the control loop needs from the world.

The simulator and the live system each provide these; neither knows the other.

Invariant: only ``wait`` takes time; every other call records a wish that the world carries out and that ``observe``
shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from verl_rlhfless.policy.snapshot import IntArray, RolloutView


class Clock(Protocol):
    """Time of the rollout."""

    def now_s(self) -> float:
        """Return the seconds since the rollout began."""

    async def wait(self, until_s: float) -> None:
        """Return at ``until_s``, or earlier when a replica became ready or was lost, or every sample finished."""


class ReplicaPool(Protocol):
    """Leases and the life of replicas."""

    def start(self, tps: Sequence[int]) -> None:
        """Request replicas of these tensor-parallel sizes; their ids follow the existing ones, in order."""

    def release(self, replicas: Sequence[int]) -> None:
        """Drain these replicas: their lease ends when their last request has left."""


class RolloutEngine(Protocol):
    """Requests on replicas, and what is known about them."""

    def place(self, samples: IntArray, replica: int) -> None:
        """Send samples to a replica: held or waiting ones for free, running ones by cut and continuation."""

    def observe(self) -> RolloutView:
        """Return the rollout as it is now."""

    def is_done(self) -> bool:
        """Return whether every sample is complete."""


class InferenceWorkers(Protocol):
    """Forward-only phases on freed GPUs while the tail still runs."""

    def fuse(self, num_gpus: int) -> None:
        """Begin inference on finished samples with ``num_gpus`` freed GPUs."""


@dataclass(frozen=True, slots=True)
class RolloutPorts:
    """The world of one rollout."""

    clock: Clock
    pool: ReplicaPool
    engine: RolloutEngine
    inference: InferenceWorkers
