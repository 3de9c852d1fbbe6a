"""Calls of a router that is out of reach: how long they are made again, and what becomes of what they carried."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

from verl_rlhfless.live import retry as retry_module
from verl_rlhfless.live.mailbox import Mailbox
from verl_rlhfless.live.post_office import PostOffice
from verl_rlhfless.live.retry import Once, once, retry
from verl_rlhfless.live.tickets import Delivery, Grant, Message, Progress, Refusal, SampleKey, SessionEnd, Ticket

AWAY = ActorUnavailableError("a disturbed network", None)
TRIES = 4


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "_WAITS_S", (0.0,) * (TRIES - 1))


class Router:
    """Raises these errors first, then takes what comes."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.taken: list[Message] = []
        self.delivery = Delivery(0, ())
        self.num_calls = 0
        self.send = SimpleNamespace(remote=self._send)
        self.grants = SimpleNamespace(remote=self._grants)
        self.recover = SimpleNamespace(remote=self._recover)

    def _reached(self) -> None:
        self.num_calls += 1
        if self.errors:
            raise self.errors.pop(0)

    async def _send(self, worker: str, num_received: int, number: int, messages: Sequence[Message]) -> Delivery:
        self._reached()
        self.taken += messages
        return self.delivery

    async def _grants(self, worker: str, num_received: int, timeout_s: float) -> Delivery:
        await asyncio.Event().wait()
        raise AssertionError

    async def _recover(self, attempt: str) -> Progress:
        self._reached()
        return Progress([1, 2], [], 7)


def ticket(name: str) -> Ticket:
    return Ticket(name, "w", name, None, 8)


@pytest.mark.parametrize(
    ("errors", "num_calls", "raised"),
    [([AWAY] * TRIES, TRIES + 1, ActorUnavailableError), ([AWAY, ActorDiedError()], 2, ActorDiedError)],
)
def test_who_waits_is_told_when_the_router_stays_out_of_reach_or_is_dead(
    errors: list[Exception], num_calls: int, raised: type[RayActorError]
) -> None:
    async def run() -> None:
        box = Mailbox(router := Router(*errors))
        waiting = [asyncio.create_task(box.grant(ticket(name))) for name in "ab"]
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, raised)
        await asyncio.sleep(0.01)
        assert router.num_calls == num_calls

    asyncio.run(asyncio.wait_for(run(), 10))


def test_the_end_of_a_sample_arrives_however_long_the_router_was_out_of_reach() -> None:
    """Without it the rollout would never be complete."""

    async def run() -> None:
        box = Mailbox(router := Router(*[AWAY] * (3 * TRIES)))
        first, second = SessionEnd(SampleKey("u", 0)), SessionEnd(SampleKey("u", 1))
        box.post(first)
        await asyncio.sleep(0)
        box.post(second)
        while len(router.taken) < 2:
            await asyncio.sleep(0)
        assert router.taken == [first, second]

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_grant_that_comes_again_is_neither_taken_nor_handed_back() -> None:
    async def run() -> None:
        box, grant, end = Mailbox(router := Router()), Grant("a", "w", "a.1", "s0"), SessionEnd(SampleKey("u", 0))
        router.delivery = Delivery(0, ((grant, "handle"),))
        assert await box.grant(ticket("a")) == (grant, "handle")
        box.post(end)
        await asyncio.sleep(0.01)
        assert router.taken == [ticket("a"), end]

    asyncio.run(asyncio.wait_for(run(), 10))


def test_what_is_safe_of_an_attempt_is_asked_for_again() -> None:
    async def run() -> None:
        assert (await Mailbox(Router(AWAY)).recover("t.1")).tokens == [1, 2]

    asyncio.run(run())


def test_a_delivery_whose_answer_is_lost_is_there_again_until_it_is_confirmed() -> None:
    async def run() -> None:
        office, grant, refusal = PostOffice(), Grant("a", "w", "a.1", "s0"), Refusal("b", "w", "none")
        office.put(grant, "handle")
        for _ in range(2):
            assert office.answer("w", 0, is_first=True) == Delivery(0, ((grant, "handle"),))
        office.put(refusal)
        for _ in range(2):
            assert await office.wait("w", 1, 60.0) == Delivery(1, ((refusal, None),))
        assert await office.wait("w", 2, 0.0) == Delivery(2, ())

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_waiting_call_is_not_ended_by_what_the_answer_to_a_send_brings() -> None:
    async def run() -> None:
        office = PostOffice()
        waiting = asyncio.create_task(office.wait("w", 0, 60.0))
        await asyncio.sleep(0)
        office.put(Grant("a", "w", "a.1", "s0"))
        office.answer("w", 0, is_first=True)
        await asyncio.sleep(0.01)
        assert not waiting.done()
        office.put(Grant("b", "w", "b.1", "s0"))
        office.answer("w", 0, is_first=False)  # of a send that comes late: nobody gets it
        assert (await waiting).first == 0

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_call_that_is_made_again_takes_effect_once_and_gets_the_same_answer() -> None:
    async def run() -> None:
        made, may_end, calls = [], asyncio.Event(), Once()

        async def work() -> int:
            made.append(1)
            await may_end.wait()
            return len(made)

        both = [asyncio.create_task(calls.answer("x", work)) for _ in range(2)]
        await asyncio.sleep(0)
        may_end.set()
        assert await asyncio.gather(*both, calls.answer("x", work)) == [1, 1, 1]
        assert await calls.answer("y", work) == 2

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_call_that_failed_fails_again_and_one_that_nobody_waits_for_any_more_goes_on() -> None:
    async def run() -> None:
        calls, ended = Once(), []

        async def fail() -> None:
            raise ValueError("no replica is up")

        async def work() -> None:
            await asyncio.sleep(0)
            ended.append(1)

        for _ in range(2):
            with pytest.raises(ValueError, match="no replica"):
                await calls.answer("x", fail)
        broken = asyncio.create_task(calls.answer("y", work))
        await asyncio.sleep(0)
        broken.cancel()
        await calls.answer("y", work)
        assert ended == [1]

    asyncio.run(asyncio.wait_for(run(), 10))


def test_the_trainer_asks_again_with_the_same_id(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def get(call: Any, timeout: float | None) -> Any:
        calls.append(call)
        if len(calls) < TRIES:
            raise AWAY
        return "answer"

    monkeypatch.setattr(retry_module.ray, "get", get)
    router = SimpleNamespace(once=SimpleNamespace(remote=lambda *call: call))
    assert retry(once(router, "announce", "step 1")) == "answer"
    assert len(calls) == TRIES and len(set(calls)) == 1 and calls[0][1:] == ("announce", "step 1")
    calls.clear()
    monkeypatch.setattr(retry_module, "_WAITS_S", (0.0,))
    with pytest.raises(ActorUnavailableError):
        retry(once(router, "announce", "step 1"))
