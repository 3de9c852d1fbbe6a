"""Frozen values shared by policy, ledger, simulator and live system.

Times are seconds since the Unix epoch in the live system and simulated seconds in the simulator; a value never
mixes both.
"""

from __future__ import annotations

from dataclasses import dataclass

DeviceKey = tuple[tuple[str, frozenset[str]], ...]
"""The devices of a lease as ``((node id, {device ids}), ...)``, sorted by node: equal keys mean the same devices."""


@dataclass(frozen=True, slots=True)
class LeasedNode:
    """The part of a lease that lies on one node."""

    node_id: str
    ip: str
    device_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LeaseSpan:
    """One lease from grant to release.

    Attributes:
        lease_id: Unique name of the lease (the placement group's name or id).
        role: ``trainer`` or ``replica``.
        num_gpus: GPUs held.
        granted_s: When the hold began.
        usable_s: First moment at which a trainer phase or a request could run on it; ``None`` while starting.
        released_s: When the hold ended; ``None`` while held.
    """

    lease_id: str
    role: str
    num_gpus: int
    granted_s: float
    usable_s: float | None = None
    released_s: float | None = None


@dataclass(frozen=True, slots=True)
class BusySpan:
    """Work on ``num_gpus`` GPUs of one lease: a trainer phase, or an engine with at least one running request."""

    lease_id: str
    num_gpus: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class ParkedSpan:
    """A time in which an engine slept without a lease.

    Attributes:
        num_gpus: GPUs that its processes are bound to.
        device_bytes: Most memory in use on one of them when it fell asleep; 0 where the device is the host.
        start_s: When its lease ended.
        end_s: When it woke or was ended; ``None`` while it sleeps.
    """

    num_gpus: int
    device_bytes: int
    start_s: float
    end_s: float | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """A half-open interval of time, such as one training step."""

    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class GpuSeconds:
    """GPU-seconds of a window by state. ``busy + idle + startup == allocated``."""

    allocated: float
    busy: float
    idle: float
    startup: float
    max_gpus: int


@dataclass(frozen=True, slots=True)
class ParkedUse:
    """What parked engines took in a window without a lease: GPU-seconds, and the most device memory on one GPU."""

    gpu_s: float
    device_bytes: int


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """One rollout replica to lease: its tensor-parallel size is its number of GPUs."""

    tp: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the planner expects of a step.

    Attributes:
        rollout_s: From the request for the fleet to the last sample's end.
        step_s: The whole step.
        gpu_s: GPU-seconds of the step, the trainer's included.
        static_step_s: A step of the best static fleet on the same budget.
    """

    rollout_s: float
    step_s: float
    gpu_s: float
    static_step_s: float


@dataclass(frozen=True, slots=True)
class FleetDecision:
    """The replicas of one step, with the reason that is logged, asserted on and counted.

    ``is_resident``: they share the trainer's lease, and nothing is leased for them.
    """

    step: int
    replicas: tuple[ReplicaSpec, ...]
    reason: str
    forecast: Forecast | None = None
    is_resident: bool = False

    @property
    def num_gpus(self) -> int:
        """GPUs that the fleet runs on."""
        return sum(replica.tp for replica in self.replicas)
