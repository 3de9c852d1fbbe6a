"""One simulated vLLM engine.

Continuous batching at iteration granularity, with runs of equal iterations compressed into one event.

What is modelled as in vLLM V1: token budget per iteration with chunked prefill, ``max_num_seqs``, KV blocks of 16
tokens, prefix-cache hits at full blocks with shared blocks counted once, first-come admission, recompute preemption
of the youngest request, aborts and arrivals that take effect at the next iteration boundary. A pure decode phase is
one event: its duration has a closed form.

Invariants: blocks in use never exceed the capacity; every request leaves exactly once, finished or aborted.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from verl_rlhfless.policy.perf import BLOCK_TOKENS, EnginePerf


@dataclass(slots=True)
class Request:
    """One sample on its way through engines. ``target`` is known to the engine only (when end-of-sequence comes)."""

    sample: int
    group: int
    prompt_tokens: int
    target: int
    prefix_id: str | None = None
    prefix_tokens: int = 0
    generated: int = 0
    base_iteration: int = 0
    base_context: int = 0
    to_compute: int = 0
    start_context: int = 0
    has_kv: bool = False  # its keys and values arrive from a pool or over the network instead of being recomputed


class Scheduler(Protocol):
    """The part of ``simpy.Environment`` that an engine needs."""

    @property
    def now(self) -> float:
        """Simulated seconds."""

    def timeout(self, delay: float) -> Any:
        """Return an event that fires after ``delay`` seconds."""


@dataclass
class Engine:
    """A replica's engine.

    ``on_leave(request, is_aborted)`` is called at the iteration boundary at which a request leaves.
    """

    env: Scheduler
    perf: EnginePerf
    on_leave: Callable[[Request, bool], None]
    waiting: deque[Request] = field(default_factory=deque)
    decoding: OrderedDict[int, Request] = field(default_factory=OrderedDict)
    prefilling: list[Request] = field(default_factory=list)
    busy: list[list[float]] = field(default_factory=list)
    prefill_tokens: int = 0
    num_preemptions: int = 0
    is_up: bool = False

    def __post_init__(self) -> None:
        self._iteration = 0
        self._context = 0
        self._phases = [0] * BLOCK_TOKENS
        self._heap: list[tuple[int, int]] = []
        self._siblings: dict[int, int] = {}
        self._shared_blocks = 0
        self._cached: OrderedDict[int, int] = OrderedDict()
        self._cached_blocks = 0
        self._prefill_blocks = 0  # of the requests in prefill, one token ahead
        self._prefixes: set[str] = set()
        self._aborting: set[int] = set()
        self._version = 0
        self._segment: tuple[float, int, int, int] | None = (
            None  # start, iterations, batch, context; batch 0 = mixed iteration
        )
        self._is_cut = False

    # ---- what the world calls ----

    @property
    def num_requests(self) -> int:
        """Requests that are waiting or running."""
        return len(self.waiting) + len(self.decoding) + len(self.prefilling)

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
        for request in [r for r in self.waiting if r.sample in samples]:
            self.waiting.remove(request)
            self.on_leave(request, True)
        self._aborting |= {s for s in samples if s in self.decoding} | {
            r.sample for r in self.prefilling if r.sample in samples
        }
        if self._aborting and self.is_up:
            self._interrupt()

    def kill(self, journal_interval_s: float) -> list[Request]:
        """Return every request with the tokens that the journal had at its last interval; the engine is gone."""
        done = self._done_iterations()
        if self._segment is not None and self._segment[2]:
            lost_from = max(self._segment[0], self.env.now - journal_interval_s)
            done = self.perf.iterations_within(self._segment[2], self._segment[3], lost_from - self._segment[0])
        for request in self.decoding.values():
            request.generated += self._iteration + done - request.base_iteration
        left = [*self.decoding.values(), *self.prefilling, *self.waiting]
        self._version += 1
        self._close_busy()
        self.is_up = False
        self.waiting.clear()
        self.decoding.clear()
        self.prefilling.clear()
        self._segment = None
        return left

    def progress(self) -> list[tuple[int, int]]:
        """Return ``(sample, generated tokens)`` of the decoding requests at this moment."""
        at = self._iteration + self._done_iterations()
        return [(s, r.generated + at - r.base_iteration) for s, r in self.decoding.items()]

    @property
    def context_tokens(self) -> int:
        """Tokens whose keys and values are read in an iteration now."""
        return self._context + self._done_iterations() * len(self.decoding)

    # ---- iterations ----

    def _done_iterations(self) -> int:
        if self._segment is None or not self._segment[2]:
            return 0
        start, count, batch, context = self._segment
        return min(count, self.perf.iterations_within(batch, context, self.env.now - start))

    def _interrupt(self) -> None:
        if self._segment is None:
            self._open_busy()
            self._segment = (self.env.now, 0, 0, 0)
            self._schedule(0.0)
            return
        start, count, batch, context = self._segment
        if self._is_cut or not batch:
            return
        upto = min(count, self._done_iterations() + 1)
        self._is_cut = True
        if upto < count:
            self._segment = (start, upto, batch, context)
            end = start + self.perf.decode_s(batch, context, upto)
            self._schedule(max(0.0, end - self.env.now))

    def _schedule(self, delay: float) -> None:
        self._version += 1
        version = self._version
        event = self.env.timeout(delay)
        event.callbacks.append(lambda _event: self._segment_ended(version))

    def _segment_ended(self, version: int) -> None:
        if version != self._version:
            return
        assert self._segment is not None
        _, count, batch, _ = self._segment
        if batch:
            self._advance(count)
        elif count:  # a mixed iteration: decoders advanced by one token, prefills by their chunk
            self._advance(1)
            self._finish_prefills()
        self._is_cut = False
        self._leave_finished()
        self._leave_aborted()
        self._next_segment()

    def _advance(self, iterations: int) -> None:
        self._iteration += iterations
        self._context += iterations * len(self.decoding)

    def _next_segment(self) -> None:
        while True:
            self._preempt_for_memory()
            chunk = self._schedule_prefill()
            if chunk or not self.decoding or self._segment_limit() >= 1:
                break
        now = self.env.now
        if chunk:
            tokens, attended = chunk
            seconds = self.perf.iteration_s(len(self.decoding), self._context, tokens, attended)
            self._segment = (now, 1, 0, 0)
        elif self.decoding:
            count = min(self._segment_limit(), self._heap[0][0] - self._iteration)
            batch = len(self.decoding)
            seconds = self.perf.decode_s(batch, self._context, count)
            self._segment = (now, count, batch, self._context)
        else:
            self._segment = None
            self._close_busy()
            return
        self._open_busy()
        self._schedule(seconds)

    # ---- prefill and admission ----

    def _schedule_prefill(self) -> tuple[int, int] | None:
        budget = self.perf.limits.max_batched_tokens - len(self.decoding)
        tokens = attended = 0
        for request in self.prefilling:
            if budget <= 0:
                break
            used, seen = self._take_chunk(request, budget)
            budget, tokens, attended = budget - used, tokens + used, attended + seen
        while budget > 0 and self.waiting and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            self.prefilling.append(request)
            self._prefill_blocks += _blocks_of(request)
            used, seen = self._take_chunk(request, budget)
            budget, tokens, attended = budget - used, tokens + used, attended + seen
        self.prefill_tokens += tokens
        return (tokens, attended) if tokens else None

    def _take_chunk(self, request: Request, budget: int) -> tuple[int, int]:
        chunk = min(request.to_compute, budget)
        start = request.start_context
        request.to_compute -= chunk
        request.start_context += chunk
        return chunk, chunk * start + chunk * (chunk + 1) // 2

    def _admit(self, request: Request) -> bool:
        if len(self.decoding) + len(self.prefilling) >= self.perf.limits.max_num_seqs:
            return False
        context = request.prompt_tokens + request.generated
        hit, shared = self._prefix_hit(request)
        need = -(-(context + 1) // BLOCK_TOKENS) - shared
        free = self.perf.kv_blocks - self._blocks(1) - self._prefill_blocks
        if need > free:
            if self.decoding or self.prefilling:
                return False
            raise ValueError(f"a request of {context} tokens does not fit into {self.perf.kv_blocks} KV blocks")
        request.to_compute = 1 if request.has_kv else max(1, context - hit)
        request.has_kv = False
        request.start_context = context - request.to_compute
        self._hold_prefix(request)
        return True

    def _prefix_hit(self, request: Request) -> tuple[int, int]:
        full = request.prompt_tokens // BLOCK_TOKENS
        if self._siblings.get(request.group):
            return full * BLOCK_TOKENS, full
        if request.group in self._cached:
            return full * BLOCK_TOKENS, 0
        if request.prefix_id is not None and request.prefix_id in self._prefixes:
            return request.prefix_tokens // BLOCK_TOKENS * BLOCK_TOKENS, 0
        return 0, 0

    def _hold_prefix(self, request: Request) -> None:
        full = request.prompt_tokens // BLOCK_TOKENS
        held = self._siblings.get(request.group, 0)
        if held:
            self._shared_blocks += full
        elif request.group in self._cached:
            self._cached_blocks -= self._cached.pop(request.group)
        self._siblings[request.group] = held + 1
        if request.prefix_id is not None:
            self._prefixes.add(request.prefix_id)
        self._evict()

    def _drop_prefix(self, request: Request) -> None:
        full = request.prompt_tokens // BLOCK_TOKENS
        held = self._siblings[request.group] - 1
        if held:
            self._siblings[request.group] = held
            self._shared_blocks -= full
        else:
            del self._siblings[request.group]
            self._cached[request.group] = full
            self._cached_blocks += full

    def _evict(self) -> None:
        limit = self.perf.kv_blocks - self._blocks(1) - self._prefill_blocks
        while self._cached and self._cached_blocks > limit:
            self._cached_blocks -= self._cached.popitem(last=False)[1]

    def _finish_prefills(self) -> None:
        still = []
        for request in self.prefilling:
            if request.to_compute:
                still.append(request)
                continue
            self._prefill_blocks -= _blocks_of(request)
            request.generated += 1
            request.base_iteration = self._iteration
            request.base_context = request.prompt_tokens + request.generated
            self.decoding[request.sample] = request
            self._context += request.base_context
            self._phases[(request.base_context - self._iteration) % BLOCK_TOKENS] += 1
            heapq.heappush(self._heap, (self._iteration + request.target - request.generated, request.sample))
        self.prefilling = still

    # ---- memory ----

    def _blocks(self, ahead: int) -> int:
        """Blocks that the decoding requests hold after ``ahead`` more iterations."""
        at, batch = self._iteration + ahead, len(self.decoding)
        padding = sum(count * (-(phase + at) % BLOCK_TOKENS) for phase, count in enumerate(self._phases) if count)
        return (self._context + ahead * batch + padding) // BLOCK_TOKENS - self._shared_blocks

    def _segment_limit(self) -> int:
        """Most decode iterations that surely fit into memory; 0 when not even one does."""
        batch = len(self.decoding)
        free_tokens = (self.perf.kv_blocks - self._prefill_blocks + self._shared_blocks) * BLOCK_TOKENS
        sure = (free_tokens - self._context) // batch - (BLOCK_TOKENS - 1)
        if sure >= 1:
            return sure
        return int(self._blocks(1) + self._prefill_blocks <= self.perf.kv_blocks)

    def _preempt_for_memory(self) -> None:
        while len(self.decoding) > 1 and self._segment_limit() < 1:
            request = self._remove(next(reversed(self.decoding)))
            self.num_preemptions += 1
            self.waiting.appendleft(request)

    # ---- leaving ----

    def _remove(self, sample: int) -> Request:
        request = self.decoding.pop(sample)
        age = self._iteration - request.base_iteration
        request.generated += age
        self._context -= request.base_context + age
        self._phases[(request.base_context - request.base_iteration) % BLOCK_TOKENS] -= 1
        self._drop_prefix(request)
        request.base_iteration = self._iteration
        return request

    def _leave_finished(self) -> None:
        heap = self._heap
        while heap and heap[0][0] <= self._iteration:
            due, sample = heapq.heappop(heap)
            request = self.decoding.get(sample)
            if request is None or request.base_iteration + request.target - request.generated != due:
                continue  # an entry of an earlier visit
            self.on_leave(self._remove(sample), False)
        while heap and (
            (top := self.decoding.get(heap[0][1])) is None
            or top.base_iteration + top.target - top.generated != heap[0][0]
        ):
            heapq.heappop(heap)

    def _leave_aborted(self) -> None:
        if not self._aborting:
            return
        for sample in sorted(self._aborting):
            if sample in self.decoding:
                self.on_leave(self._remove(sample), True)
        for request in [r for r in self.prefilling if r.sample in self._aborting]:
            self.prefilling.remove(request)
            self._prefill_blocks -= _blocks_of(request)
            self._drop_prefix(request)
            request.to_compute = 0
            self.on_leave(request, True)
        self._aborting.clear()
        self._leave_finished()

    # ---- busy time ----

    def _open_busy(self) -> None:
        if not self.busy or len(self.busy[-1]) == 2:
            self.busy.append([self.env.now])

    def _close_busy(self) -> None:
        if self.busy and len(self.busy[-1]) == 1:
            self.busy[-1].append(self.env.now)


def _blocks_of(request: Request) -> int:
    """Return the blocks that a request needs for its context and its next token."""
    return -(-(request.prompt_tokens + request.generated + 1) // BLOCK_TOKENS)
