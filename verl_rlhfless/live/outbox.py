"""What one process has for another one, which may be out of reach when it asks: numbered, in order, and kept.

Invariant: an item keeps its number, and can be asked for again until the reader confirms that it has it.
"""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Outbox(Generic[_T]):
    """The items for one reader.

    Attributes:
        items: Those that the reader has not confirmed yet.
        num_answered: How many were in answers to other calls, which ask again by themselves: no wait is for these.
    """

    def __init__(self) -> None:
        self.items: list[_T] = []
        self.num_answered = self._num_confirmed = 0
        self._news = asyncio.Event()  # of the next item

    @property
    def count(self) -> int:
        """How many there were so far; the number of the next one."""
        return self._num_confirmed + len(self.items)

    def put(self, item: _T) -> None:
        """Add an item, and wake whoever waits for one."""
        self.items.append(item)
        self._news.set()
        self._news = asyncio.Event()

    def since(self, num_received: int) -> tuple[int, tuple[_T, ...]]:
        """Return all that a reader lacks who has so many, and the number of its first; forget what it has."""
        if num_received > self._num_confirmed:
            del self.items[: num_received - self._num_confirmed]
            self._num_confirmed = num_received
        return self._num_confirmed, tuple(self.items)

    async def wait(self, num_received: int) -> None:
        """Return when there is more than a reader has who has so many."""
        while self.count <= max(num_received, self.num_answered):
            await self._news.wait()
