"""Control calls of an engine that end when it dies.

vLLM fails the requests of a dead engine, and leaves whoever waits for one of its control calls waiting for ever.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from verl_rlhfless.errors import ReplicaError

_DEATH_POLL_S = 0.2
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def ends_with_engine(
    method: Callable[Concatenate[Any, _Args], Awaitable[_Result]],
) -> Callable[Concatenate[Any, _Args], Coroutine[Any, Any, _Result]]:
    """Return a server's method, with ``server.engine``, that raises ``ReplicaError`` when the engine dies meanwhile."""

    @functools.wraps(method)
    async def call(server: Any, /, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        task = asyncio.ensure_future(method(server, *args, **kwargs))
        try:
            while not (await asyncio.wait([task], timeout=_DEATH_POLL_S))[0]:
                if server.engine.errored:
                    raise ReplicaError(f"the engine died during {method.__name__}.")
            return task.result()
        finally:
            task.cancel()

    return call
