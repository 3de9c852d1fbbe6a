"""What the two worlds of the contract of pools have in common: one rollout on replicas of one GPU, watched.

At every look the view must be sound: each sample is seen once, and what was generated is never lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from verl_rlhfless.control import RolloutRecord
from verl_rlhfless.policy.arm import Policy
from verl_rlhfless.policy.snapshot import FINISHED, HELD, RUNNING, Batch, IntArray, RolloutPlan, RolloutView
from verl_rlhfless.ports import RolloutPorts
from verl_rlhfless.types import LeaseSpan

STEP, MAX_TOKENS, PROMPT_TOKENS = 3, 100_000, 50


def batch_of(count: int) -> Batch:
    """Return ``count`` prompts with one response each."""
    names = tuple(f"p{i}" for i in range(count))
    return Batch(STEP, names, np.arange(count), np.full(count, PROMPT_TOKENS), MAX_TOKENS)


def plan_of(fleet: Sequence[int], replica_of: Sequence[int], first_look_s: float = 0.0) -> RolloutPlan:
    """Return a plan whose empty replicas keep their leases until they are released."""
    order = np.arange(len(replica_of))
    return RolloutPlan(tuple(fleet), np.array(replica_of), order, False, is_static=True, first_look_s=first_look_s)


class World(Protocol):
    """One rollout. ``look_s``: a time in which its samples get a few tokens."""

    ports: RolloutPorts
    look_s: float

    async def open(self) -> None:
        """Announce the samples."""

    async def begin(self, num_replicas: int) -> None:
        """Start the first replicas."""

    async def until(self, is_so: Callable[[RolloutView], bool]) -> RolloutView:
        """Let time pass until the view is so, and return it."""

    async def control(self, policy: Policy, plan: RolloutPlan) -> RolloutRecord:
        """Let the control loop do everything, from the first start to the last sample."""

    def lose(self, replica: int) -> None:
        """Kill a replica; its GPU may be leased again."""

    async def close(self) -> None:
        """The rollout is over: the rest of the leases end."""

    def leases(self) -> list[LeaseSpan]:
        """Return every lease of a replica."""

    def gpu_s(self) -> float:
        """Return what the pool itself says that its leases took [GPU s]."""


class Watch:
    """What must hold at every look at a rollout."""

    def __init__(self, targets: Sequence[int], budget: int) -> None:
        self._targets, self._budget = np.array(targets), budget
        self._least: IntArray = np.zeros(len(targets), dtype=np.int64)

    def lost(self, view: RolloutView) -> None:
        """A loss may cost what was not reported yet."""
        self._least = np.zeros_like(self._least)

    def check(self, view: RolloutView) -> RolloutView:
        """Return the view, if it is sound."""
        assert len(view.state) == len(view.replica_of) == len(view.generated) == len(self._targets)
        unfinished = view.state != FINISHED
        assert ((view.replica_of == -1) == (view.state == HELD))[unfinished].all(), "placed, or held"
        assert (view.generated >= self._least).all(), "tokens are gone"
        assert (view.generated <= self._targets).all()
        assert (view.generated == self._targets)[~unfinished].all()
        assert [replica.replica for replica in view.replicas] == list(range(len(view.replicas)))
        assert sum(replica.num_running for replica in view.replicas) == (view.state == RUNNING).sum()
        assert 0 <= view.free_gpus <= self._budget
        self._least = view.generated
        return view
