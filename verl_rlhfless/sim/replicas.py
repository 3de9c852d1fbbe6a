"""The life of simulated replicas: requested, leased, starting, ready, drained, gone or lost.

Invariant: a replica holds a lease of its own, or runs on the trainer's; it goes when its last request has left, unless
the fleet is static.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from verl_rlhfless.policy.snapshot import GONE, READY, STARTING, PoolSnapshot, ReplicaView, RolloutPlan
from verl_rlhfless.sim.engine import Engine
from verl_rlhfless.sim.leases import Lease, LeaseBook
from verl_rlhfless.sim.request import Request
from verl_rlhfless.types import BusySpan

JOURNAL_INTERVAL_S = 0.5
"""A lost replica costs at most this much progress (``rlhfless.migration.progress_interval_s``)."""


@dataclass(slots=True, eq=False)
class Replica:
    """One replica.

    Attributes:
        index: Its id.
        tp: GPUs of its engine.
        state: ``STARTING``, ``READY`` or ``GONE``.
        lease: Its own lease; ``None`` before the grant, and on the trainer's.
        inbound: Samples that are on their way to it.
        has_served: Whether samples were ever placed on it.
        is_draining: Whether it gets no more work.
        link_free_s: When the keys and values that other replicas send it have arrived.
    """

    index: int
    tp: int
    engine: Engine = field(init=False)
    state: str = STARTING
    lease: Lease | None = None
    inbound: int = 0
    has_served: bool = False
    is_draining: bool = False
    link_free_s: float = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether it has nothing to do and nothing on its way."""
        return not self.inbound and self.engine.is_empty

    def view(self) -> ReplicaView:
        """Return what a policy sees of it."""
        engine = self.engine
        waiting, running = len(engine.waiting), len(engine.decoding) + len(engine.prefilling)
        return ReplicaView(self.index, self.tp, self.state, waiting, running, engine.context_tokens)


@dataclass
class Replicas:
    """Every replica of one rollout, by id; the mechanics behind ``ports.ReplicaPool``.

    Attributes:
        book: Who leases what.
        pool: Performance, and times of starts.
        plan: The rollout's plan: whether replicas are resident, and whether they keep their lease when empty.
        resident_lease: Id of the trainer's lease, on which resident replicas run.
        on_leave: Called with ``(replica, request, is_aborted)`` when a request leaves an engine.
        on_change: Called when a replica that was started later became usable.
    """

    book: LeaseBook
    pool: PoolSnapshot
    plan: RolloutPlan
    resident_lease: str
    on_leave: Callable[[Replica, Request, bool], None]
    on_change: Callable[[], None]

    def __post_init__(self) -> None:
        self.all: list[Replica] = []
        self.num_lost = 0

    def start(self, tps: Sequence[int]) -> None:
        """Request replicas; resident ones live on the trainer's lease."""
        for tp in tps:
            replica = self._add(tp)
            if self.plan.is_resident:
                self._ready_after(replica, self._resident_start_s(tp))
            else:
                self.book.request("replica", tp, self._granted(replica), self.pool.trainer.times.grant_s)

    def release(self, replicas: Sequence[int]) -> None:
        """Let replicas end with their last request."""
        for index in replicas:
            self.all[index].is_draining = True
            self.settle(self.all[index])

    def settle(self, replica: Replica) -> None:
        """Give the replica's lease back when it has nothing left to do and the fleet is not static."""
        if replica.is_draining or (replica.has_served and not self.plan.is_static):
            self._end(replica)

    def end(self) -> None:
        """The rollout is over: every replica goes."""
        for replica in self.all:
            if replica.state == READY:
                self._end(replica)
            elif replica.state == STARTING:
                replica.state = GONE
                if replica.lease is not None:
                    self.book.release(replica.lease)

    def lose_node(self, node: int) -> list[tuple[Replica, list[Request]]]:
        """Kill the replicas of a preempted node; return each with the requests it held, as journaled."""
        lost = []
        for replica in self.all:
            if replica.state == GONE or replica.lease is None or replica.lease.gpus[0][0] != node:
                continue
            self.num_lost += 1
            lost.append((replica, replica.engine.kill(JOURNAL_INTERVAL_S)))
            self._record_busy(replica)
            replica.state = GONE
            self.book.release(replica.lease)
        return lost

    @property
    def num_working_gpus(self) -> int:
        """GPUs of replicas that have something to do."""
        return sum(replica.tp for replica in self.all if replica.state != GONE and not replica.is_empty)

    @property
    def prefill_tokens(self) -> int:
        """Prompt and continuation tokens that all engines computed."""
        return sum(replica.engine.prefill_tokens for replica in self.all)

    @property
    def num_preemptions(self) -> int:
        """Requests that an engine preempted for lack of KV blocks."""
        return sum(replica.engine.num_preemptions for replica in self.all)

    def _resident_start_s(self, tp: int) -> float:
        """Return how long an engine on the trainer's lease takes; shared ones slept, and load what is published."""
        trainer, times = self.pool.trainer, self.pool.trainer.times
        if self.pool.shares_engines:
            return times.wake_s + self.pool.perf[tp].load_s
        is_warm = self.pool.warm.get(tp, 0) >= tp
        return (times.hybrid_wake_s if is_warm else times.cold_start_s) + trainer.reshard_s

    def _add(self, tp: int) -> Replica:
        replica = Replica(len(self.all), tp)
        perf = self.pool.perf[tp]
        replica.engine = Engine(self.book.env, perf, partial(self.on_leave, replica))
        self.all.append(replica)
        return replica

    def _granted(self, replica: Replica) -> Callable[[Lease, bool], None]:
        """Return what to do at a replica's grant: start its engine, or give the lease back if the rollout is over."""

        def granted(lease: Lease, is_warm: bool) -> None:
            if replica.state == GONE:
                self.book.release(lease, replica.tp if is_warm else None)
                return
            replica.lease = lease
            times = self.pool.trainer.times
            start_s = times.wake_s if is_warm else times.cold_start_s
            self._ready_after(replica, start_s + replica.engine.perf.load_s)

        return granted

    def _ready_after(self, replica: Replica, delay_s: float) -> None:
        """Let a replica become usable in ``delay_s`` seconds, unless it is gone by then."""

        def ready() -> None:
            if replica.state != STARTING:
                return
            replica.state = READY
            if replica.lease is not None:
                replica.lease.usable_s = self.book.env.now
            replica.engine.start()
            self.settle(replica)
            if len(self.all) > len(self.plan.fleet):
                self.on_change()

        self.book.after(delay_s, ready)

    def _end(self, replica: Replica) -> None:
        """Let a replica go that is ready and empty; its lease ends when its engine sleeps."""
        if replica.state != READY or not replica.is_empty:
            return
        replica.state = GONE
        self._record_busy(replica)
        if replica.lease is not None:
            lease, tp = replica.lease, replica.tp
            self.book.after(self.pool.trainer.times.park_s, lambda: self.book.release(lease, tp))

    def _record_busy(self, replica: Replica) -> None:
        lease_id = self.resident_lease if replica.lease is None else replica.lease.lease_id
        for span in replica.engine.busy:
            end_s = span[1] if len(span) == 2 else self.book.env.now
            self.book.busy.append(BusySpan(lease_id, replica.tp, span[0], end_s))
