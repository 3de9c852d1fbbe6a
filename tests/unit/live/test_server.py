"""How an elastic replica's server puts its engine to sleep, and how it ends it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from verl_rlhfless.live import server as server_module
from verl_rlhfless.live.parked_memory import ParkedMemory
from verl_rlhfless.live.server import ElasticServer
from verl_rlhfless.live.variables import LEASE_VARIABLE


class Engine:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.errored = False
        self.vllm_config = SimpleNamespace(quant_config=None)
        self.output_handler = SimpleNamespace(cancel=lambda: self.calls.append("silenced"))

    async def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    async def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {', '.join(tags)}")

    async def is_sleeping(self) -> bool:
        return any(call.startswith("sleep") for call in self.calls)

    async def collective_rpc(self, method: str, args: tuple[str, ...] = ()) -> list[tuple[int, int]]:
        self.calls.append(" ".join([method, *args]))
        return [(5, 80), (7, 80)]

    def shutdown(self) -> None:
        self.calls.append("shut down")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server whose engine is a list of calls, and whose processes end at once."""
    made: Any = ElasticServer.__new__(ElasticServer)
    made.engine = Engine()
    made._streams = SimpleNamespace(abort_all=lambda: asyncio.sleep(0))
    made.config, made.model_config = (
        SimpleNamespace(mtp=None, enable_sleep_mode=True),
        SimpleNamespace(lora_rank=0, lora={}),
    )

    async def abort_all_requests(reject_request: bool) -> None:
        made.engine.calls.append("requests end" + ", no more come" * reject_request)

    def noted(what: str) -> Any:
        async def note(*_: Any, **__: Any) -> None:
            made.engine.calls.append(what)

        return note

    made.abort_all_requests = abort_all_requests
    made.resume_generation, made.clear_kv_cache = noted("requests may come"), noted("caches cleared")
    monkeypatch.setattr(server_module, "pull_into_engine", noted("weights loaded"))
    monkeypatch.setenv(LEASE_VARIABLE, "r0")
    monkeypatch.setattr(server_module, "descendants", lambda pid: ((1, 1.0),))
    monkeypatch.setattr(server_module, "end_engine", lambda *_: made.engine.calls.append("killed") or ())
    monkeypatch.setattr(server_module, "measure_parked", lambda devices, _: ParkedMemory(*devices[1], 0, 0))
    return made


@pytest.mark.parametrize(
    ("mtp", "lora_rank", "level"),
    [
        (None, 0, 2),
        (SimpleNamespace(enable=True, enable_rollout=False), 0, 2),
        (SimpleNamespace(enable=True, enable_rollout=True), 0, 1),
        (None, 8, 1),
    ],
    ids=["all weights come again", "a drafter that only trains", "a drafter", "an adapter's base"],
)
def test_an_engine_sleeps_as_deep_as_the_next_pull_can_restore(
    server: Any, mtp: Any, lora_rank: int, level: int
) -> None:
    server.config.mtp, server.model_config.lora_rank = mtp, lora_rank
    memory = asyncio.run(server.park())
    assert server.engine.calls == ["requests end, no more come", f"sleep {level}", "device_memory"]
    assert (memory.device_bytes, memory.device_total_bytes) == (7, 80)


def test_keys_and_values_sleep_until_the_weights_are_loaded(server: Any) -> None:
    async def scenario() -> None:
        await server.park()
        server.engine.calls.remove("device_memory")
        await server.wake("r1")
        await server.pull_weights(7, "store", 60.0)

    asyncio.run(scenario())
    loaded = ["weights loaded", "wake kv_cache", "requests may come", "caches cleared"]
    assert server.engine.calls[2:] == ["change_lease r1", "wake weights", *loaded]
    assert server.global_steps == 7


def test_an_engine_that_has_just_started_has_nothing_to_wake(server: Any) -> None:
    asyncio.run(server.pull_weights(7, "store", 60.0))
    assert server.engine.calls == ["weights loaded", "caches cleared"]


@pytest.mark.parametrize("can_sleep", [True, False])
def test_quantised_weights_are_loaded_while_keys_and_values_hold_no_memory(server: Any, can_sleep: bool) -> None:
    server.engine.vllm_config.quant_config = object()
    server.config.enable_sleep_mode = can_sleep
    asyncio.run(server.pull_weights(7, "store", 60.0))
    before, after = ["sleep 2", "wake weights"], ["wake kv_cache", "requests may come"]
    assert server.engine.calls == [*before * can_sleep, "weights loaded", *after * can_sleep, "caches cleared"]


def test_an_engine_ends_behind_its_http_server(server: Any) -> None:
    calls = server.engine.calls

    async def serve() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(5):  # its clients, its port
                await asyncio.sleep(0)
            calls.append("HTTP server closed")

    async def stop() -> tuple[int, ...]:
        server._server_task = asyncio.create_task(serve())
        await asyncio.sleep(0)
        return await server.stop_engine(60.0)

    assert asyncio.run(stop()) == ()
    assert sorted(calls[:3]) == sorted(["silenced", "killed", "HTTP server closed"]) and calls[3:] == ["shut down"]
