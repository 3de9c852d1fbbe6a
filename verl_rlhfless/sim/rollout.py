"""One simulated rollout behind the ports: replicas with their engines, moves, fused inference, losses.

Invariants: a sample is on at most one engine; it finishes once; whatever a lost replica held comes back with its
journaled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
import simpy

from verl_rlhfless.policy.snapshot import (
    FINISHED,
    GONE,
    HELD,
    READY,
    RUNNING,
    STARTING,
    WAITING,
    Batch,
    IntArray,
    PoolSnapshot,
    ReplicaView,
    RolloutPlan,
    RolloutView,
)
from verl_rlhfless.sim.engine import Engine, Request
from verl_rlhfless.sim.leases import Lease, LeaseBook
from verl_rlhfless.types import BusySpan

JOURNAL_INTERVAL_S = 0.5
"""A lost replica costs at most this much progress (``rlhfless.migration.progress_interval_s``)."""


@dataclass(slots=True)
class _Replica:
    index: int
    tp: int
    engine: Engine = field(init=False)
    state: str = STARTING
    lease: Lease | None = None
    inbound: int = 0
    has_served: bool = False
    is_draining: bool = False


@dataclass(slots=True)
class _Fuse:
    num_gpus: int
    lease: Lease | None
    is_running: bool = True


class _Until:
    """An awaitable SimPy event, so that the same coroutine runs here and under asyncio."""

    def __init__(self, event: simpy.Event) -> None:
        self._event = event

    def __await__(self) -> Generator[simpy.Event, object, object]:
        return (yield self._event)


class SimRollout:
    """Implements every port of ``ports.RolloutPorts`` but the weight store."""

    def __init__(self, book: LeaseBook, pool: PoolSnapshot, batch: Batch, lengths: IntArray, plan: RolloutPlan) -> None:
        self.env, self.book, self.pool, self.batch, self.plan = book.env, book, pool, batch, plan
        self._start_s = self.env.now
        self._target = np.maximum(lengths, 1).tolist()
        count = batch.num_samples
        self._generated = [0] * count
        self._state = [HELD] * count
        self._replica_of = [-1] * count
        self._at = [-1] * count  # where a sample really is while its move is pending
        self._requests: list[Request] = [
            Request(sample, group, prompt, target)
            for sample, (group, prompt, target) in enumerate(
                zip(batch.group_of.tolist(), batch.prompt_tokens.tolist(), self._target, strict=True)
            )
        ]
        self._replicas: list[_Replica] = []
        self._fuses: list[_Fuse] = []
        self._left = count
        self._fuse_ready: list[int] = []
        self._fuse_next = 0
        self.fused_tokens = 0
        self.finished_s = np.zeros(count)
        self._waiter: simpy.Event | None = None
        self.busy_origin: str | None = None
        self.num_lost = 0

    # ---- Clock ----

    def now_s(self) -> float:
        """Return the seconds since the rollout began."""
        return self.env.now - self._start_s

    async def wait(self, until_s: float) -> None:
        """Return at ``until_s`` or when a replica became ready or was lost or every sample finished."""
        waiter = self._waiter = self.env.event()
        if until_s < 1e11:
            delay = max(0.0, until_s - self.now_s())
            timer = self.env.timeout(delay)
            assert timer.callbacks is not None
            timer.callbacks.append(lambda _event: _fire(waiter))
        await _Until(waiter)

    def _notify(self) -> None:
        if self._waiter is not None:
            _fire(self._waiter)

    # ---- ReplicaPool ----

    def start(self, tps: Sequence[int]) -> None:
        """Request replicas; resident ones live on the trainer's lease."""
        for tp in tps:
            replica = self._add(tp)
            times = self.pool.trainer.times
            if self.plan.is_resident:
                is_warm = self.pool.warm.get(tp, 0) >= tp
                wake = times.hybrid_wake_s if is_warm else times.cold_start_s
                self._ready_after(replica, wake + self.pool.trainer.reshard_s)
            else:
                self.book.request("replica", tp, self._granted(replica), times.grant_s)

    def _add(self, tp: int) -> _Replica:
        replica = _Replica(len(self._replicas), tp)
        replica.engine = Engine(
            self.env, self.pool.perf[tp], lambda request, cut: self._on_leave(replica, request, cut)
        )
        self._replicas.append(replica)
        return replica

    def _granted(self, replica: _Replica) -> Callable[[Lease, bool], None]:
        def granted(lease: Lease, is_warm: bool) -> None:
            if replica.state == GONE:
                self.book.release(lease, replica.tp if is_warm else None)
                return
            replica.lease = lease
            times = self.pool.trainer.times
            start = times.wake_s if is_warm else times.cold_start_s
            self._ready_after(replica, start + replica.engine.perf.load_s)

        return granted

    def _ready_after(self, replica: _Replica, delay_s: float) -> None:
        self._call_after(delay_s, lambda: self._ready(replica))

    def _ready(self, replica: _Replica) -> None:
        if replica.state != STARTING:
            return
        replica.state = READY
        if replica.lease is not None:
            replica.lease.usable_s = self.env.now
        replica.engine.start()
        self._release_if_empty(replica)
        if self.now_s() > 0 and len(self._replicas) > len(self.plan.fleet):
            self._notify()

    def release(self, replicas: Sequence[int]) -> None:
        """Let replicas end with their last request."""
        for index in replicas:
            self._replicas[index].is_draining = True
            self._release_if_empty(self._replicas[index])

    def _release_if_empty(self, replica: _Replica, force: bool = False) -> None:
        may_go = force or replica.is_draining or (replica.has_served and not self.plan.is_static)
        if replica.state != READY or replica.engine.num_requests or replica.inbound or not may_go:
            return
        replica.state = GONE
        self._record_busy(replica)
        if replica.lease is None:
            return
        lease, tp = replica.lease, replica.tp
        self._call_after(self.pool.trainer.times.park_s, lambda: self.book.release(lease, tp))

    def _record_busy(self, replica: _Replica) -> None:
        origin = replica.lease.lease_id if replica.lease is not None else self.busy_origin
        assert origin is not None
        for span in replica.engine.busy:
            end = span[1] if len(span) == 2 else self.env.now
            self.book.busy.append(BusySpan(origin, replica.tp, span[0], end))

    # ---- RolloutEngine ----

    def place(self, samples: IntArray, replica: int) -> None:
        """Send samples to a replica; running ones are cut at the next iteration boundary and continue there."""
        target = self._replicas[replica]
        target.has_served = True
        cut: dict[int, set[int]] = {}
        for sample in samples.tolist():
            before, at = self._replica_of[sample], self._at[sample]
            if before == replica or self._state[sample] == FINISHED:
                continue
            self._replica_of[sample] = replica
            if at < 0:
                self._at[sample] = replica
                self._state[sample] = WAITING
                target.engine.submit(self._requests[sample])
                continue
            if before != at:
                self._replicas[before].inbound -= 1
            if replica != at:
                target.inbound += 1
            if before == at:
                cut.setdefault(at, set()).add(sample)
        for at, moved in cut.items():
            self._replicas[at].engine.abort(moved)

    def _on_leave(self, source: _Replica, request: Request, is_cut: bool) -> None:
        sample = request.sample
        self._generated[sample] = request.generated
        target = self._replicas[self._replica_of[sample]]
        if target is not source:
            target.inbound -= 1
        if is_cut and request.generated < request.target:
            request.has_kv = self.plan.has_kv_pool and request.generated > 0
            self._state[sample] = WAITING
            self._at[sample] = target.index
            target.engine.submit(request)
        else:
            self._state[sample] = FINISHED
            self._replica_of[sample] = self._at[sample] = source.index
            self.finished_s[sample] = self.now_s()
            self._fuse_ready.append(request.prompt_tokens + request.generated)
            self._left -= 1
            self._release_if_empty(target)
        self._release_if_empty(source)
        if not self._left:
            self._all_finished()

    def _all_finished(self) -> None:
        for replica in self._replicas:
            if replica.state == READY:
                self._release_if_empty(replica, force=True)
            elif replica.state == STARTING:
                self._abandon(replica)
        for fuse in self._fuses:
            self._end_fuse(fuse)
        self._notify()

    def _abandon(self, replica: _Replica) -> None:
        replica.state = GONE
        if replica.lease is not None:
            self.book.release(replica.lease)

    def is_done(self) -> bool:
        """Return whether every sample is complete."""
        return self._left == 0

    def observe(self) -> RolloutView:
        """Return the rollout as it is now."""
        for replica in self._replicas:
            if replica.state == READY:
                for sample, generated in replica.engine.progress():
                    self._generated[sample] = generated
                    self._state[sample] = RUNNING
        free = self._unused_resident() if self.plan.is_resident else self.book.num_free
        return RolloutView(
            now_s=self.now_s(),
            batch=self.batch,
            pool=self.pool,
            generated=np.array(self._generated, dtype=np.int64),
            state=np.array(self._state, dtype=np.int8),
            replica_of=np.array(self._replica_of, dtype=np.int64),
            replicas=tuple(
                ReplicaView(
                    r.index, r.tp, r.state, len(r.engine.waiting), len(r.engine.decoding), r.engine.context_tokens
                )
                for r in self._replicas
            ),
            free_gpus=free,
            fuse_tokens=sum(self._fuse_ready[self._fuse_next :]),
            fusing_gpus=sum(fuse.num_gpus for fuse in self._fuses if fuse.is_running),
        )

    def _unused_resident(self) -> int:
        working = sum(r.tp for r in self._replicas if r.state != GONE and (r.engine.num_requests or r.inbound))
        return self.pool.trainer.num_gpus - working - sum(f.num_gpus for f in self._fuses if f.is_running)

    # ---- InferenceWorkers ----

    def fuse(self, num_gpus: int) -> None:
        """Begin inference on finished samples with freed GPUs.

        It ends with the rollout, or earlier when nothing is left to do.
        """
        trainer = self.pool.trainer
        fuse = _Fuse(num_gpus, None)
        self._fuses.append(fuse)
        if self.plan.is_resident:
            self._call_after(trainer.times.hybrid_sleep_s + trainer.fuse_load_s, lambda: self._fuse_chunk(fuse))
            return

        def granted(lease: Lease) -> None:
            fuse.lease = lease
            if not fuse.is_running:
                self.book.release(lease)
                return
            self._call_after(trainer.times.wake_s + trainer.fuse_load_s, lambda: self._fuse_usable(fuse))

        self.book.request_gpus("fuse", num_gpus, granted, trainer.times.grant_s)

    def _fuse_usable(self, fuse: _Fuse) -> None:
        if fuse.lease is not None and fuse.lease.usable_s is None:
            fuse.lease.usable_s = self.env.now
        self._fuse_chunk(fuse)

    def _fuse_chunk(self, fuse: _Fuse) -> None:
        if not fuse.is_running:
            return
        trainer = self.pool.trainer
        limit, first, tokens = fuse.num_gpus * trainer.recipe.micro_tokens, self._fuse_next, 0
        while self._fuse_next < len(self._fuse_ready) and tokens < limit:
            tokens += self._fuse_ready[self._fuse_next]
            self._fuse_next += 1
        if not tokens:
            self._end_fuse(fuse)
            return
        context = tokens / (self._fuse_next - first)
        seconds = tokens / (trainer.fuse_tokens_per_s(context) * fuse.num_gpus)
        began = self.env.now

        def done() -> None:
            if fuse.is_running:
                self.fused_tokens += tokens
                self._record_fuse(fuse, began)
                self._fuse_chunk(fuse)

        self._call_after(seconds, done)

    def _record_fuse(self, fuse: _Fuse, began: float) -> None:
        origin = fuse.lease.lease_id if fuse.lease is not None else self.busy_origin
        assert origin is not None
        self.book.busy.append(BusySpan(origin, fuse.num_gpus, began, self.env.now))

    def _end_fuse(self, fuse: _Fuse) -> None:
        if fuse.is_running:
            fuse.is_running = False
            if fuse.lease is not None:
                self.book.release(fuse.lease)

    def _call_after(self, delay_s: float, action: Callable[[], None]) -> None:
        callbacks = self.env.timeout(delay_s).callbacks
        assert callbacks is not None
        callbacks.append(lambda _event: action())

    # ---- losses ----

    def lose_node(self, node: int) -> None:
        """Kill every replica of a preempted node; its samples are held with their journaled tokens."""
        for replica in self._replicas:
            if replica.state == GONE or replica.lease is None or replica.lease.gpus[0][0] != node:
                continue
            self.num_lost += 1
            left = replica.engine.kill(JOURNAL_INTERVAL_S)
            self._record_busy(replica)
            replica.state = GONE
            self.book.release(replica.lease)
            for request in left:
                self._orphan(replica, request)
            for sample, target in enumerate(self._replica_of):
                if target == replica.index and self._at[sample] not in (-1, replica.index):
                    self._replica_of[sample] = self._at[
                        sample
                    ]  # it was on its way here: its cut returns it to its source
            replica.inbound = 0
        self._notify()

    def _orphan(self, replica: _Replica, request: Request) -> None:
        sample = request.sample
        target = self._replica_of[sample]
        if target != replica.index:
            self._replicas[target].inbound -= 1
        request.to_compute = 0
        self._generated[sample] = request.generated
        self._state[sample], self._replica_of[sample], self._at[sample] = HELD, -1, -1

    @property
    def prefill_tokens(self) -> int:
        """Prompt and continuation tokens that all engines computed."""
        return sum(replica.engine.prefill_tokens for replica in self._replicas)

    @property
    def num_preemptions(self) -> int:
        """Requests that an engine preempted for lack of KV blocks."""
        return sum(replica.engine.num_preemptions for replica in self._replicas)


def _fire(event: simpy.Event) -> None:
    if not event.triggered:
        event.succeed()
