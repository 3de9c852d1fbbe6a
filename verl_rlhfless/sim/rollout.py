"""One simulated rollout behind the ports: where every sample is, how it gets there, turns, moves and losses.

Invariants: a sample is on at most one engine; it finishes once; whatever a lost replica held comes back with its
journaled tokens. A sample that is ``bound`` to a replica but not ``at`` one is on its way, or may not start yet.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial

import numpy as np
import simpy

from verl_rlhfless.policy.dedup import BatchPrefixes, batch_prefixes
from verl_rlhfless.policy.dispatch import rebind
from verl_rlhfless.policy.snapshot import (
    FINISHED,
    HELD,
    NEVER,
    READY,
    RUNNING,
    WAITING,
    FloatArray,
    IntArray,
    PoolSnapshot,
    RolloutPlan,
    RolloutView,
)
from verl_rlhfless.sim.fused import FusedInference
from verl_rlhfless.sim.leases import LeaseBook
from verl_rlhfless.sim.replicas import Replica, Replicas
from verl_rlhfless.sim.request import Request, chain_of
from verl_rlhfless.sim.workload import StepData


class _Until:
    """An awaitable SimPy event, so that the same coroutine runs here and under asyncio."""

    def __init__(self, event: simpy.Event) -> None:
        self._event = event

    def __await__(self) -> Generator[simpy.Event, object, object]:
        return (yield self._event)


class SimRollout:
    """Implements every port of ``ports.RolloutPorts``.

    ``min_start_s`` of the step counts from here on.
    """

    def __init__(
        self, book: LeaseBook, pool: PoolSnapshot, step: StepData, plan: RolloutPlan, trainer_lease: str
    ) -> None:
        self.env, self.book, self.pool, self.batch, self.plan = book.env, book, pool, step.batch, plan
        self.begin_s = self.env.now
        count = self._left = self.batch.num_samples
        self._generated = np.zeros(count, dtype=np.int64)
        self._state = np.full(count, HELD, dtype=np.int8)
        self._bound = np.full(count, -1, dtype=np.int64)  # the replica that each sample is meant for
        self._at = [-1] * count  # the replica whose engine has it, or had it last
        self._away: set[int] = set()  # samples whose keys and values travel, or that may not start yet
        self._turns = {sample: list(reversed(ends)) for sample, ends in step.turn_ends.items()}
        self.finished_s = np.zeros(count)
        prefixes = batch_prefixes(self.batch)
        self.distinct_prompt_tokens = prefixes.num_tokens
        self._requests = self._new_requests(step, prefixes)
        self.replicas = Replicas(book, pool, plan, trainer_lease, self._on_leave, self._notify)
        self.inference = FusedInference(book, pool.trainer, trainer_lease if plan.is_resident else None)
        self._waiter: simpy.Event | None = None
        if step.min_start_s is not None:
            self._hold_back(step.min_start_s)

    def _new_requests(self, step: StepData, prefixes: BatchPrefixes) -> list[Request]:
        chains = [chain_of(prefixes.chain(group)) for group in range(len(self.batch.prompt_ids))]
        groups, prompts = self.batch.group_of.tolist(), self.batch.prompt_tokens.tolist()
        requests = [
            Request(sample, prompt, target, chains[group])
            for sample, (group, prompt, target) in enumerate(zip(groups, prompts, step.lengths.tolist(), strict=True))
        ]
        for sample in self._turns:
            self._begin_turn(requests[sample])
        return requests

    # ---- Clock ----

    def now_s(self) -> float:
        """Return the seconds since the rollout began."""
        return self.env.now - self.begin_s

    async def wait(self, until_s: float) -> None:
        """Return at ``until_s`` or when a replica became ready or was lost or every sample finished."""
        waiter = self._waiter = self.env.event()
        if until_s < NEVER:
            self.book.after(max(0.0, until_s - self.now_s()), lambda: _fire(waiter))
        await _Until(waiter)

    def _notify(self) -> None:
        if self._waiter is not None:
            _fire(self._waiter)

    # ---- ReplicaPool and InferenceWorkers ----

    def start(self, tps: Sequence[int]) -> None:
        """Request replicas."""
        self.replicas.start(tps)

    def release(self, replicas: Sequence[int]) -> None:
        """Let replicas end with their last request."""
        self.replicas.release(replicas)

    def fuse(self, num_gpus: int) -> None:
        """Begin inference on finished samples with freed GPUs."""
        self.inference.fuse(num_gpus)

    # ---- RolloutEngine ----

    def place(self, samples: IntArray, replica: int) -> None:
        """Send samples to a replica; running ones are cut at the next iteration boundary and continue there."""
        target = self.replicas.all[replica]
        target.has_served = True
        cut: dict[int, set[int]] = {}
        for sample in samples.tolist():
            before, at = int(self._bound[sample]), self._at[sample]
            if before == replica or self._state[sample] == FINISHED:
                continue
            self._bound[sample] = replica
            if before not in (-1, at):
                self.replicas.all[before].inbound -= 1
            if at < 0 and sample not in self._away:
                self._submit(self._requests[sample], target)
                continue
            if replica != at:
                target.inbound += 1
            if at < 0:
                self._state[sample] = WAITING
            elif before == at:
                cut.setdefault(at, set()).add(sample)
        for at, moved in cut.items():
            self.replicas.all[at].engine.abort(moved)

    def is_done(self) -> bool:
        """Return whether every sample is complete."""
        return self._left == 0

    def observe(self) -> RolloutView:
        """Return the rollout as it is now."""
        self._state[self._state == RUNNING] = WAITING  # unless it still is
        for replica in self.replicas.all:
            if replica.state == READY:
                samples, generated = replica.engine.progress()
                self._generated[samples], self._state[samples] = generated, RUNNING
                if replica.engine.prefilling:
                    self._state[[request.sample for request in replica.engine.prefilling]] = RUNNING
        is_resident, unused = self.plan.is_resident, self._num_unused
        assert unused >= 0 or not is_resident, "replicas decode on GPUs that run inference"
        return RolloutView(
            now_s=self.now_s(),
            batch=self.batch,
            pool=self.pool,
            generated=self._generated.copy(),
            state=self._state.copy(),
            replica_of=self._bound.copy(),
            replicas=tuple(replica.view() for replica in self.replicas.all),
            free_gpus=unused if is_resident else self.book.num_free,
            fuse_tokens=self.inference.pending_tokens,
            fuse_samples=self.inference.num_pending,
            fusing_gpus=self.inference.num_gpus,
            fusible_gpus=unused if is_resident else self.book.num_fusible,
        )

    @property
    def _num_unused(self) -> int:
        """GPUs of the trainer's lease that neither decode nor infer."""
        return self.pool.trainer.num_gpus - self.replicas.num_working_gpus - self.inference.num_gpus

    # ---- the way of a sample ----

    def _submit(self, request: Request, target: Replica) -> None:
        """Queue a request at its target's engine."""
        self._state[request.sample] = WAITING
        self._at[request.sample] = target.index
        target.engine.submit(request)

    def _on_leave(self, source: Replica, request: Request, is_aborted: bool) -> None:
        """A request left an engine: to continue elsewhere, for its next turn, or complete."""
        sample = request.sample
        self._generated[sample] = request.generated
        target = self.replicas.all[self._bound[sample]]
        if target is not source:
            target.inbound -= 1
        if request.generated < request.target:
            self._send(request, target)
        elif not request.is_last_turn:
            self._begin_turn(request)
            self._send(request, self._next_home(request, source) if target is source else target)
        else:
            self._finish(request, source)
            if target is not source:
                self.replicas.settle(target)
        self.replicas.settle(source)
        if not self._left:
            self.replicas.end()
            self.inference.end()
            self._notify()

    def _send(self, request: Request, target: Replica) -> None:
        """Bring a request with what it has generated to ``target``, with its keys and values where that pays."""
        source = self._at[request.sample]
        self._bound[request.sample] = target.index
        request.has_kv = self.plan.has_kv_pool and request.generated > 0
        copy_s = 0.0 if target.index == source else self._copy_s(request, target)
        if not copy_s:
            self._submit(request, target)
            return
        self._state[request.sample] = WAITING
        self._at[request.sample] = -1
        target.inbound += 1
        self._away.add(request.sample)
        self.book.after(copy_s, partial(self._arrive, request, target))

    def _copy_s(self, request: Request, target: Replica) -> float:
        """Return the seconds until keys and values have arrived, 0 when they are recomputed. Copies queue on a link."""
        perf, tokens = target.engine.perf, request.context_tokens
        copy_s = perf.move_s(tokens, self.pool.has_kv_transfer)
        if not request.generated or copy_s >= perf.move_s(tokens, has_kv_transfer=False):
            return 0.0
        target.link_free_s = max(self.env.now, target.link_free_s) + copy_s
        return target.link_free_s - self.env.now

    def _arrive(self, request: Request, sent_to: Replica | None) -> None:
        """A request may start: on the replica it is bound to by now, if any."""
        self._away.remove(request.sample)
        bound = int(self._bound[request.sample])
        if bound < 0:
            return
        target = self.replicas.all[bound]
        target.inbound -= 1
        request.has_kv = target is sent_to
        self._submit(request, target)

    def _hold_back(self, min_start_s: FloatArray) -> None:
        """Keep samples away until they may start, [B] seconds from now."""
        for sample in np.flatnonzero(min_start_s > 0).tolist():
            self._away.add(sample)
            self.book.after(float(min_start_s[sample]), partial(self._arrive, self._requests[sample], None))

    def _begin_turn(self, request: Request) -> None:
        """Let a request run to the end of its next turn."""
        ends = self._turns[request.sample]
        request.target = ends.pop()
        request.is_last_turn = not ends

    def _next_home(self, request: Request, source: Replica) -> Replica:
        """Return the replica of a session's next turn."""
        if not self.plan.rebinds_turns:
            return source
        ready = [r for r in self.replicas.all if r.state == READY and not r.is_draining]
        usable = [r.view() for r in ready if r is source or self._has_gpus(r)]
        return self.replicas.all[rebind(self.pool, usable, source.index, request.context_tokens)]

    def _has_gpus(self, replica: Replica) -> bool:
        """Return whether a replica can decode: where it shares the trainer's lease, inference may have its GPUs."""
        return not self.plan.is_resident or not replica.is_empty or replica.tp <= self._num_unused

    def _finish(self, request: Request, source: Replica) -> None:
        sample = request.sample
        self._state[sample] = FINISHED
        self._bound[sample] = self._at[sample] = source.index
        self.finished_s[sample] = self.now_s()
        self.inference.add(request.context_tokens)
        self._left -= 1

    # ---- losses ----

    def lose_node(self, node: int) -> None:
        """Kill every replica of a preempted node; its samples are held with their journaled tokens."""
        for replica, left in self.replicas.lose_node(node):
            for request in left:
                self._orphan(replica, request)
            for sample in np.flatnonzero((self._bound == replica.index) & (self._state != FINISHED)).tolist():
                self._bound[sample] = self._at[sample]  # it was on its way here: back to its source, or held
                if self._at[sample] < 0:
                    self._state[sample] = HELD
            replica.inbound = 0
        self._notify()

    def _orphan(self, replica: Replica, request: Request) -> None:
        """Hold a sample whose replica was lost, with the tokens that were journaled."""
        sample = request.sample
        target = int(self._bound[sample])
        if target != replica.index:
            self.replicas.all[target].inbound -= 1
        request.to_compute = 0
        self._generated[sample] = request.generated
        self._state[sample], self._bound[sample], self._at[sample] = HELD, -1, -1


def _fire(event: simpy.Event) -> None:
    if not event.triggered:
        event.succeed()
