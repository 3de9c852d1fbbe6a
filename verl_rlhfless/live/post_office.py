"""The router's side of its correspondence with agent-loop workers, which make a call again when its answer is lost.

Invariants: of a worker's sends each is taken once; what is for a worker is delivered in order, and again until a call
of the worker says that it has come.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from typing import Any

from verl_rlhfless.live.outbox import Outbox
from verl_rlhfless.live.tickets import Delivery, Grant, Refusal


class PostOffice:
    """What every worker has sent, and what is there for it."""

    def __init__(self) -> None:
        self._num_sends: defaultdict[str, int] = defaultdict(int)
        self._outboxes: defaultdict[str, Outbox[tuple[Grant | Refusal, Any]]] = defaultdict(Outbox)

    def is_new(self, worker: str, number: int) -> bool:
        """Return whether a worker's send was not taken yet, and take it. They are counted from 1."""
        is_new = number > self._num_sends[worker]
        self._num_sends[worker] = max(number, self._num_sends[worker])
        return is_new

    def put(self, item: Grant | Refusal, server: Any = None) -> None:
        """Put something there for a worker; with a grant, its server's handle."""
        self._outboxes[item.worker].put((item, server))

    def answer(self, worker: str, num_received: int, *, is_first: bool) -> Delivery:
        """Return what a worker has not received yet, as the answer to its send; if it is lost, the send is repeated."""
        outbox = self._outboxes[worker]
        if is_first:
            outbox.num_answered = outbox.count
        return Delivery(*outbox.since(num_received))

    async def wait(self, worker: str, num_received: int, timeout_s: float) -> Delivery:
        """Return what a worker has not received yet, once there is an item that no answer to a send had, or at the end.

        The end is ``timeout_s`` from now.
        """
        outbox = self._outboxes[worker]
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(outbox.wait(num_received), timeout_s)
        return Delivery(*outbox.since(num_received))
