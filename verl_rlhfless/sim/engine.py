"""One simulated vLLM engine: continuous batching by iterations, a run of equal iterations being one event.

Modelled as in vLLM V1: token budget per iteration with chunked prefill, ``max_num_seqs``, KV blocks, prefix-cache hits
at full blocks with shared blocks counted once, first-come admission, recompute preemption of the youngest request,
aborts and arrivals that take effect at the next iteration boundary. A pure decode phase has a closed form.

Invariants: blocks in use never exceed the capacity; every request leaves exactly once per visit, done or aborted.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import simpy

from verl_rlhfless.policy.perf import EnginePerf
from verl_rlhfless.policy.snapshot import IntArray
from verl_rlhfless.sim.kvblocks import KvBlocks
from verl_rlhfless.sim.prefixcache import PrefixCache
from verl_rlhfless.sim.request import Request


class _Segment(NamedTuple):
    """What an engine does until its next event: one kind of iteration, so that the end follows in closed form.

    Attributes:
        start_s: When it began [s].
        iterations: Decode iterations of an unchanged batch; 1 iteration with prefill; 0 to start an idle engine.
        batch: Requests that decode; 0 where the segment is not pure decode.
        context: Their summed context at the start [tokens].
    """

    start_s: float
    iterations: int
    batch: int = 0
    context: int = 0


@dataclass
class Engine:
    """A replica's engine.

    Attributes:
        env: The simulation.
        perf: Seconds of iterations, and the KV capacity.
        on_leave: Called with ``(request, is_aborted)`` at the iteration boundary at which a request leaves.
        waiting: Requests that are queued, the next one first.
        decoding: Sample -> request, the youngest last.
        prefilling: Requests that were admitted and have not their first token yet.
        busy: ``[start_s, end_s]`` of each time with running requests; without its end while it lasts.
        prefill_tokens: Tokens that were prefilled so far.
        num_preemptions: Requests that were preempted so far.
        is_up: Whether it runs iterations; until then requests queue.
    """

    env: simpy.Environment
    perf: EnginePerf
    on_leave: Callable[[Request, bool], None]
    waiting: deque[Request] = field(default_factory=deque)
    decoding: dict[int, Request] = field(default_factory=dict)
    prefilling: list[Request] = field(default_factory=list)
    busy: list[list[float]] = field(default_factory=list)
    prefill_tokens: int = 0
    num_preemptions: int = 0
    is_up: bool = False

    def __post_init__(self) -> None:
        self.prefixes = PrefixCache()
        self.blocks = KvBlocks(self.perf.blocks_of, self.prefixes)
        self._iteration = 0  # iterations that have ended
        self._offset: dict[int, int] = {}  # generated tokens of a decoding sample minus the iteration
        self._due: list[tuple[int, int]] = []  # heap of (iteration that ends a turn, sample); entries may be stale
        self._aborting: set[int] = set()  # running samples that leave at the next boundary
        self._version = 0  # of the scheduled end of a segment: an earlier one no longer counts
        self._segment: _Segment | None = None  # None = idle
        self._is_cut = False  # whether the segment already ends at the next boundary

    # ---- what the world calls ----

    @property
    def is_empty(self) -> bool:
        """Whether no request is waiting or running."""
        return not (self.decoding or self.waiting or self.prefilling)

    def start(self) -> None:
        """The engine became usable: work that was queued begins."""
        self.is_up = True
        if self._segment is None:
            self._next_segment()

    def submit(self, request: Request) -> None:
        """Queue a request; it is considered at the next iteration boundary."""
        self.waiting.append(request)
        if self.is_up:
            self._interrupt()

    def abort(self, samples: set[int]) -> None:
        """Take requests out: waiting ones now, running ones at the next iteration boundary."""
        queued = [request for request in self.waiting if request.sample in samples]
        if queued:
            self.waiting = deque(request for request in self.waiting if request.sample not in samples)
        for request in queued:
            self.on_leave(request, True)
        self._aborting |= {s for s in samples if s in self.decoding} | {
            r.sample for r in self.prefilling if r.sample in samples
        }
        if self._aborting and self.is_up:
            self._interrupt()

    def kill(self, journal_interval_s: float) -> list[Request]:
        """Return every request with the tokens that the journal had at its last interval; the engine is gone."""
        done = self._done_iterations()
        if self._segment is not None and self._segment.batch:
            start_s, _, batch, context = self._segment
            lost_from_s = max(start_s, self.env.now - journal_interval_s)
            done = self.perf.iterations_within(batch, context, lost_from_s - start_s)
        for sample, request in self.decoding.items():
            request.generated = self._offset[sample] + self._iteration + done
        left = [*self.decoding.values(), *self.prefilling, *self.waiting]
        self._version += 1
        self._close_busy()
        self.is_up = False
        self.waiting.clear()
        self.decoding.clear()
        self.prefilling.clear()
        self._segment = None
        return left

    def progress(self) -> tuple[IntArray, IntArray]:
        """Return the decoding samples and their generated tokens at this moment, [R] int64 each."""
        at, count = self._iteration + self._done_iterations(), len(self._offset)
        samples = np.fromiter(self._offset.keys(), np.int64, count)
        return samples, np.fromiter(self._offset.values(), np.int64, count) + at

    @property
    def context_tokens(self) -> int:
        """Tokens whose keys and values are read in an iteration now."""
        return self.blocks.context_tokens + self._done_iterations() * len(self.decoding)

    # ---- iterations ----

    def _done_iterations(self) -> int:
        """Return the decode iterations of the segment that have ended by now."""
        if self._segment is None or not self._segment.batch:
            return 0
        start_s, count, batch, context = self._segment
        return min(count, self.perf.iterations_within(batch, context, self.env.now - start_s))

    def _interrupt(self) -> None:
        """End the segment at the next iteration boundary, where arrivals and aborts take effect."""
        if self._segment is None:
            self._open_busy()
            self._segment = _Segment(self.env.now, 0)
            self._schedule(0.0)
            return
        start_s, count, batch, context = self._segment
        if self._is_cut or not batch:
            return
        upto = min(count, self._done_iterations() + 1)
        self._is_cut = True
        if upto < count:
            self._segment = _Segment(start_s, upto, batch, context)
            end_s = start_s + self.perf.decode_s(batch, context, upto)
            self._schedule(max(0.0, end_s - self.env.now))

    def _schedule(self, delay: float) -> None:
        """Let the segment end in ``delay`` seconds, instead of when it was to end so far."""
        self._version += 1
        callbacks = self.env.timeout(delay, self._version).callbacks
        assert callbacks is not None
        callbacks.append(self._segment_ended)

    def _segment_ended(self, event: simpy.Event) -> None:
        if event.value != self._version:
            return
        assert self._segment is not None
        self._is_cut = True  # whatever arrives now waits for the next segment
        self._iteration += self._segment.iterations
        self.blocks.advance(self._segment.iterations)
        if self.prefilling and not self._segment.batch:
            self._finish_prefills()
        self._leave_due()
        if self._aborting:
            self._leave_aborted()
        self._next_segment()

    def _next_segment(self) -> None:
        """Begin the next segment: preempt until an iteration fits, admit, then prefill or decode on; or become idle.

        It decodes for as many iterations as surely fit into memory and until the first request is due.
        """
        self._is_cut = False
        chunk, sure = None, 0
        while not chunk and sure < 1:
            sure = self._preempt_for_memory()
            if self.waiting or self.prefilling:
                chunk = self._schedule_prefill()
                sure = self.blocks.sure_iterations() if self.decoding else 0
            if not self.decoding:
                break
        batch, context, now = len(self.decoding), self.blocks.context_tokens, self.env.now
        if not batch and not chunk:
            self._segment = None
            self._close_busy()
            return
        if self._segment is None:
            self._open_busy()
        if chunk:
            seconds = self.perf.iteration_s(batch, context, *chunk)
            self._segment = _Segment(now, 1)
        else:
            count = min(sure, self._due[0][0] - self._iteration)
            seconds = self.perf.decode_s(batch, context, count)
            self._segment = _Segment(now, count, batch, context)
        self._schedule(seconds)

    # ---- prefill and admission ----

    def _schedule_prefill(self) -> tuple[int, int] | None:
        """Return ``(tokens, summed context they attend to)`` of the next iteration's prefill."""
        budget = self.perf.limits.max_batched_tokens - len(self.decoding)
        tokens = attended = 0
        for request in self.prefilling:
            if budget <= 0:
                break
            used, seen = request.take(budget)
            budget, tokens, attended = budget - used, tokens + used, attended + seen
        while budget > 0 and self.waiting and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            self.prefilling.append(request)
            used, seen = request.take(budget)
            budget, tokens, attended = budget - used, tokens + used, attended + seen
        self.prefill_tokens += tokens
        return (tokens, attended) if tokens else None

    def _admit(self, request: Request) -> bool:
        """Return whether a request may begin its prefill now; if so its blocks are reserved.

        Raises:
            ValueError: It does not even fit into the empty cache.
        """
        if len(self.decoding) + len(self.prefilling) >= self.perf.limits.max_num_seqs:
            return False
        context = request.context_tokens
        found, in_use = self.prefixes.find(request)
        if not self.blocks.reserve(context, in_use):
            if self.decoding or self.prefilling:
                return False
            raise ValueError(f"a request of {context} tokens does not fit into {self.perf.blocks_of(1)} KV blocks")
        request.to_compute = 1 if request.has_kv else max(1, context - found)
        request.has_kv = False
        request.start_context = context - request.to_compute
        self.prefixes.hold(request)
        self.blocks.evict()
        return True

    def _finish_prefills(self) -> None:
        """Let the requests that are prefilled decode; the iteration that ended gave them one token."""
        still = []
        for request in self.prefilling:
            if request.to_compute:
                still.append(request)
                continue
            context, sample = request.context_tokens, request.sample
            self.blocks.unreserve(context)
            request.generated += 1
            request.due_iteration = self._iteration + request.target - request.generated
            self.blocks.add(context + 1)
            self.decoding[sample] = request
            self._offset[sample] = request.generated - self._iteration
            heapq.heappush(self._due, (request.due_iteration, sample))
        self.prefilling = still

    def _preempt_for_memory(self) -> int:
        """Preempt until an iteration fits or one request is left; return how many surely fit, 0 where none decodes."""
        while True:
            sure = self.blocks.sure_iterations() if self.decoding else 0
            if sure >= 1 or len(self.decoding) <= 1:
                return sure
            request = self.decoding[next(reversed(self.decoding))]
            self._remove(request, keeps_session=False)
            self.num_preemptions += 1
            self.waiting.appendleft(request)

    # ---- leaving ----

    def _remove(self, request: Request, *, keeps_session: bool) -> None:
        """Take a decoding request out, with the tokens that it has generated."""
        del self.decoding[request.sample]
        request.generated = self._offset.pop(request.sample) + self._iteration
        self.blocks.remove(request.context_tokens)
        self.prefixes.drop(request, keeps_session=keeps_session)

    def _leave_due(self) -> None:
        """Let requests leave whose turn ends with this iteration."""
        while self._due:
            due, sample = self._due[0]
            request = self.decoding.get(sample)
            is_stale = request is None or request.due_iteration != due  # an entry of an earlier visit
            if not is_stale and due > self._iteration:
                return
            heapq.heappop(self._due)
            if request is not None and not is_stale:
                self._remove(request, keeps_session=not request.is_last_turn)
                self.on_leave(request, False)

    def _leave_aborted(self) -> None:
        """Let aborted requests leave; what is computed of a prefill is lost."""
        for sample in sorted(self._aborting & self.decoding.keys()):
            request = self.decoding[sample]
            self._remove(request, keeps_session=False)
            self.on_leave(request, True)
        for request in [r for r in self.prefilling if r.sample in self._aborting]:
            self.prefilling.remove(request)
            self.blocks.unreserve(request.context_tokens)
            self.prefixes.drop(request)
            request.to_compute = 0
            self.on_leave(request, True)
        self._aborting.clear()
        self._leave_due()

    # ---- busy time ----

    def _open_busy(self) -> None:
        if not self.busy or len(self.busy[-1]) == 2:
            self.busy.append([self.env.now])

    def _close_busy(self) -> None:
        if self.busy and len(self.busy[-1]) == 1:
            self.busy[-1].append(self.env.now)
