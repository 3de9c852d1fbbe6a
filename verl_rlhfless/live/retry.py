"""Calls of an actor that may be out of reach for a moment, as behind a disturbed network, and then answers again.

The caller makes such a call again, since it can't know whether the call or only its answer was lost. A call that must
not take effect twice is made with ``once``: it carries an id, by which the actor (``Once``) knows it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar
from uuid import uuid4

import ray
from ray.exceptions import ActorUnavailableError

logger = logging.getLogger(__name__)

_WAITS_S = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_ANSWERS_KEPT = 64  # by the actor; a call is made again for half a minute
_T = TypeVar("_T")


async def retry_async(call: Callable[[], Awaitable[_T]]) -> _T:
    """Return what ``call`` returns. It is made again while its actor can't be reached, so it may take effect twice.

    Raises:
        ray.exceptions.RayActorError: The actor is dead, or was out of reach at every try.
    """
    waits_s = iter(_WAITS_S)
    while True:
        try:
            return await call()
        except ActorUnavailableError as error:
            wait_s = _next_wait_s(waits_s, error)
        await asyncio.sleep(wait_s)


def retry(call: Callable[[], Any], timeout_s: float | None = None) -> Any:
    """As ``retry_async``, for code without an event loop; ``timeout_s`` is the limit of each try."""
    waits_s = iter(_WAITS_S)
    while True:
        try:
            return ray.get(call(), timeout=timeout_s)
        except ActorUnavailableError as error:
            wait_s = _next_wait_s(waits_s, error)
        time.sleep(wait_s)


def once(router: Any, method: str, *args: Any) -> Callable[[], Any]:
    """Return a call of a router's method that takes effect once, however often it is made."""
    call = uuid4().hex
    return lambda: router.once.remote(call, method, *args)


class Once:
    """The actor's side of ``once``: the latest answers, and those that are still to come."""

    def __init__(self) -> None:
        self._answers: dict[str, asyncio.Task[Any]] = {}

    async def answer(self, call: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Return what ``work`` returned or raised for the first ``call`` of this id; later ones begin no work."""
        if call not in self._answers:
            self._answers[call] = asyncio.get_running_loop().create_task(work())
            for oldest in list(self._answers)[:-_ANSWERS_KEPT]:
                del self._answers[oldest]
        return await asyncio.shield(self._answers[call])


def _next_wait_s(waits_s: Iterator[float], error: ActorUnavailableError) -> float:
    wait_s = next(waits_s, None)
    if wait_s is None:
        raise error
    logger.warning("rlhfless: an actor is out of reach, and is asked again in %g s: %s", wait_s, error)
    return wait_s
