"""One process' correspondence with the router: what is posted in one turn of the event loop travels in one call.

Invariants: messages arrive in the order in which they were posted; a grant that nobody waits for any more is handed
back; if the router is gone, whoever waits is told.
"""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

from verl_rlhfless.errors import ReplicaError
from verl_rlhfless.live.tickets import Grant, GrantBatch, Message, Outcome, OutcomeKind, Progress, Ticket

_POLL_S = 30.0


class Mailbox:
    """Belongs to one event loop.

    Args:
        router: Actor handle of the router.
    """

    def __init__(self, router: Any) -> None:
        self.worker = uuid4().hex
        self._router = router
        self._posted: list[Message] = []
        self._waiting: dict[str, asyncio.Future[tuple[Grant, Any]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_sending = self._is_polling = False

    def post(self, message: Message) -> None:
        """Send a message with all others of this turn of the loop, or with those that gather while a call is out."""
        self._posted.append(message)
        if not self._is_sending:
            self._is_sending = True
            self._spawn(self._send())

    async def grant(self, message: Ticket | Outcome) -> tuple[Grant, Any]:
        """Post a ticket, or the outcome after which it waits again; return its grant and the server's handle.

        Raises:
            ReplicaError: The router gave the ticket up; the message says why.
            ray.exceptions.RayActorError: The router is gone.
        """
        ticket = message.id if isinstance(message, Ticket) else message.ticket
        future: asyncio.Future[tuple[Grant, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = future
        self.post(message)
        try:
            return await future
        finally:
            self._waiting.pop(ticket, None)

    async def recover(self, attempt: str) -> Progress:
        """Return what the router's journal holds of an attempt."""
        progress: Progress = await self._router.recover.remote(attempt)
        return progress

    async def _send(self) -> None:
        """Send what is posted, one call after the other: Ray may run two calls of an async actor in either order."""
        try:
            while self._posted:
                posted, self._posted = self._posted, []
                await self._deliver(self._router.send.remote(self.worker, posted))
        finally:
            self._is_sending = False
        if self._waiting and not self._is_polling:
            self._is_polling = True
            self._spawn(self._poll())

    async def _poll(self) -> None:
        try:
            while self._waiting:
                await self._deliver(self._router.grants.remote(self.worker, _POLL_S))
        finally:
            self._is_polling = False

    async def _deliver(self, call: Any) -> None:
        try:
            batch: GrantBatch = await call
        except Exception as error:  # noqa: BLE001  whatever it is, those who wait have to know
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(error)
            self._waiting.clear()
            return
        for refusal in batch.refusals:
            if (waiting := self._pop(refusal.ticket)) is not None:
                waiting.set_exception(ReplicaError(refusal.reason))
        for grant in batch.grants:
            if (waiting := self._pop(grant.ticket)) is not None:
                waiting.set_result((grant, batch.servers[grant.server]))
            else:
                self.post(Outcome(grant.ticket, grant.attempt, OutcomeKind.FAILED, 0, "nobody waits for it"))

    def _pop(self, ticket: str) -> asyncio.Future[tuple[Grant, Any]] | None:
        future = self._waiting.pop(ticket, None)
        return future if future is not None and not future.done() else None

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
