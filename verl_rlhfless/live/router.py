"""The router: one actor that knows every request, admits it where it was placed, and keeps what it generated.

Waiting calls have a concurrency group of their own with room for any number of them: with Ray's default of 1,000
concurrent calls, 2,000 waiting requests would keep a release from ever getting through. A group runs on an event loop
of its own, so a waiting call only waits there: all state belongs to the actor's first loop, and nothing is locked.

Invariants: every wait has a deadline and ends in an event, never in a poll; an error names what is missing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import ray

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live.journal import Journal
from verl_rlhfless.live.post_office import PostOffice
from verl_rlhfless.live.request_book import RequestBook
from verl_rlhfless.live.retry import Once, retry_async
from verl_rlhfless.live.samples import Rollout
from verl_rlhfless.live.tickets import (
    Delivery,
    Delta,
    Message,
    Outcome,
    OutcomeKind,
    Progress,
    RouterSettings,
    ServerLimits,
    Ticket,
)
from verl_rlhfless.policy.snapshot import IntArray

logger = logging.getLogger(__name__)

WAITING_CALLS = "waiting"
"""Concurrency group of calls that wait."""
_MAX_WAITING = 1_000_000
_SETTLE_S = 1.0  # by then prompts are tokenized; an agent that starts with a tool call is not waited for
_T = TypeVar("_T")

ACTOR_OPTIONS = {"concurrency_groups": {WAITING_CALLS: _MAX_WAITING}, "num_cpus": 0}
"""What ``ray.remote`` needs to make an actor of :class:`Router` or of a subclass."""


class Router:
    """verl's ``RequestLoadBalancer`` and ours beside it. Constructed, as verl's plugins are, on the actor's loop.

    Args:
        servers: ``{server id: actor handle}`` of the replicas that are up.
        options: The YAML file that names this class; it holds nothing else.
    """

    def __init__(self, servers: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> None:
        self.book = RequestBook()
        self.journal = Journal()
        self.listeners: list[Callable[[], None]] = []
        self.settings = RouterSettings()
        self._loop = asyncio.get_running_loop()
        self._handles: dict[str, Any] = {}
        self._post = PostOffice()
        self._once = Once()
        self._has_server = asyncio.Event()
        self._ended: deque[str] = deque(maxlen=8)
        self._give_up_timer: asyncio.TimerHandle | None = None
        self._give_up_after_s: float | None = None
        self._joining = self._loop.create_task(self.add_servers(dict(servers)))

    async def configure(self, settings: RouterSettings) -> None:
        """Take a run's settings; servers that report already are told the new interval."""
        self.settings = settings
        self.book.max_retries = settings.max_retries
        await self._joining
        await self.add_servers(dict(self._handles))

    # ---- the announced rollout; these are called in the router's process

    def begin(self, rollout: Rollout) -> None:
        """Announce a rollout, before its first prompt is submitted.

        Raises:
            UnsupportedError: The recipe wants full determinism, and placement depends on measured time.
            ReplicaError: The rollout before is not complete.
        """
        if self.settings.is_deterministic:
            raise UnsupportedError(
                "actor_rollout_ref.rollout.full_determinism=True: our dispatcher places requests by what has been "
                "measured. Set rlhfless/dispatcher=stock with rlhfless/migration=off, or full_determinism=False."
            )
        self.book.begin(rollout)
        self._handles = {name: self._handles[name] for name in self.book.servers.loads}
        self._loop.call_later(_SETTLE_S, self._settle)

    def after(self, delay_s: float, action: Callable[[], None]) -> asyncio.TimerHandle:
        """Call ``action`` in ``delay_s`` seconds, unless what is returned is cancelled."""
        return self._loop.call_later(delay_s, action)

    def place(self, samples: IntArray, replica: int) -> None:
        """Send samples to a replica: waiting ones at once, running ones by cutting them where they are."""
        for cut in self.book.place(samples, replica):
            self._handles[cut.server].abort.remote(cut.attempts)  # if the server is dead, its clients report that
        self.pump()

    def lose_server(self, server: str, reason: str) -> None:
        """Note that a server is dead, and why."""
        if server in self.book.servers.loads:
            logger.warning("rlhfless: replica at %s is lost: %s", server, reason)
            self._ended.append(f"{server} lost: {reason}")
        self.book.lose_server(server)
        self.pump()

    def pump(self) -> None:
        """Hand out what may start now; to be called after every change of the book."""
        for grant in self.book.grants():
            self.journal.open(grant.attempt)
            self._post.put(grant, self._handles[grant.server])
        for refusal in self.book.take_refusals():
            self._post.put(refusal)
        (self._has_server.set if self.book.servers.has_open else self._has_server.clear)()
        self._watch_stranded()
        for listener in self.listeners:
            listener()

    # ---- workers and servers

    async def send(self, worker: str, num_received: int, number: int, messages: Sequence[Message]) -> Delivery:
        """Take a worker's messages in their order, unless it sends them again; return what it may start at once.

        Args:
            worker: Who sends.
            num_received: How many grants and refusals have come to it.
            number: Of its sends, which follow each other; counted from 1.
            messages: What it tells.
        """
        if is_new := self._post.is_new(worker, number):
            self._read(messages)
            self.pump()
        return self._post.answer(worker, num_received, is_first=is_new)

    @ray.method(concurrency_group=WAITING_CALLS)
    async def grants(self, worker: str, num_received: int, timeout_s: float) -> Delivery:
        """Return what the worker may start or must give up, as soon as there is anything; nothing at the deadline."""
        return await self._on_own_loop(self._post.wait(worker, num_received, timeout_s))

    async def once(self, call: str, method: str, *args: Any) -> Any:
        """Return what ``method`` returns; a ``call`` that is made again takes effect once, and gets the same answer."""
        return await self._once.answer(call, lambda: getattr(self, method)(*args))

    async def recover(self, attempt: str) -> Progress:
        """Return what the journal holds of an attempt whose server cannot answer any more."""
        return self.journal.read(attempt)

    async def progress(self, server: str, delta: Delta) -> None:
        """Take a server's report."""
        for attempt, num_tokens in self.journal.add(delta).items():
            self.book.progress(attempt, num_tokens)
        if delta.is_dead:
            self.lose_server(server, "its engine died")

    # ---- verl's protocol

    @ray.method(concurrency_group=WAITING_CALLS)
    async def acquire_server(self, request_id: str, **_: Any) -> tuple[str, Any]:
        """Return the server for a request of a client that tells no more; wait while none is up.

        Raises:
            RuntimeError: None came up in time.
        """
        return await self._on_own_loop(self._acquire(request_id))

    async def release_server(self, server_id: str, request_id: str | None = None) -> None:
        """End a request that was acquired."""
        self.book.servers.release(server_id)

    async def require_acquire_fields(self) -> list[str]:
        """Return the fields of a request that routing reads: none."""
        return []

    async def require_release_fields(self) -> list[str]:
        """Return the fields of a request that a release reads: none."""
        return []

    async def add_servers(self, servers: dict[str, Any]) -> None:
        """Take servers in; each tells what fits and begins to report. One that is dead already is left out."""
        limits = await asyncio.gather(*[self._join(server, handle) for server, handle in servers.items()])
        for (server, handle), fits in zip(servers.items(), limits, strict=True):
            if isinstance(fits, ServerLimits):
                self._handles[server] = handle
                self.book.servers.add(server, fits)
            else:
                self._ended.append(f"{server} lost: {fits}")
        self.pump()

    async def remove_servers(self, server_ids: list[str]) -> None:
        """Give servers no more work; what runs there goes on."""
        for server in server_ids:
            self.book.drain_server(server)
            self._ended.append(f"{server} removed")
        self.pump()

    async def get_all_servers(self) -> list[str]:
        """Return the servers that take new work."""
        return [name for name, load in self.book.servers.loads.items() if load.is_open]

    async def get_inflight_count(self, server_id: str) -> int:
        """Return how many requests run on a server."""
        load = self.book.servers.loads.get(server_id)
        return load.num_requests if load is not None else 0

    async def get_status(self) -> dict[str, Any]:
        """Return the load of each server, and what has come late or is kept."""
        servers = {name: load.num_requests for name, load in self.book.servers.loads.items() if load.is_open}
        return {
            "servers": servers,
            "total_inflight": sum(servers.values()),
            "active_servers": len(servers),
            "registered_handles": list(servers),
            "attempts": self.book.num_granted,
            "late_messages": self.book.num_late,
            "journaled_attempts": len(self.journal),
        }

    async def clear_sticky_cache(self) -> dict[str, Any]:
        """Let sessions that nobody announced choose their server anew."""
        status = await self.get_status()
        return {"cleared_entries": self.book.servers.forget_sessions(), "server_loads": status["servers"]}

    async def get_total_inflight(self) -> int:
        """Return how many requests run on servers that take new work."""
        return int((await self.get_status())["total_inflight"])

    # ---- inside

    async def _on_own_loop(self, work: Coroutine[Any, Any, _T]) -> _T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _join(self, server: str, handle: Any) -> ServerLimits | str:
        """Return what fits into a server, or why it can't be taken in."""
        if not hasattr(handle, "report_to"):
            return ServerLimits()  # a server that is not ours
        router, limit_s = ray.get_runtime_context().current_actor, self.settings.stranded_timeout_s
        interval_s = self.settings.progress_interval_s
        try:
            answer = retry_async(lambda: handle.report_to.remote(router, server, interval_s))
            fits: ServerLimits = await asyncio.wait_for(answer, limit_s)
        except ray.exceptions.RayError as error:
            return str(error)
        except asyncio.TimeoutError:
            return f"it did not answer within {limit_s:g} s"
        return fits

    async def _acquire(self, request_id: str) -> tuple[str, Any]:
        async def acquire() -> str:
            while (server := self.book.servers.acquire(request_id)) is None:
                await self._has_server.wait()
            return server

        try:
            server = await asyncio.wait_for(acquire(), self.settings.stranded_timeout_s)
        except asyncio.TimeoutError:
            raise RuntimeError(f"No available servers in load balancer: {self._missing()}") from None
        return server, self._handles[server]

    def _read(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if isinstance(message, Ticket):
                self.book.submit(message)
            elif isinstance(message, Outcome):
                self._finish(message)
            else:
                self.book.end(message.sample)

    def _finish(self, outcome: Outcome) -> None:
        server = self.book.server_of(outcome.attempt)
        if outcome.kind is OutcomeKind.LOST and server is not None:
            self.lose_server(server, outcome.detail)
        self.journal.close(outcome.attempt)
        self.book.finish(outcome)

    def _settle(self) -> None:
        self.book.settle()
        self.pump()

    def _wait_limit_s(self) -> float:
        """Return how long requests wait while no replica is up or starting for the announced rollout."""
        return self.settings.stranded_timeout_s

    def _watch_stranded(self) -> None:
        """Bound the wait for a replica: from the moment that none is up or starting."""
        limit_s = self._wait_limit_s() if self.book.is_stranded else None
        if limit_s == self._give_up_after_s:
            return
        if self._give_up_timer is not None:
            self._give_up_timer.cancel()
        self._give_up_after_s = limit_s
        self._give_up_timer = self._loop.call_later(limit_s, self._give_up) if limit_s is not None else None

    def _give_up(self) -> None:
        self._give_up_timer = self._give_up_after_s = None
        if self.book.is_stranded:
            self.book.refuse_waiting(self._missing())
            self.pump()

    def _missing(self) -> str:
        history = "; ".join(self._ended) or "none was ever registered"
        return (
            f"no rollout replica was up or starting for {self._wait_limit_s():g} s ({history}). Look for the "
            "replicas' errors above."
        )
