"""verl's load balancer and our router keep the same promises to verl's own clients and trainers."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

pytest.importorskip("verl", reason="needs verl")

from verl.workers.rollout.router import GlobalRequestLoadBalancer

from verl_rlhfless.live.rollout_router import RolloutRouter
from verl_rlhfless.live.tickets import RouterSettings

Ask = Callable[..., Awaitable[Any]]
Question = Callable[[Ask], Coroutine[Any, Any, None]]


class Server:
    """The handle of a server that is verl's: it reports to nobody."""


A, B, C = Server(), Server(), Server()


async def verls(servers: dict[str, Server]) -> Any:
    return GlobalRequestLoadBalancer(servers)


async def ours(servers: dict[str, Server]) -> Any:
    router = RolloutRouter(servers)
    await router.configure(RouterSettings(stranded_timeout_s=0.05))
    return router


@pytest.fixture(params=[verls, ours], ids=["verl", "ours"])
def check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return ``check(question, **servers)``: ask a router of these servers, as its actor would be asked."""

    def check(question: Question, **servers: Server) -> None:
        async def run() -> None:
            router = await request.param(servers)

            async def ask(method: str, *args: Any, **kwargs: Any) -> Any:
                answer = getattr(router, method)(*args, **kwargs)
                return await answer if inspect.isawaitable(answer) else answer

            await asyncio.wait_for(question(ask), 30)

        asyncio.run(run())

    return check


def test_a_request_gets_a_server_and_its_handle(check: Callable[..., None]) -> None:
    async def question(ask: Ask) -> None:
        name, handle = await ask("acquire_server", request_id="r0")
        assert {"a": A, "b": B}[name] is handle
        assert await ask("get_inflight_count", name) == 1

    check(question, a=A, b=B)


def test_the_turns_of_a_conversation_go_to_one_server(check: Callable[..., None]) -> None:
    async def question(ask: Ask) -> None:
        (first, _) = await ask("acquire_server", "talk")
        for other in range(5):
            await ask("acquire_server", f"other{other}")
        assert (await ask("acquire_server", "talk"))[0] == first

    check(question, a=A, b=B)


def test_requests_spread_over_the_least_loaded(check: Callable[..., None]) -> None:
    async def question(ask: Ask) -> None:
        names = [(await ask("acquire_server", f"r{index}"))[0] for index in range(12)]
        assert Counter(names) == {"a": 4, "b": 4, "c": 4}
        assert await ask("get_total_inflight") == 12
        for _ in range(3):
            await ask("release_server", "b", request_id="any")
        assert [(await ask("acquire_server", f"s{index}"))[0] for index in range(3)] == ["b"] * 3

    check(question, a=A, b=B, c=C)


def test_a_release_never_counts_below_zero_and_may_name_a_server_that_is_gone(check: Callable[..., None]) -> None:
    async def question(ask: Ask) -> None:
        await ask("release_server", "a")
        await ask("release_server", "unknown")
        assert await ask("get_total_inflight") == 0
        await ask("acquire_server", "r0")
        assert await ask("get_total_inflight") == 1

    check(question, a=A)


def test_a_new_server_takes_its_share(check: Callable[..., None]) -> None:
    async def question(ask: Ask) -> None:
        for index in range(2):
            await ask("acquire_server", f"r{index}")
        await ask("add_servers", {"b": B})
        assert set(await ask("get_all_servers")) == {"a", "b"}
        assert [(await ask("acquire_server", f"s{index}"))[0] for index in range(2)] == ["b", "b"]

    check(question, a=A)


def test_a_removed_server_gets_no_more_work_and_its_conversations_go_on_elsewhere(check: Callable[..., None]) -> None:
    async def question(ask: Ask) -> None:
        (first, _) = await ask("acquire_server", "talk")
        (other,) = {"a", "b"} - {first}
        await ask("remove_servers", [first])
        assert await ask("get_all_servers") == [other]
        assert (await ask("acquire_server", "talk"))[0] == other
        assert [(await ask("acquire_server", f"r{index}"))[0] for index in range(3)] == [other] * 3
        assert await ask("get_total_inflight") == 4, "what still runs on the removed one is not counted"
        await ask("release_server", first)

    check(question, a=A, b=B)


def test_forgotten_conversations_choose_anew(check: Callable[..., None]) -> None:
    async def question(ask: Ask) -> None:
        (first, _) = await ask("acquire_server", "talk")
        cleared = await ask("clear_sticky_cache")
        assert cleared["cleared_entries"] == 1
        assert cleared["server_loads"][first] == 1
        assert (await ask("acquire_server", "talk"))[0] != first, "the other one has less to do"

    check(question, a=A, b=B)


def test_without_any_server_the_caller_is_told(check: Callable[..., None]) -> None:
    async def question(ask: Ask) -> None:
        with pytest.raises(RuntimeError, match="No available servers in load balancer"):
            await ask("acquire_server", "r0")

    check(question)


def test_the_status_has_what_verl_reads(check: Callable[..., None]) -> None:
    async def question(ask: Ask) -> None:
        await ask("acquire_server", "r0")
        status = await ask("get_status")
        assert (status["servers"], status["total_inflight"], status["active_servers"]) == ({"a": 1}, 1, 1)
        assert status["registered_handles"] == ["a"]
        for when in ("acquire", "release"):
            assert isinstance(await ask(f"require_{when}_fields"), list)

    check(question, a=A)
