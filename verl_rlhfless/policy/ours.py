"""Our arm: predict, plan a fleet, migrate what pays, fuse what pays, learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from verl_rlhfless.policy.arm import Outcome
from verl_rlhfless.policy.fuse import fuse_gpus
from verl_rlhfless.policy.migrate import Change, consolidate
from verl_rlhfless.policy.plan import Goal, plan_fleet
from verl_rlhfless.policy.predict import LengthModel, Prediction, learn, predict, refine
from verl_rlhfless.policy.snapshot import FINISHED, Batch, PoolSnapshot, Reaction, RolloutPlan, RolloutView

_LOOKS = 10
"""Looks per predicted remaining time; a look costs about as much as a decode iteration of a small model."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What goes from step to step: the length model, and the fleet that was started first."""

    lengths: LengthModel
    first_fleet: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ours:
    """The elastic arm. ``can_fuse`` ``False`` is the ablation without fusion."""

    goal: Goal = field(default_factory=Goal)
    can_fuse: bool = True
    name: str = "ours"

    def predict(self, memory: Memory, batch: Batch) -> Prediction:
        """Return the prediction of a step."""
        return predict(memory.lengths, batch)

    def begin(self, pool: PoolSnapshot, first: Batch) -> Memory:
        """Return an empty memory and the fleet planned from the cap alone."""
        memory = Memory(LengthModel())
        warm = replace(pool, warm=dict.fromkeys(pool.perf, pool.num_gpus))
        plan = plan_fleet(warm, first, self.predict(memory, first), self.goal)
        return replace(memory, first_fleet=plan.fleet)

    def layout(self, memory: Memory, pool: PoolSnapshot) -> Mapping[int, int]:
        """Return one full engine set for each tensor-parallel size of the first plan."""
        return {tp: pool.trainer.num_gpus // tp for tp in set(memory.first_fleet)}

    def plan(self, memory: Memory, pool: PoolSnapshot, batch: Batch) -> RolloutPlan:
        """Return the fleet for the predicted lengths."""
        plan = plan_fleet(pool, batch, self.predict(memory, batch), self.goal)
        return replace(plan, first_look_s=1.0)

    def policy(self, memory: Memory) -> OursPolicy:
        """Return the decisions during the rollout."""
        return OursPolicy(self, memory)

    def learn(self, memory: Memory, outcome: Outcome) -> Memory:
        """Return the memory with the step's lengths."""
        return replace(memory, lengths=learn(memory.lengths, outcome.batch, outcome.lengths))


@dataclass(frozen=True)
class OursPolicy:
    """Looks a fixed number of times per predicted remaining time: refine, consolidate, fuse."""

    arm: Ours
    memory: Memory

    def refine(self, view: RolloutView) -> Prediction:
        """Return the prediction given what has been generated."""
        prior = self.arm.predict(self.memory, view.batch)
        finished = (view.state == FINISHED).astype(np.float64)
        return refine(self.memory.lengths, prior, view.batch, view.generated, finished)

    def react(self, view: RolloutView, plan: RolloutPlan) -> Reaction:
        """Return the change that pays most, and fusion on what stays free."""
        change = self._change(view, plan)
        reserved = sum(change.starts)
        fused = 0
        if self.arm.can_fuse and not reserved:
            fused = fuse_gpus(view, change.remaining_s, plan.price, plan.is_resident)
        pause = max(0.5, change.remaining_s / _LOOKS)
        return Reaction(view.now_s + pause, change.starts, change.moves, fused, change.reason)

    def _change(self, view: RolloutView, plan: RolloutPlan) -> Change:
        change = consolidate(view, self.refine(view), plan.price, (self.arm.goal.hysteresis, len(plan.fleet)))
        return Change(change.remaining_s) if plan.is_resident else change
