"""Decisions during a rollout on a leased fleet: route what waits, consolidate the tail, give back what is empty.

Invariants: a replica is released only when no unfinished sample is meant for it; nothing starts beyond the free GPUs;
work and releases of one look never name the same replica.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from verl_rlhfless.policy.goal import Goal
from verl_rlhfless.policy.migrate import Change, consolidate
from verl_rlhfless.policy.routing import RoutingPolicy
from verl_rlhfless.policy.snapshot import (
    FINISHED,
    GONE,
    READY,
    STARTING,
    WAITING,
    Move,
    Reaction,
    RolloutPlan,
    RolloutView,
)


@dataclass(frozen=True)
class Resizing:
    """Routes as the given policy does, and resizes the fleet.

    Attributes:
        routing: Moves what waits, and evens out what runs.
        goal: Hysteresis of a change.
        consolidates: Whether running samples may be cut so that replicas end early; else only empty ones end.
    """

    routing: RoutingPolicy
    goal: Goal
    consolidates: bool = True

    def react(self, view: RolloutView, plan: RolloutPlan) -> Reaction:
        """Return moves of what waits; when there are none, the change of the fleet that pays, and what is empty."""
        has_waiting = bool((view.state == WAITING).any())
        foresight = self.routing.foresee(view)
        routed = self.routing.route(view if has_waiting else _without(view, empty_replicas(view)), foresight)
        change = Change(0.0)
        if not routed.moves and self.consolidates and _is_settled(view):
            change = consolidate(view, foresight.prediction, plan.price, self.goal.hysteresis, len(plan.fleet))
        moves = routed.moves or change.moves
        ended = () if routed.moves or change.starts else empty_replicas(view, moves)
        return replace(
            routed,
            starts=change.starts,
            moves=moves,
            releases=ended,
            reason=_reason(routed.reason, change.reason, ended),
        )


def _is_settled(view: RolloutView) -> bool:
    """Return whether every unfinished sample has a replica, and all replicas are up: else nothing is consolidated."""
    has_place = bool((view.replica_of[view.alive] >= 0).all()) and len(view.alive) > 0
    return has_place and not any(r.state == STARTING for r in view.replicas)


def empty_replicas(view: RolloutView, moves: tuple[Move, ...] = ()) -> tuple[int, ...]:
    """Return the ready replicas that no unfinished sample is meant for once ``moves`` are made.

    A replica on which requests of others run (validation, further prompts) is not empty.
    """
    meant = view.replica_of.copy()
    for move in moves:
        meant[move.samples] = move.replica
    used = set(meant[view.state != FINISHED].tolist())
    left = {move.replica for move in moves}
    held = view.num_held
    return tuple(
        r.replica
        for r in view.replicas
        if r.state == READY and r.replica not in used | left and r.num_running <= held[r.replica]
    )


def _without(view: RolloutView, hidden: tuple[int, ...]) -> RolloutView:
    """Return the view as if some replicas were gone: what runs is not moved onto a replica that is about to end."""
    seen = tuple(replace(r, state=GONE) if r.replica in hidden else r for r in view.replicas)
    return replace(view, replicas=seen)


def _reason(routed: str, changed: str, ended: tuple[int, ...]) -> str:
    released = f"replica {', '.join(map(str, ended))} has nothing left to do" if ended else ""
    return "; ".join(part for part in (routed or changed, released) if part)
