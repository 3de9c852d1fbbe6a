"""The samples of one announced rollout: state, replica and queue of each.

Invariants: a sample waits in at most one replica's queue; one that waits or runs has a replica that is not gone, one
that is held has none. Queues serve what already began first, then the plan's order. A moved entry stays behind in its
old queue and is skipped there.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from verl_rlhfless.live.admission import ServerLoad
from verl_rlhfless.live.tickets import SampleKey, Ticket
from verl_rlhfless.policy.snapshot import (
    FINISHED,
    GONE,
    HELD,
    RUNNING,
    STARTING,
    WAITING,
    Batch,
    FloatArray,
    IntArray,
    PoolSnapshot,
    ReplicaView,
    RolloutView,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Rollout:
    """What is announced before the first prompt is submitted.

    Attributes:
        batch: The prompts.
        samples: [B] who each sample is.
        rank: [B] int64, position of each sample in the plan's order.
        predicted: [B] float64, response tokens that each sample will probably have.
        pool: What policies know about the pool.
    """

    batch: Batch
    samples: tuple[SampleKey, ...]
    rank: IntArray
    predicted: FloatArray
    pool: PoolSnapshot


@dataclass(slots=True)
class Turn:
    """An open ticket.

    Attributes:
        ticket: What was submitted.
        sample: Number of its sample; -1 when nobody announced it.
        generated: Tokens so far, those of the attempt that runs left out.
        num_attempts: Attempts granted.
        num_faults: Attempts that ended because an engine or server died, or was away before it added a token.
        attempt: The attempt that was granted and not reported yet; empty while the ticket waits.
        server: Where that attempt runs; ``None`` when there is none, or its server is gone.
        is_cut: The end of that attempt is our decision, not a fault.
    """

    ticket: Ticket
    sample: int
    generated: int = 0
    num_attempts: int = 0
    num_faults: int = 0
    attempt: str = ""
    server: str | None = None
    is_cut: bool = False


@dataclass(slots=True)
class Replica:
    """One replica of the rollout with its queue; ``server`` is its id in the router once it is up."""

    index: int
    tp: int
    state: str = STARTING
    server: str | None = None
    num_waiting: int = 0
    queue: list[tuple[bool, int, int]] = field(default_factory=list)
    expected: list[tuple[int, int]] = field(default_factory=list)


class SampleTable:
    """Where every sample is, and in which order the replicas serve them."""

    def __init__(self, rollout: Rollout) -> None:
        count = rollout.batch.num_samples
        self.rollout = rollout
        self.replicas: list[Replica] = []
        self.num_left = count
        self.is_settled = False
        self.state: NDArray[np.int8] = np.full(count, HELD, dtype=np.int8)
        self.replica_of: IntArray = np.full(count, -1, dtype=np.int64)
        self.generated: IntArray = np.zeros(count, dtype=np.int64)
        self.turn_of: list[Turn | None] = [None] * count
        self._before = [0] * count  # tokens of earlier turns
        self._has_begun = [False] * count
        self._index = {key: sample for sample, key in enumerate(rollout.samples)}
        self._rank: list[int] = rollout.rank.tolist()

    def find(self, key: SampleKey | None) -> int:
        """Return the number of an unfinished sample, -1 when there is none."""
        sample = self._index.get(key, -1) if key is not None else -1
        return sample if sample >= 0 and self.state[sample] != FINISHED else -1

    def view(self, now_s: float, free_gpus: int, loads: Mapping[str, ServerLoad]) -> RolloutView:
        """Return the rollout as policies see it. A replica that drains counts as gone."""
        return RolloutView(
            now_s=now_s,
            batch=self.rollout.batch,
            pool=self.rollout.pool,
            generated=self.generated.copy(),
            state=self.state.copy(),
            replica_of=self.replica_of.copy(),
            replicas=tuple(_view_of(entry, loads.get(entry.server or "")) for entry in self.replicas),
            free_gpus=free_gpus,
            fuse_tokens=0,
            fuse_samples=0,
            fusing_gpus=0,
        )

    # ---- turns

    def open_turn(self, turn: Turn) -> None:
        """Note that the turn's sample waits for a replica."""
        sample = turn.sample
        self.turn_of[sample] = turn
        self._has_begun[sample] = True
        if self.state[sample] == WAITING:
            self._push(sample)

    def close_turn(self, turn: Turn) -> None:
        """Note that a turn is over: until its next one the sample holds nothing, and prefers its last replica."""
        sample = turn.sample
        self.turn_of[sample] = None
        self._before[sample] += turn.generated
        self.generated[sample] = self._before[sample]
        self.wait_again(sample)

    def run(self, replica: Replica, turn: Turn) -> None:
        """Take the head of a replica's queue out, because it was granted."""
        heapq.heappop(replica.queue)
        replica.num_waiting -= 1
        self.state[turn.sample] = RUNNING

    def predicted_tokens(self, turn: Turn) -> int:
        """Return the tokens that a turn will probably hold in the end, its prompt included."""
        further = self.rollout.predicted[turn.sample] - self.generated[turn.sample]
        return turn.ticket.prompt_tokens + turn.generated + max(1, int(further))

    def wait_again(self, sample: int) -> None:
        """Queue a sample whose attempt ended, at the replica that it is meant for; hold it if that one is gone."""
        if self.state[sample] == RUNNING and self._of(sample).state == GONE:
            self.hold(sample)
        elif self.state[sample] == RUNNING:
            self._enqueue(sample)
        elif self.state[sample] == WAITING and self.turn_of[sample] is not None:
            self._push(sample)

    def grow(self, turn: Turn, tokens: int) -> None:
        """Note the tokens of a turn so far."""
        self.generated[turn.sample] = self._before[turn.sample] + tokens

    # ---- places

    def move(self, sample: int, replica: int) -> None:
        """Send a sample that does not run to a replica's queue; to a replica that is gone = hold it."""
        self.hold(sample)
        if self.replicas[replica].state != GONE:
            self.replica_of[sample] = replica
            self._enqueue(sample)

    def hold(self, sample: int) -> None:
        """Take a sample's replica from it."""
        if self.state[sample] == WAITING:
            self._of(sample).num_waiting -= 1
        self.state[sample], self.replica_of[sample] = HELD, -1

    def finish(self, sample: int) -> None:
        """Note that a sample is complete."""
        if self.state[sample] == WAITING:
            self._of(sample).num_waiting -= 1
        self._has_begun[sample] = True
        self.state[sample] = FINISHED
        self.num_left -= 1

    def retire(self, replica: Replica) -> None:
        """Close a replica: what waits there is held until it gets another place."""
        replica.state = GONE
        here = (self.replica_of == replica.index) & (self.state == WAITING)
        for sample in np.flatnonzero(here).tolist():
            self.hold(sample)
        replica.queue.clear()
        replica.expected.clear()
        self._turn_back(replica)

    def _turn_back(self, replica: Replica) -> None:
        """Let samples that are being cut for a replica that closed continue where they come from."""
        source = {entry.server: entry.index for entry in self.replicas if entry.server is not None}
        bound = (self.replica_of == replica.index) & (self.state == RUNNING)
        for sample in np.flatnonzero(bound).tolist():
            turn = self.turn_of[sample]
            if turn is not None and turn.server is not None:
                self.replica_of[sample] = source[turn.server]

    # ---- queues

    def head(self, replica: Replica) -> Turn | None:
        """Return the turn that a replica's queue serves next, ``None`` when nothing waits there."""
        queue = replica.queue
        while queue and not self._is_at(queue[0][2], replica):
            heapq.heappop(queue)
        return self.turn_of[queue[0][2]] if queue else None

    def is_early(self, replica: Replica) -> bool:
        """Return whether the head would start before a prompt that the plan puts first but is still on its way."""
        expected = replica.expected
        while expected and not self._is_expected(expected[0][1], replica):
            heapq.heappop(expected)
        is_fresh, *place = replica.queue[0]
        return bool(expected) and not self.is_settled and is_fresh and expected[0] < tuple(place)

    def _is_at(self, sample: int, replica: Replica) -> bool:
        turn = self.turn_of[sample]
        return turn is not None and not turn.attempt and self.replica_of[sample] == replica.index

    def _is_expected(self, sample: int, replica: Replica) -> bool:
        return not self._has_begun[sample] and self.replica_of[sample] == replica.index

    def _enqueue(self, sample: int) -> None:
        replica = self._of(sample)
        replica.num_waiting += 1
        self.state[sample] = WAITING
        turn = self.turn_of[sample]
        if turn is not None and not turn.attempt:
            self._push(sample)
        elif not self._has_begun[sample]:
            heapq.heappush(replica.expected, (self._rank[sample], sample))

    def _push(self, sample: int) -> None:
        entry = (not self.generated[sample], self._rank[sample], sample)
        heapq.heappush(self._of(sample).queue, entry)

    def _of(self, sample: int) -> Replica:
        return self.replicas[int(self.replica_of[sample])]


def _view_of(replica: Replica, load: ServerLoad | None) -> ReplicaView:
    num_running, context = (load.num_requests, load.context_tokens) if load is not None else (0, 0)
    return ReplicaView(replica.index, replica.tp, replica.state, replica.num_waiting, num_running, context)
