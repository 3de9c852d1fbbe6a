"""What an arm is.

A planner for each step, a policy during the rollout, and a memory that goes in and comes back out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from verl_rlhfless.policy.snapshot import Batch, IntArray, PoolSnapshot, Reaction, RolloutPlan, RolloutView


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished step.

    Attributes:
        batch: Its prompts.
        lengths: [B] int64 tokens of each response.
        step_s: Seconds that it took.
        plan: Its plan.
        hidden_s: Seconds of the trainer's inference that freed GPUs did meanwhile, and that would have come on top.
    """

    batch: Batch
    lengths: IntArray
    step_s: float
    plan: RolloutPlan | None = None
    hidden_s: float = 0.0


class Policy(Protocol):
    """Decisions during one rollout."""

    def react(self, view: RolloutView, plan: RolloutPlan) -> Reaction:
        """Return what to change now, and when to look again."""


class Arm(Protocol):
    """One way to run training steps. ``memory`` is a frozen value; an arm itself holds none."""

    @property
    def name(self) -> str:
        """Name in tables and JSON."""

    def begin(self, pool: PoolSnapshot, first: Batch) -> Any:
        """Return the memory before the first step."""

    def layout(self, memory: Any, pool: PoolSnapshot) -> Mapping[int, int]:
        """Return which engines are started before the first step: tensor-parallel size -> count."""

    def plan(self, memory: Any, pool: PoolSnapshot, batch: Batch) -> RolloutPlan:
        """Return how this step's rollout starts."""

    def policy(self, memory: Any, batch: Batch) -> Policy:
        """Return the decisions during the rollout of a step."""

    def learn(self, memory: Any, outcome: Outcome) -> Any:
        """Return the memory after a step."""
