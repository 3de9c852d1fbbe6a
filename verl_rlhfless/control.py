"""The rollout loop: observe, decide, enact, until every sample is complete.

The simulator and the live system both run this.

Invariants: a sample is never forgotten (one whose replica was lost is placed again before the policy is asked),
decisions come only from the policy, and every enacted reaction is recorded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from verl_rlhfless.policy.arm import Policy
from verl_rlhfless.policy.dispatch import place_orphans
from verl_rlhfless.policy.snapshot import FINISHED, HELD, RUNNING, Reaction, RolloutPlan, RolloutView
from verl_rlhfless.ports import RolloutPorts


@dataclass(slots=True)
class RolloutRecord:
    """What the loop did.

    Attributes:
        num_looks: How often the policy was asked.
        num_migrations: Samples that were cut while running.
        reactions: ``(time, reaction)`` of each look that changed something.
    """

    num_looks: int = 0
    num_migrations: int = 0
    reactions: list[tuple[float, Reaction]] = field(default_factory=list)


async def run_rollout(policy: Policy, plan: RolloutPlan, ports: RolloutPorts) -> RolloutRecord:
    """Return what was done to complete every sample of the batch."""
    record = RolloutRecord()
    ports.pool.start(plan.fleet)
    for replica in range(len(plan.fleet)):
        samples = plan.order[plan.replica_of[plan.order] == replica]
        if len(samples):
            ports.engine.place(samples, replica)
    look_s = plan.first_look_s
    while not ports.engine.is_done():
        await ports.clock.wait(look_s)
        if ports.engine.is_done():
            break
        view = ports.engine.observe()
        rescue = _rescue(view, plan)
        if rescue is not None:
            _enact(rescue, view, ports, record)
            view = ports.engine.observe()
        reaction = policy.react(view, plan)
        record.num_looks += 1
        _enact(reaction, view, ports, record)
        look_s = reaction.next_look_s
    return record


def _rescue(view: RolloutView, plan: RolloutPlan) -> Reaction | None:
    """Return placements for samples that lost their replica; ``None`` when there are none.

    Samples that the plan itself held back (``replica_of`` -1) have lost nothing: the policy places them.
    """
    lost = np.flatnonzero((view.state == HELD) & (plan.replica_of >= 0) & (view.replica_of < 0))
    if not len(lost):
        return None
    starts, moves = place_orphans(view, lost, plan.fleet)
    return Reaction(
        next_look_s=view.now_s, starts=starts, moves=moves, reason=f"{len(lost)} samples lost their replica"
    )


def _enact(reaction: Reaction, view: RolloutView, ports: RolloutPorts, record: RolloutRecord) -> None:
    """Do what a policy decided on ``view``, starts first since moves may name their replicas, and record it."""
    if reaction.starts:
        ports.pool.start(reaction.starts)
    for move in reaction.moves:
        is_cut = (view.state[move.samples] == RUNNING) & (view.replica_of[move.samples] != move.replica)
        assert not (view.state[move.samples] == FINISHED).any(), "a policy moved a finished sample"
        record.num_migrations += int(is_cut.sum())
        ports.engine.place(move.samples, move.replica)
    if reaction.releases:
        ports.pool.release(reaction.releases)
    if reaction.fuse_gpus:
        ports.inference.fuse(reaction.fuse_gpus)
    if reaction.starts or reaction.moves or reaction.releases or reaction.fuse_gpus:
        record.reactions.append((view.now_s, reaction))
