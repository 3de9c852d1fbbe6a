"""The life of an elastic replica as values: its states, what it loads, and how it was parked or ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from verl_rlhfless.live.parked_memory import ParkedMemory


class ReplicaState(str, enum.Enum):
    """Where a replica is in its life; ``LOST`` and ``RELEASED`` are final, and a ``PARKED`` one can wake."""

    REQUESTED = "requested"
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    PARKED = "parked"
    RELEASED = "released"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where a replica pulls its weights from, and which version it must serve."""

    store_name: str
    version: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class ReleaseReport:
    """How a replica ended.

    Attributes:
        drained: Whether its requests ended by themselves; else they were aborted at the deadline.
        drain_s: From leaving the router to the last request's end.
        engine_s: Ending the engine and confirming that its processes are gone.
        lease_s: Giving the GPUs back and confirming it.
    """

    drained: bool
    drain_s: float
    engine_s: float
    lease_s: float


@dataclass(frozen=True, slots=True)
class ParkReport:
    """How a replica was parked.

    Attributes:
        drained: Whether its requests ended by themselves; else they were aborted at the deadline.
        drain_s: From leaving the router to the last request's end.
        sleep_s: Until the engine slept.
        lease_s: Giving the GPUs back and confirming it.
        memory: What the engine still holds.
    """

    drained: bool
    drain_s: float
    sleep_s: float
    lease_s: float
    memory: ParkedMemory
