"""What a server reports to the router, and what becomes of a report that does not get through."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from ray.exceptions import ActorUnavailableError, RayTaskError

from tests.unit.live.test_streams import Engine, settle, start
from verl_rlhfless.live.journal import Journal
from verl_rlhfless.live.request_server import RequestServer
from verl_rlhfless.live.streams import EngineStreams
from verl_rlhfless.live.tickets import Delta


@pytest.mark.parametrize(
    "failure", [ActorUnavailableError("a connection broke", None), RayTaskError("progress", "trace", ValueError())]
)
def test_a_report_that_the_router_did_not_take_comes_again_and_the_death_of_the_engine_too(failure: Exception) -> None:
    journal, failures, deaths = Journal(), [failure], []
    journal.open("a")

    async def progress(name: str, delta: Delta) -> None:
        if failures:
            raise failures.pop()
        journal.add(delta)
        deaths.append(delta.is_dead)

    async def scenario() -> None:
        server: Any = RequestServer.__new__(RequestServer)
        engine: Any = Engine()
        engine.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=1, block_size=1))
        server.engine, server._streams, server.global_steps = engine, EngineStreams(engine), 3
        server.config = SimpleNamespace(max_num_seqs=1)
        reading = await start(engine)
        engine.step("a")
        await settle()
        await server.report_to(SimpleNamespace(progress=SimpleNamespace(remote=progress)), "host:0", 0.0)
        await settle()
        engine.step("a")
        await settle()
        assert journal.read("a").tokens == [10, 11]
        failures.append(failure)
        engine.die()
        await asyncio.wait_for(server._reporting, 10)
        assert deaths[-1] and (await reading)[-1].finished

    asyncio.run(scenario())
