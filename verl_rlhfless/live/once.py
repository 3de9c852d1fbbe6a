"""Calls that must not take effect twice, of callers that make them again when an answer was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

_KEPT = 64  # answers; a call is made again for half a minute


class Once:
    """The last answers, and those that are still to come."""

    def __init__(self) -> None:
        self._answers: dict[str, asyncio.Task[Any]] = {}

    async def answer(self, call: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Return what ``work`` returned or raised for the first ``call`` of this id; later ones begin no work."""
        if call not in self._answers:
            self._answers[call] = asyncio.get_running_loop().create_task(work())
            for oldest in list(self._answers)[:-_KEPT]:
                del self._answers[oldest]
        return await asyncio.shield(self._answers[call])
