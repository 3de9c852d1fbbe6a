"""One process' correspondence with the router: what is posted in one turn of the event loop travels in one call.

A call whose answer is lost is made again, and takes effect once: the router knows a worker's sends by their number, and
keeps what it has for the worker until a call says that it came.

Invariants: messages arrive once, in the order in which they were posted, unless the router is dead; a grant that nobody
waits for any more is handed back, once; if the router is gone, whoever waits is told.
"""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

from ray.exceptions import ActorUnavailableError

from verl_rlhfless.errors import ReplicaError
from verl_rlhfless.live.retry import retry_async
from verl_rlhfless.live.tickets import Delivery, Grant, Message, Outcome, OutcomeKind, Progress, Refusal, Ticket

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
        self._num_sent = self._num_received = 0

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
            ray.exceptions.RayActorError: The router is gone, or was out of reach for half a minute.
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
        progress: Progress = await retry_async(lambda: self._router.recover.remote(attempt))
        return progress

    async def _send(self) -> None:
        """Send what is posted, one call after the other: Ray may run two calls of an async actor in either order."""
        try:
            while self._posted:
                posted, self._posted = self._posted, []
                self._num_sent += 1
                while not await self._deliver(self._router.send, self._num_sent, posted):
                    pass  # who waits was told; a router that comes back still needs the ends of the samples
        finally:
            self._is_sending = False
        if self._waiting and not self._is_polling:
            self._is_polling = True
            self._spawn(self._poll())

    async def _poll(self) -> None:
        try:
            while self._waiting:
                await self._deliver(self._router.grants, _POLL_S)
        finally:
            self._is_polling = False

    async def _deliver(self, method: Any, *args: Any) -> bool:
        """Hand out what a call brings, or tell all who wait why it failed; return whether it is over with the call."""
        try:
            delivery: Delivery = await retry_async(lambda: method.remote(self.worker, self._num_received, *args))
        except Exception as error:  # noqa: BLE001  whatever it is, those who wait have to know
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(error)
            self._waiting.clear()
            return not isinstance(error, ActorUnavailableError)
        for item, server in delivery.items[self._num_received - delivery.first :]:
            self._num_received += 1
            self._hand_out(item, server)
        return True

    def _hand_out(self, item: Grant | Refusal, server: Any) -> None:
        waiting = self._waiting.pop(item.ticket, None)
        if waiting is None or waiting.done():
            if isinstance(item, Grant):
                self.post(Outcome(item.ticket, item.attempt, OutcomeKind.FAILED, 0, "nobody waits for it"))
        elif isinstance(item, Grant):
            waiting.set_result((item, server))
        else:
            waiting.set_exception(ReplicaError(item.reason))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
