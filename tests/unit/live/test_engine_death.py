"""A control call of an engine that dies meanwhile fails; any other ends as it would have."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from verl_rlhfless.errors import ReplicaError
from verl_rlhfless.live.engine_death import ends_with_engine


class Server:
    def __init__(self) -> None:
        self.engine = SimpleNamespace(errored=False)

    @ends_with_engine
    async def wake(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "awake"

    @ends_with_engine
    async def fail(self) -> None:
        raise ValueError("its own reason")


def test_a_call_to_an_engine_that_dies_meanwhile_fails() -> None:
    server = Server()

    async def call() -> None:
        asyncio.get_running_loop().call_soon(setattr, server.engine, "errored", True)
        await server.wake(3600.0)

    with pytest.raises(ReplicaError, match="died during wake"):
        asyncio.run(asyncio.wait_for(call(), 30.0))


def test_a_call_to_a_living_engine_ends_as_it_would_have() -> None:
    assert asyncio.run(Server().wake(0.0)) == "awake"
    with pytest.raises(ValueError, match="its own reason"):
        asyncio.run(Server().fail())
