"""A pool of pre-imported servers never has more than its size, and never hands out a dead one."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from verl_rlhfless.live import warm_pool as warm_pool_module
from verl_rlhfless.live.warm_pool import WarmPool


class FakeServer:
    """A server actor as far as the pool uses it."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self.is_dead = False
        self.imported = asyncio.Event()
        self.wait_until_warm = SimpleNamespace(remote=self._wait_until_warm)
        self.process = SimpleNamespace(remote=self._process)

    async def _wait_until_warm(self) -> None:
        if self.is_dead:
            raise ray.exceptions.RayActorError
        await self.imported.wait()

    async def _process(self) -> tuple[int, float]:
        if self.is_dead:
            raise ray.exceptions.RayActorError
        return 7, 1.0


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> WarmPool:
    monkeypatch.setattr(WarmPool, "_create", lambda _, node_id: FakeServer(node_id))
    monkeypatch.setattr(warm_pool_module, "_accelerator_nodes", lambda: ["a", "b"])
    return WarmPool(size=3, max_num_seqs=8)


def _take(pool: WarmPool, node_id: str) -> Any:
    server, process = asyncio.run(pool.take(node_id))
    assert process == (7, 1.0)
    return server


def test_it_fills_to_its_size_over_all_nodes_and_not_beyond(pool: WarmPool) -> None:
    pool.fill()
    pool.fill()
    assert pool.num_waiting == 3
    assert [_take(pool, node).node_id for node in ("a", "a", "b")] == ["a", "a", "b"]
    assert pool.num_waiting == 0


def test_a_node_without_one_gets_a_new_server(pool: WarmPool) -> None:
    pool.fill()
    assert _take(pool, "c").node_id == "c"
    assert pool.num_waiting == 3


def test_a_server_that_died_in_waiting_is_replaced(pool: WarmPool) -> None:
    pool.fill()
    for server in pool._waiting["a"]:
        server.is_dead = True
    assert not _take(pool, "a").is_dead
    assert pool.num_waiting == 1  # the one on the other node


def test_a_server_that_died_in_waiting_is_counted_with_no_more_and_one_that_imports_is(
    pool: WarmPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def imports() -> None:
        await asyncio.Event().wait()

    async def is_out_of_reach() -> None:
        raise ray.exceptions.ActorUnavailableError("a disturbed network", b"0" * 16)

    monkeypatch.setattr(warm_pool_module, "_ANSWER_S", 0.01)
    pool.fill()
    (dead, busy), (away,) = pool._waiting["a"], pool._waiting["b"]
    dead.is_dead, busy.process.remote, away.process.remote = True, imports, is_out_of_reach
    asyncio.run(pool.forget_dead())
    assert [*pool._waiting["a"], *pool._waiting["b"]] == [busy, away]


def test_a_server_serves_one_replica_after_the_other(pool: WarmPool) -> None:
    pool.fill()
    server = _take(pool, "a")
    pool.give_back("a", server)
    assert pool.num_waiting == 3
    assert server in (_take(pool, "a"), _take(pool, "a"))


def test_a_full_pool_ends_what_is_given_back(pool: WarmPool, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    extra = _take(pool, "c")
    pool.fill()
    pool.give_back("c", extra)
    assert killed == [extra] and pool.num_waiting == 3


def test_a_pool_of_size_zero_warms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WarmPool, "_create", lambda _, node_id: FakeServer(node_id))
    monkeypatch.setattr(warm_pool_module, "_accelerator_nodes", lambda: ["a"])
    pool = WarmPool(size=0, max_num_seqs=8)
    pool.fill()
    assert pool.num_waiting == 0 and _take(pool, "a").node_id == "a"


def test_as_many_servers_are_waited_for_as_are_asked_for_and_dead_ones_not(pool: WarmPool) -> None:
    async def wait() -> list[bool]:
        pool.fill()
        first, second, dead = (server for servers in pool._waiting.values() for server in servers)
        dead.is_dead = True
        both = asyncio.ensure_future(pool.wait_warm(2, timeout_s=30.0))
        is_over = []
        for server in (first, second):
            server.imported.set()
            await asyncio.wait([both], timeout=0.05)
            is_over.append(both.done())
        return is_over

    assert asyncio.run(wait()) == [False, True]


@pytest.mark.parametrize(("count", "timeout_s"), [(0, 30.0), (1, 0.01)])
def test_the_wait_for_imports_ends(pool: WarmPool, count: int, timeout_s: float) -> None:
    pool.fill()
    asyncio.run(pool.wait_warm(count, timeout_s))
    assert pool.num_waiting == 3
