"""Close verl's HTTP server when its task is cancelled.

Why: ``run_uvicorn`` keeps the server to itself and hands out its task; cancelling that skips uvicorn's shutdown. The
port stays open, and its app holds the engine's client, for every engine that a server actor ever had.
Upstream: ``verl/workers/rollout/utils.py``, ``_UvicornServerAutoPort``.
Remove when: verl hands out the server, or closes it itself.
"""

from __future__ import annotations

import asyncio
from types import ModuleType
from typing import Any

import uvicorn

from verl_rlhfless.errors import UnsupportedError

_CLASS = "_UvicornServerAutoPort"


def apply() -> None:
    """Patch verl's server class; may be called any number of times.

    Raises:
        UnsupportedError: verl changed the class.
    """
    from verl.workers.rollout import utils

    _patch(utils)


def _patch(module: ModuleType) -> None:
    server_class: Any = getattr(module, _CLASS, None)
    if server_class is None or not issubclass(server_class, uvicorn.Server):
        raise UnsupportedError(f"verl changed {module.__name__}.{_CLASS}. Update {__name__} or pin verl to 0.9.1.")
    server_class.main_loop = _closing_main_loop


async def _closing_main_loop(server: uvicorn.Server) -> None:
    try:
        await uvicorn.Server.main_loop(server)
    except asyncio.CancelledError:
        server.force_exit = True  # don't wait for clients that keep their connection
        await server.shutdown()
        raise
