"""A worker and its router behind a network that loses calls, answers or both: everything arrives once, in order.

The router is ours, and so is the worker's mailbox; only the calls between them are played here.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorUnavailableError

from verl_rlhfless.live import retry as retry_module
from verl_rlhfless.live.mailbox import Mailbox
from verl_rlhfless.live.router import Router
from verl_rlhfless.live.tickets import Delivery, Message, Outcome, OutcomeKind, ServerLimits, Ticket

PLACES, WAIT_S = 2, 20.0
FATES = st.sampled_from(["arrives"] * 3 + ["is lost", "answer is lost", "breaks off, and is late"])


@pytest.fixture(autouse=True, scope="module")
def patient() -> Iterator[None]:
    """Calls are made again at once, and more often than any line here breaks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry_module, "_WAITS_S", (0.0,) * 1000)
        patch.setattr(retry_module.logger, "disabled", True)
        yield


class Line:
    """The router's handle. Each call has the next fate; when none is left, all arrive."""

    def __init__(self, router: Router, fates: Sequence[str], delays: Iterator[int]) -> None:
        self._router, self._fates, self._delays = router, iter(fates), delays
        self._calls: set[asyncio.Task[Any]] = set()

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self._call(method, args))

    async def _call(self, method: str, args: tuple[Any, ...]) -> Any:
        fate, is_away = next(self._fates, "arrives"), ActorUnavailableError("a disturbed network", None)
        if fate == "is lost":
            raise is_away
        call = asyncio.create_task(self._travel(method, args))
        self._calls.add(call)
        if fate == "breaks off, and is late":
            raise is_away
        answer = await call
        if fate == "answer is lost":
            raise is_away
        return answer

    async def _travel(self, method: str, args: tuple[Any, ...]) -> Any:
        await turns(next(self._delays, 0))
        answer = await getattr(self._router, method)(*args)
        await turns(next(self._delays, 0))
        return answer


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class NotingRouter(Router):
    """Keeps what it reads, by worker."""

    def __init__(self) -> None:
        super().__init__({})
        self.read: defaultdict[str, list[Message]] = defaultdict(list)

    async def send(self, worker: str, num_received: int, number: int, messages: Sequence[Message]) -> Delivery:
        self._sender = worker
        return await super().send(worker, num_received, number, messages)

    def _read(self, messages: Sequence[Message]) -> None:
        self.read[self._sender] += messages
        super()._read(messages)


class NotingMailbox(Mailbox):
    """Keeps what is posted."""

    def __init__(self, router: Any) -> None:
        super().__init__(router)
        self.posted: list[Message] = []

    def post(self, message: Message) -> None:
        self.posted.append(message)
        super().post(message)


async def client(box: Mailbox, name: str, cuts: int, is_cancelled: bool) -> list[str]:
    """Ask for one turn that is cut so often; return the attempts that were granted."""
    attempts: list[str] = []
    message: Ticket | Outcome = Ticket(name, box.worker, name, None, 8)
    if is_cancelled:
        waiting = asyncio.create_task(box.grant(message))
        await asyncio.sleep(0)
        waiting.cancel()
        box.post(Outcome(name, "", OutcomeKind.FAILED, 0, "cancelled"))
        return attempts
    for number in range(cuts + 1):
        grant, server = await box.grant(message)
        assert grant.ticket == name and server == "handle"
        attempts.append(grant.attempt)
        await asyncio.sleep(0)
        is_last = number == cuts
        message = Outcome(name, grant.attempt, OutcomeKind.DONE if is_last else OutcomeKind.CUT, number + 1)
    box.post(message)
    return attempts


@settings(max_examples=400)
@given(
    fates=st.lists(FATES, max_size=60),
    delays=st.lists(st.integers(0, 20), max_size=60),
    clients=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=8),
)
def test_no_message_and_no_grant_is_lost_or_taken_twice(
    fates: list[str], delays: list[int], clients: list[tuple[int, bool]]
) -> None:
    async def run() -> None:
        router = NotingRouter()
        await router._joining
        router._handles["s0"] = "handle"
        router.book.max_retries = 10**6  # a cut that nobody planned counts as a fault
        router.book.servers.add("s0", ServerLimits(PLACES))
        line = Line(router, fates, iter(delays))
        boxes = [NotingMailbox(line) for _ in range(2)]  # one gets a place when the other one's request ends
        runs = [client(boxes[number % 2], f"t{number}", *one) for number, one in enumerate(clients)]
        attempts = [attempt for one in await asyncio.gather(*runs) for attempt in one]
        while any(len(router.read[box.worker]) < len(box.posted) for box in boxes) or router.book.has_requests:
            await asyncio.sleep(0)
        assert all(router.read[box.worker] == box.posted for box in boxes), "each message once, and in order"
        posted = boxes[0].posted + boxes[1].posted
        handed_back = [m.attempt for m in posted if isinstance(m, Outcome) and m.detail == "nobody waits for it"]
        assert len(set(attempts + handed_back)) == len(attempts + handed_back), "each attempt has one owner"
        assert len(attempts + handed_back) == router.book.num_granted, "nothing that was granted is lost"
        assert len(attempts) == sum(cuts + 1 for cuts, is_cancelled in clients if not is_cancelled)
        assert router.book.num_late == 0

    asyncio.run(asyncio.wait_for(run(), WAIT_S))
