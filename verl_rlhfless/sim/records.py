"""What a simulated run leaves behind. Field names are those of the JSON output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from verl_rlhfless.control import RolloutRecord
from verl_rlhfless.policy.snapshot import RolloutPlan


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step took. Names are those of the JSON output."""

    step: int
    step_s: float
    gen_s: float
    gpu_s_allocated: float
    gpu_s_busy: float
    gpu_s_idle: float
    gpu_s_startup: float
    gpu_s_parked: float
    gpu_lease_usd: float
    node_usd: float
    num_migrations: int
    num_lost_replicas: int
    num_preemptions: int
    prefill_tokens: int
    distinct_prompt_tokens: int
    tokens: int
    fused_tokens: int
    score_wait_s: float
    fleet: str
    reason: str
    predicted_step_s: float | None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """All steps and the whole run, initial start included.

    ``node_usd`` also holds what the nodes' minimum billing time adds after the last step; a step's holds what is billed
    while it runs.
    """

    steps: tuple[StepRecord, ...]
    init_s: float
    wall_s: float
    gpu_s_allocated: float
    gpu_s_busy: float
    gpu_s_idle: float
    gpu_s_startup: float
    gpu_s_parked: float
    gpu_lease_usd: float
    node_usd: float
    max_gpus: int


def fleet_text(plan: RolloutPlan, record: RolloutRecord) -> str:
    """Return a step's fleet in words: replicas by size, those that were started later, and whether it was resident."""
    sizes, counts = np.unique(np.array(plan.fleet), return_counts=True)
    text = "+".join(f"{count}xTP{tp}" for tp, count in zip(sizes, counts, strict=True))
    later = [tp for _, reaction in record.reactions for tp in reaction.starts]
    return text + "".join(f" then TP{tp}" for tp in later) + (" resident" if plan.is_resident else "")
