"""Streams in front of an engine: what is reported, what a cut leaves, and what a dead engine leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.exceptions import EngineDeadError

from verl_rlhfless.live.streams import EngineStreams
from verl_rlhfless.live.tickets import Part


class Engine:
    """Generates 10, 11, 12, ... one token each time that ``step`` is called; its lists are live, as vLLM's are."""

    def __init__(self) -> None:
        self.errored = False
        self.aborted: list[str] = []
        self.queues: dict[str, asyncio.Queue[Any]] = {}
        self.lists: dict[str, tuple[list[int], list[Any]]] = {}

    async def generate(self, prompt: str, sampling_params: Any, request_id: str) -> AsyncIterator[RequestOutput]:
        queue = self.queues[request_id] = asyncio.Queue()
        self.lists[request_id] = ([], [])
        while True:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finished:
                return

    def step(self, request_id: str, reason: str | None = None, is_delivered: bool = True) -> None:
        tokens, log_probs = self.lists[request_id]
        if reason != "abort":
            tokens.append(10 + len(tokens))
            log_probs.append({tokens[-1]: Logprob(-tokens[-1] / 100)})
        completion = CompletionOutput(0, "", tokens, None, log_probs, finish_reason=reason)
        if is_delivered:
            output = RequestOutput(request_id, None, [1], None, [completion], finished=reason is not None)
            self.queues[request_id].put_nowait(output)

    def die(self) -> None:
        self.errored = True
        for queue in self.queues.values():
            queue.put_nowait(EngineDeadError())

    async def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.aborted.append(request_id)
            if request_id in self.queues:
                self.step(request_id, "abort")


async def start(engine: Engine, name: str = "a") -> asyncio.Task[list[RequestOutput]]:
    async def read() -> list[RequestOutput]:
        return [output async for output in engine.generate(prompt="prompt", sampling_params=None, request_id=name)]

    task = asyncio.create_task(read())
    await settle()
    return task


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def end_of(outputs: list[RequestOutput]) -> tuple[list[int], int, str | None]:
    (completion,) = outputs[-1].outputs
    return list(completion.token_ids), len(completion.logprobs or []), completion.finish_reason


def test_each_token_is_reported_once_and_the_last_ones_never() -> None:
    async def scenario() -> None:
        engine = Engine()
        streams = EngineStreams(engine)
        task = await start(engine)
        assert streams.take(3).parts == ()
        engine.step("a")
        engine.step("a")
        await settle()
        assert streams.take(3).parts == (Part("a", 0, [10, 11], [-0.1, -0.11]),)
        engine.step("a")
        await settle()
        engine.step("a", "stop", is_delivered=False)  # in vLLM's list already, and on its way
        assert streams.take(3).parts == (Part("a", 2, [12], [-0.12]),)
        engine.step("a", "stop")
        assert end_of(await task)[2] == "stop"
        assert streams.take(3).parts == ()

    asyncio.run(scenario())


def test_a_dead_engine_leaves_what_it_yielded_and_says_so() -> None:
    async def scenario() -> None:
        engine = Engine()
        streams = EngineStreams(engine)
        running, waiting = await start(engine, "a"), await start(engine, "b")
        engine.step("a")
        await settle()
        engine.step("a", "stop", is_delivered=False)
        engine.die()
        assert end_of(await running) == ([10], 1, "abort")
        (output,) = await waiting
        assert (output.outputs, output.finished) == ([], True)
        assert streams.take(None).is_dead

    asyncio.run(scenario())


def test_a_cut_ends_a_request_with_what_it_has_and_leaves_the_others() -> None:
    async def scenario() -> None:
        engine = Engine()
        streams = EngineStreams(engine)
        cut, other = await start(engine, "a"), await start(engine, "b")
        engine.step("a")
        await settle()
        await streams.abort(["a"])
        assert end_of(await cut) == ([10], 1, "abort")
        engine.step("b", "length")
        assert end_of(await other) == ([10], 1, "length")
        assert engine.aborted == ["a"]

    asyncio.run(scenario())


def test_a_cut_that_comes_before_its_request_waits_for_it() -> None:
    async def scenario() -> None:
        engine = Engine()
        await EngineStreams(engine).abort(["a"])
        (output,) = await (await start(engine))
        assert (output.outputs, output.finished, engine.queues) == ([], True, {})
        again = await start(engine)  # the id is free again
        engine.step("a", "stop")
        assert end_of(await again) == ([10], 1, "stop")

    asyncio.run(scenario())


def test_a_cut_that_the_engine_did_not_know_yet_is_repeated_at_the_first_token() -> None:
    async def scenario() -> None:
        engine = Engine()
        streams = EngineStreams(engine)
        task = await start(engine)
        queue = engine.queues.pop("a")  # as if add_request were still on its way
        await streams.abort(["a"])
        engine.queues["a"] = queue
        engine.step("a")
        assert end_of(await task) == ([10], 1, "abort")

    asyncio.run(scenario())


def test_vllms_own_http_endpoints_name_no_argument() -> None:
    async def scenario() -> None:
        engine = Engine()
        EngineStreams(engine)
        outputs = engine.generate("prompt", None, "a")
        reading = asyncio.ensure_future(anext(aiter(outputs)))
        await settle()
        engine.step("a", "stop")
        assert end_of([await reading]) == ([10], 1, "stop")

    asyncio.run(scenario())


def test_when_the_engine_is_about_to_end_every_request_is_answered() -> None:
    async def scenario() -> None:
        engine = Engine()
        streams = EngineStreams(engine)
        tasks = [await start(engine, name) for name in "abc"]
        for name in "abc":
            engine.step(name)
        await settle()
        await streams.abort_all()
        assert [end_of(await task) for task in tasks] == [([10], 1, "abort")] * 3

    asyncio.run(scenario())
