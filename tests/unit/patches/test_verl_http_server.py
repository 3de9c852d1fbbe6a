"""A cancelled HTTP server of verl gives its port back and lets go of its app."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import weakref
from types import ModuleType

import pytest
from fastapi import FastAPI
from verl.workers.rollout.utils import run_uvicorn

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless_patches import verl_http_server


class Engine:
    pass


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


async def serve_and_cancel() -> tuple[int, weakref.ref[Engine]]:
    app, engine = FastAPI(), Engine()
    app.state.engine_client = engine
    port, task = await run_uvicorn(app, None, "127.0.0.1")
    assert await asyncio.to_thread(is_open, port)
    with socket.create_connection(("127.0.0.1", port), timeout=5):  # a client that stays connected
        task.cancel()
        await asyncio.wait([task], timeout=10)
    assert task.cancelled()
    return port, weakref.ref(engine)


def test_a_cancelled_server_closes_its_port_and_lets_go_of_the_engine() -> None:
    verl_http_server.apply()
    verl_http_server.apply()  # every server actor does it

    async def ended() -> tuple[bool, bool]:
        port, engine = await serve_and_cancel()
        gc.collect()
        return await asyncio.to_thread(is_open, port), engine() is not None

    assert asyncio.run(ended()) == (False, False)


def test_an_unknown_verl_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="pin verl"):
        verl_http_server._patch(ModuleType("utils"))
