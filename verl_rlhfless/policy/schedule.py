"""The fleets that nobody plans: the fixed planner's, whose number of replicas is given, and those of validations."""

from __future__ import annotations

import dataclasses
import itertools
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


def fleet_within(decision: FleetDecision, num_gpus: int) -> FleetDecision:
    """Return the fleet without its last replicas, those for which ``num_gpus`` GPUs don't suffice; the first stays."""
    num_fitting = sum(end <= num_gpus for end in itertools.accumulate(replica.tp for replica in decision.replicas))
    return dataclasses.replace(decision, replicas=decision.replicas[: max(1, num_fitting)])


def validation_fleet(
    step: int, asleep: Sequence[int], tp: int, num_gpus: int, max_replicas: int | None
) -> FleetDecision:
    """Return the fleet of a validation between planned steps: what sleeps, and as many more as the budget holds.

    The others have the narrowest size that sleeps, which fits wherever a wider one does.

    Args:
        step: Training step.
        asleep: Tensor-parallel sizes of the engines that can wake together, those to wake first in front.
        tp: Tensor-parallel size where nothing sleeps.
        num_gpus: Most GPUs of the fleet; it has one replica all the same if that is too few.
        max_replicas: Most replicas; ``None`` = as the budget holds.
    """
    sizes: list[int] = []
    for size in asleep[:max_replicas]:
        if sum(sizes) + size <= num_gpus:
            sizes.append(size)
    num_woken, narrowest = len(sizes), min(sizes, default=tp)
    sizes += [narrowest] * ((num_gpus - sum(sizes)) // narrowest)
    sizes = sizes[:max_replicas] or [tp]
    num_more = len(sizes) - num_woken
    return FleetDecision(
        step,
        tuple(map(ReplicaSpec, sizes)),
        f"validation wakes {num_woken} replicas that sleep and starts {num_more} x TP{narrowest}",
    )
