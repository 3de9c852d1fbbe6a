"""What one process has for another one, to which an answer may get lost: a queue of numbered items that are kept.

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
        num_answered: How many items were part of an answer to another call. That call is made again until its answer
            arrives, so ``wait`` need not return for them.
    """

    def __init__(self) -> None:
        self.items: list[_T] = []
        self.num_answered = self._num_confirmed = 0
        self._news = asyncio.Event()  # of the next item

    @property
    def count(self) -> int:
        """How many items there were so far, which is the number of the next one."""
        return self._num_confirmed + len(self.items)

    def put(self, item: _T) -> None:
        """Add an item, and wake whoever waits for one."""
        self.items.append(item)
        self._news.set()
        self._news = asyncio.Event()

    def since(self, num_received: int) -> tuple[int, tuple[_T, ...]]:
        """Return the number of the first item after the reader's first ``num_received``, and the items from it on.

        What the reader has is forgotten.
        """
        if num_received > self._num_confirmed:
            del self.items[: num_received - self._num_confirmed]
            self._num_confirmed = num_received
        return self._num_confirmed, tuple(self.items)

    async def wait(self, num_received: int) -> None:
        """Return when there is an item after the reader's first ``num_received``."""
        while self.count <= max(num_received, self.num_answered):
            await self._news.wait()
