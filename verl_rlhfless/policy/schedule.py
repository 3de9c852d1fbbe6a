"""The fixed planner: the number of rollout replicas of each step is given."""

from __future__ import annotations

from collections.abc import Sequence

from verl_rlhfless.types import FleetDecision, ReplicaSpec


def scheduled_fleet(step: int, schedule: Sequence[int], tp: int) -> FleetDecision:
    """Return the fleet of ``step`` (1-based); a schedule shorter than the run repeats.

    Args:
        step: Training step, starting at 1.
        schedule: Number of replicas of each step, every entry >= 1.
        tp: Tensor-parallel size of every replica.
    """
    count = schedule[(step - 1) % len(schedule)]
    return FleetDecision(
        step, (ReplicaSpec(tp),) * count, f"schedule {list(schedule)} gives step {step} {count} x TP{tp}"
    )


def largest_fleet(step: int, schedule: Sequence[int], tp: int) -> FleetDecision:
    """Return the largest fleet of the schedule, used for validation, whose batch is not in the schedule."""
    count = max(schedule)
    return FleetDecision(
        step, (ReplicaSpec(tp),) * count, f"validation uses the largest scheduled fleet, {count} x TP{tp}"
    )
