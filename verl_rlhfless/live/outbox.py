"""What the router has for each worker and the worker has not fetched yet."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from verl_rlhfless.live.tickets import Grant, Refusal


@dataclass(slots=True)
class Outbox:
    """The grants and refusals of one worker, in order."""

    grants: list[Grant] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, item: Grant | Refusal) -> None:
        """Add an item, and wake whoever waits for one."""
        if isinstance(item, Grant):
            self.grants.append(item)
        else:
            self.refusals.append(item)
        self._news.set()

    def take(self) -> tuple[tuple[Grant, ...], tuple[Refusal, ...]]:
        """Return everything, and be empty."""
        taken = tuple(self.grants), tuple(self.refusals)
        self.grants.clear()
        self.refusals.clear()
        self._news.clear()
        return taken

    async def wait(self) -> None:
        """Return when there is anything."""
        while not self.grants and not self.refusals:  # another call of the same worker may have been faster
            await self._news.wait()
