"""A timeline as rectangles: one lane per GPU, and what the GPU did. Which GPU a lease held is not recorded.

Invariants: leases that overlap in time never share a lane; states are the ledger's: work before a lease is usable is
start-up, and at most the GPUs of a lease are busy.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from verl_rlhfless.report.timeline import Timeline

STATES = ("startup", "idle", "generation", "trainer")


@dataclass(frozen=True, slots=True)
class Box:
    """What one GPU did for a while.

    Attributes:
        lane: From 0.
        start_s: Wall-clock seconds, as ``end_s``.
        end_s: After ``start_s``.
        state: Of :data:`STATES`.
    """

    lane: int
    start_s: float
    end_s: float
    state: str


def boxes(timeline: Timeline) -> list[Box]:
    """Return every leased GPU-second of the run once."""
    changes = _changes(timeline)
    found: list[Box] = []
    for lease, lanes in zip(timeline.leases, _lanes(timeline), strict=True):
        end_s = timeline.watched_until_s if lease.released_s is None else lease.released_s
        usable_s = end_s if lease.usable_s is None else min(lease.usable_s, end_s)
        if lease.granted_s < usable_s:
            found += [Box(lane, lease.granted_s, usable_s, "startup") for lane in lanes]
        working = [0, 0]
        now_s = usable_s
        for at_s, kind, num_gpus in [*changes[lease.lease_id], (end_s, 0, 0)]:
            if now_s < min(at_s, end_s):
                states = _states(lease.num_gpus, *working)
                found += [Box(lane, now_s, min(at_s, end_s), state) for lane, state in zip(lanes, states, strict=True)]
                now_s = at_s
            working[kind] += num_gpus
    return found


def _changes(timeline: Timeline) -> defaultdict[str, list[tuple[float, int, int]]]:
    """Return, by lease, when work begins and ends: (time, 0 = trainer or 1 = engines, GPUs more or fewer)."""
    changes: defaultdict[str, list[tuple[float, int, int]]] = defaultdict(list)
    for kind, spans in enumerate((timeline.phases, timeline.generation)):
        for span in spans:
            changes[span.lease_id] += [(span.start_s, kind, span.num_gpus), (span.end_s, kind, -span.num_gpus)]
    for of_lease in changes.values():
        of_lease.sort()
    return changes


def _states(num_gpus: int, trainer: int, engines: int) -> list[str]:
    trainer = min(trainer, num_gpus)
    engines = min(engines, num_gpus - trainer)
    return ["trainer"] * trainer + ["generation"] * engines + ["idle"] * (num_gpus - trainer - engines)


def _lanes(timeline: Timeline) -> list[list[int]]:
    """Return the lanes of each lease: the lowest that are free when it is granted."""
    free_from_s: list[float] = []
    chosen = []
    for lease in timeline.leases:  # in the order of their grants
        free = [lane for lane, at_s in enumerate(free_from_s) if at_s <= lease.granted_s]
        lanes = [*free, *range(len(free_from_s), len(free_from_s) + lease.num_gpus)][: lease.num_gpus]
        free_from_s += [0.0] * (max(lanes, default=-1) + 1 - len(free_from_s))
        for lane in lanes:
            free_from_s[lane] = timeline.watched_until_s if lease.released_s is None else lease.released_s
        chosen.append(lanes)
    return chosen
