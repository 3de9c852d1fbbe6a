"""Calls of an actor that may be out of reach for a moment, as behind a disturbed network, and then answers again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import ray

logger = logging.getLogger(__name__)

_WAITS_S = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_T = TypeVar("_T")


async def asked(call: Callable[[], Awaitable[_T]]) -> _T:
    """Return what ``call`` returns. It is made again while its actor can't be reached, so it may take effect twice.

    Raises:
        ray.exceptions.RayActorError: The actor is dead, or was out of reach at every try.
    """
    for wait_s in _WAITS_S:
        try:
            return await call()
        except ray.exceptions.ActorUnavailableError as error:
            logger.warning("rlhfless: an actor is out of reach, and is asked again in %g s: %s", wait_s, error)
        await asyncio.sleep(wait_s)
    return await call()
